"""Pictures from the base model, a tuned one, any LoRA scale, several adapters mixed.

python examples/mm/stable_diffusion/generate.py --help
"""

import sys

from nemo_aligner_diffusion.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
