"""Make preference shards by a rule from pictures of the embedded model, to try reward training without asking anybody.

python examples/mm/clip/make_rule_preferences.py colourfulness preferences/
"""

import sys

from nemo_aligner_diffusion.cli.rule_preferences import make_main

if __name__ == "__main__":
    sys.exit(make_main())
