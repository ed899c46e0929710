"""What a run has learnt as a LoRA for ComfyUI, or merged into a pipeline folder or a single file.

python examples/mm/stable_diffusion/export.py --help
"""

import sys

from nemo_aligner_diffusion.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
