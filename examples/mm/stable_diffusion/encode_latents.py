"""Encode the pictures of preference shards once, for training without a VAE in the way.

python examples/mm/stable_diffusion/encode_latents.py preferences/train latents/
"""

import sys

from nemo_aligner_diffusion.cli.encode_latents import main

if __name__ == "__main__":
    sys.exit(main())
