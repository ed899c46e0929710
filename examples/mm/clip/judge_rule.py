"""Measure whether tuning on a learnt reward moved the pictures by the rule that the reward learnt.

python examples/mm/clip/judge_rule.py colourfulness results/colourful/export
"""

import sys

from nemo_aligner_diffusion.cli.rule_preferences import judge_main

if __name__ == "__main__":
    sys.exit(judge_main())
