"""Base and tuned models on the same prompts and seeds, by every reward and judge asked for.

python examples/mm/stable_diffusion/evaluate.py --help
"""

import sys

from nemo_aligner_diffusion.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
