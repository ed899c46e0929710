"""Turn Pick-a-Pic-like parquet files into preference shards.

python examples/mm/clip/parquet_to_shards.py data/train-00000.parquet preferences/train
"""

import sys

from nemo_aligner_diffusion.cli.preferences_to_shards import parquet_main

if __name__ == "__main__":
    sys.exit(parquet_main())
