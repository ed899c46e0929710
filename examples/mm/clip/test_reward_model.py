"""How well a reward .nemo predicts preferences: accuracy, ties, calibration.

python examples/mm/clip/test_reward_model.py results/reward/export/reward.nemo preferences/validation
"""

import sys

from nemo_aligner_diffusion.reward_training.evaluate_cli import main

if __name__ == "__main__":
    sys.exit(main())
