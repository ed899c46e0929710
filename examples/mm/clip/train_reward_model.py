"""Train a CLIP on preferences between pictures; a reward .nemo comes out.

python examples/mm/clip/train_reward_model.py --help
"""

import sys

from nemo_aligner_diffusion.cli.train_reward import main

if __name__ == "__main__":
    sys.exit(main())
