"""How well a reward .nemo predicts preferences: accuracy, ties, calibration.

python examples/mm/clip/test_reward_model.py results/reward/export/reward.nemo preferences/validation
"""

import sys

from nemo_aligner_diffusion.cli.evaluate_reward import main

if __name__ == "__main__":
    sys.exit(main())
