"""Turn a folder of pictures and a CSV (image_0,image_1,prompt,label_0) into preference shards.

python examples/mm/clip/folder_to_shards.py pictures/ pictures/labels.csv preferences/train
"""

import sys

from nemo_aligner_diffusion.cli.preferences_to_shards import folder_main

if __name__ == "__main__":
    sys.exit(folder_main())
