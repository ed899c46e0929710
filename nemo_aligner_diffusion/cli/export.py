"""``export.py``: what was learnt as a LoRA file of another layout, or merged into the model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nemo_aligner_diffusion.command_line import Parser, finite_number
from nemo_aligner_diffusion.runtime.ending import command

_EXAMPLES = """\
what --to names:
  kohya        LoRA file for ComfyUI, Forge, A1111 (lora_unet_…, .alpha); of
               transformers the diffusers file serves them, too
  diffusers    LoRA file for load_lora_weights
  pipeline     diffusers folder of the whole model, with what was learnt in its weights
  single-file  the same as one .safetensors (Stable Diffusion 1.x, 2.x, SDXL)

examples:
  export.py results/run --to single-file --output tuned.safetensors --precision 16
  export.py results/run --to pipeline --output tuned
  export.py downloaded.safetensors --model SDXL_FOLDER --to kohya --output lora.safetensors"""


@command(interrupted="interrupted; nothing was written")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    given = vars(_parser().parse_args(argv))
    from nemo_aligner_diffusion.evaluation.conversion import Conversion, convert_export  # torch and all, only now

    print(f"written to {convert_export(Conversion(**given))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Turn what a run has learnt, or any LoRA, into the file that another program reads.", _EXAMPLES)
    add = parser.add_argument
    add("source", type=_existing, help="run directory, export folder, LoRA file, or folder of a tuned denoiser")
    add(
        "--to", required=True, choices=("kohya", "diffusers", "pipeline", "single-file"), metavar="LAYOUT", help="below"
    )
    add("--output", required=True, type=lambda text: Path(text).expanduser(), metavar="PATH", help="file or folder")
    add("--model", type=Path, metavar="PATH", help="base model (default: the run's, else the embedded one)")
    add("--text", type=Path, metavar="FOLDER", help="its text encoders and tokenizers: folder or hub id, beside a file")
    add("--weight", type=finite_number, default=1.0, metavar="W", help="of the adapter, any real number (default: 1)")
    add("--precision", choices=("32", "bf16", "16"), default="32", help="of merged weights (default: 32)")
    add("--overwrite", action="store_true", help="replace PATH if it exists")
    return parser


def _existing(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file or folder {text}")
    return path
