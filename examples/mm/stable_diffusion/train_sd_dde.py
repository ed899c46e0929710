"""Fine-tune a Stable Diffusion model on preferences between pictures with DDE.

python examples/mm/stable_diffusion/train_sd_dde.py --help
"""

import sys

from nemo_aligner_diffusion.cli.train import main

if __name__ == "__main__":
    sys.exit(main("dde_sd"))
