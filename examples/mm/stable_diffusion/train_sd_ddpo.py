"""Fine-tune a Stable Diffusion model on a reward that need not be differentiable, with DDPO.

python examples/mm/stable_diffusion/train_sd_ddpo.py --help
"""

import sys

from nemo_aligner_diffusion.cli.train import main

if __name__ == "__main__":
    sys.exit(main("ddpo_sd"))
