"""Fine-tune Stable Diffusion XL on a reward with DRaFT+.

python examples/mm/stable_diffusion/train_sdxl_draftp.py --help
"""

import sys

from nemo_aligner_diffusion.cli.train import main

if __name__ == "__main__":
    sys.exit(main("draftp_sdxl"))
