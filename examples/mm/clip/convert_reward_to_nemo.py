"""Turn the weights of a published reward (PickScore, HPSv2, CLIP, aesthetic, ImageReward) into a .nemo file.

python examples/mm/clip/convert_reward_to_nemo.py --kind pickscore --output pickscore.nemo
"""

import sys

from nemo_aligner_diffusion.cli.convert_reward import main

if __name__ == "__main__":
    sys.exit(main())
