"""The command that turns the weights of a published reward into a ``.nemo``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nemo_aligner_diffusion.command_line import Parser, whole_number
from nemo_aligner_diffusion.rewards.convert import KINDS, Conversion, convert_reward
from nemo_aligner_diffusion.runtime.ending import command

_EXAMPLES = """examples:
  convert_reward_to_nemo.py --kind pickscore --output pickscore.nemo
  convert_reward_to_nemo.py --kind hps_v2.1 --source HPS_v2.1_compressed.pt --tokenizer CLIP_FOLDER --output hps.nemo
  convert_reward_to_nemo.py --kind clipscore --source CLIP_FOLDER --output clipscore.nemo
  convert_reward_to_nemo.py --kind aesthetic --source sac+logos+ava1-l14-linearMSE.pth --clip CLIP_FOLDER \\
      --output aesthetic.nemo
  convert_reward_to_nemo.py --kind image_reward --source ImageReward.pt --tokenizer BERT_FOLDER --output ir.nemo
then: train with rm.model.restore_from_path=FILE.nemo"""


@command(interrupted="interrupted; nothing was written")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    arguments = vars(_parser().parse_args(argv))
    output, overwrite = Path(arguments.pop("output")).expanduser(), arguments.pop("overwrite")
    for line in convert_reward(Conversion(**arguments), output, overwrite=overwrite):
        print(line)
    print(f"use it with  rm.model.restore_from_path={output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    usual = {name: f"  [{kind.source}]" if kind.source else "" for name, kind in KINDS.items()}
    kinds = "\n".join(f"  {name:<13} {kind.help}{usual[name]}" for name, kind in KINDS.items())
    parser = Parser(
        "Turn the weights of a published reward into a .nemo file, restore it and print what it is.\n"
        "Paths are local files and folders; owner/name is a Hugging Face repository, fetched where it isn't cached.\n"
        f"No code in a checkpoint is run.\n\nkinds (and where --source usually lies):\n{kinds}",
        _EXAMPLES,
    )
    parser.add_argument("--kind", required=True, choices=list(KINDS), metavar="KIND", help="what the weights are")
    parser.add_argument("--source", help="file, folder or owner/name of the weights (default: see the list above)")
    parser.add_argument("--output", required=True, help="the .nemo file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--tokenizer", help="folder or owner/name of the tokenizer, where --source has none")
    parser.add_argument("--clip", help="aesthetic: the CLIP under the head (default: openai/clip-vit-large-patch14)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the saved weights (default: as in the source)"
    )
    parser.add_argument("--score", choices=("pickscore", "hps", "clipscore"), help="of a CLIP (default: the kind's)")
    parser.add_argument(
        "--prompt-prefix", help='words before every prompt, as "A photo depicts " in CLIPScore\'s paper'
    )
    parser.add_argument("--name", help="the reward's name in metrics (default: the kind)")
    parser.add_argument(
        "--resize",
        choices=("crop", "crop_down", "pad", "pad_uncut", "squash"),
        help="how pictures that are no squares become one (default: as the weights' own code does)",
    )
    open_clip = parser.add_argument_group("OpenCLIP checkpoints: what their tensors don't say")
    open_clip.add_argument("--activation", choices=("gelu", "quick_gelu"), help="gelu: LAION's; quick_gelu: OpenAI's")
    open_clip.add_argument("--vision-heads", type=whole_number, metavar="N", help="attention heads of the vision tower")
    open_clip.add_argument("--text-heads", type=whole_number, metavar="N", help="attention heads of the text tower")
    parser.add_argument(
        "--head-activation", choices=("identity", "relu"), help="aesthetic: between the head's layers, if unusual"
    )
    parser.add_argument("--gzip", action="store_true", help="compress; weights hardly shrink")
    return parser
