"""Fine-tune Stable Diffusion XL on a reward with DRTune.

python examples/mm/stable_diffusion/train_sdxl_drtune.py --help
"""

import sys

from nemo_aligner_diffusion.cli.train import main

if __name__ == "__main__":
    sys.exit(main("drtune_sdxl"))
