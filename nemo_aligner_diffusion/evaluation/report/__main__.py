"""``python -m nemo_aligner_diffusion.evaluation.report``."""

from nemo_aligner_diffusion.evaluation.report import main

raise SystemExit(main())
