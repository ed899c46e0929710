"""Fine-tune a Stable Diffusion model on preferences between pictures with Diffusion-DPO.

python examples/mm/stable_diffusion/train_sd_dpo.py --help
"""

import sys

from nemo_aligner_diffusion.cli.train import main

if __name__ == "__main__":
    sys.exit(main("dpo_sd"))
