"""``python -m nemo_aligner_diffusion.planner``."""

import sys

from nemo_aligner_diffusion.cli.plan import main

sys.exit(main())
