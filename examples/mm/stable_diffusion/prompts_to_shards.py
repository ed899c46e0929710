"""Turn text files with one prompt a line into webdataset shards.

python examples/mm/stable_diffusion/prompts_to_shards.py prompts.txt shards/ --samples-per-shard 2000 --gzip
"""

import sys

from nemo_aligner_diffusion.cli.prompts_to_shards import main

if __name__ == "__main__":
    sys.exit(main())
