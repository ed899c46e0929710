"""``generate.py``: pictures from the base model, a tuned one, and anything between or beyond.

Imports nothing heavy: ``--help`` and mistakes in the arguments answer at once; the work is in
:mod:`nemo_aligner_diffusion.evaluation.generation`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from nemo_aligner_diffusion.command_line import command
from nemo_aligner_diffusion.data.prompt_files import MAX_PROMPT_BYTES, clean_prompt
from nemo_aligner_diffusion.diffusion.settings import SamplingSettings
from nemo_aligner_diffusion.errors import ConfigurationError, DataError
from nemo_aligner_diffusion.evaluation.request import Adapter, Request, annealed_weights
from nemo_aligner_diffusion.formats.files import decode_utf8, open_regular, text_lines
from nemo_aligner_diffusion.settings import integer, number

_KINDS = {
    **dict.fromkeys(("num_images", "steps", "height", "width", "batch_size"), integer(1, nullable=True)),
    **dict.fromkeys(("guidance", "eta"), number(nullable=True)),
}

EXAMPLES = """\
examples:
  generate.py --prompt "red apple" --num-images 4
      four pictures from the embedded model
  generate.py --lora results/run/export --compare --prompt "red apple" --prompt animal
      base above tuned, with rewards
  generate.py --lora results/run/export --scales 0,0.5,1,1.5 --prompt animal
      less and more of what was learnt
  generate.py --lora a/export:0.7 --lora b.safetensors:0.5 --prompt animal
      two adapters mixed
  generate.py --lora results/run/export --weights base,draft,linear,power_2,0.5 --prompt animal
      from the base model to the tuned one along the sampling steps
  generate.py --unet results/run/export/unet --compare --prompt animal
      a full fine-tune
"""


@command(interrupted="interrupted; the pictures written so far are complete")
def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit status (0, or the ``exit_code`` of the error that was printed)."""
    arguments = build_parser().parse_args(_join_negative_lists(argv))
    request = read_request(arguments)
    from nemo_aligner_diffusion.evaluation.generation import run_generation  # torch and all, only now

    run_generation(request)
    return 0


def _join_negative_lists(argv: Sequence[str]) -> list[str]:
    """``--scales -1,0,1`` as ``--scales=-1,0,1``: argparse takes a list that begins with a minus for an option."""
    words = list(argv)
    for index in range(len(words) - 1, 0, -1):
        negative = words[index][:1] == "-" and words[index][1:2] in tuple("0123456789.")
        if words[index - 1] in ("--scales", "--weights") and negative:
            words[index - 1 : index + 1] = [f"{words[index - 1]}={words[index]}"]
    return words


def build_parser() -> argparse.ArgumentParser:
    """All options, in the order in which one needs them."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Pictures from the base model, a tuned one, and anything between or beyond: PNGs and a grid.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    what.add_argument("--prompts-file", type=Path, metavar="FILE", help="UTF-8 text file, one prompt a line")
    what.add_argument("--seeds", metavar="LIST", help="seeds for every prompt, such as 0,1,7 or 0-3 (default: 0)")
    what.add_argument("--num-images", type=int, metavar="N", help="the same as --seeds 0-(N-1)")

    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, metavar="FOLDER", help="diffusers pipeline folder (default: embedded)")
    model.add_argument("--unet", type=Path, metavar="PATH", help="fully fine-tuned denoiser: export/unet, or a file")
    model.add_argument("--vae", type=Path, metavar="PATH", help="another VAE: a folder or a file")
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:WEIGHT]",
        help="export folder or .safetensors file; any real weight (default 1); repeated ones are mixed",
    )

    compare = parser.add_argument_group("comparisons (rows of the grid)")
    compare.add_argument("--compare", action="store_true", help="the base model beside the tuned one, same seeds")
    compare.add_argument("--scales", metavar="LIST", help="factors on all adapter weights, such as 0,0.5,1,1.5")
    compare.add_argument(
        "--weights",
        metavar="LIST",
        help="annealed guidance between base and tuned: base, draft, linear, power_P or numbers, comma-separated",
    )

    shipped = SamplingSettings()  # an adapter made by a run brings that run's settings instead
    sampling = parser.add_argument_group("sampling (default: as the adapter's run, else as shipped)")
    sampling.add_argument("--steps", type=int, metavar="N", help=f"sampling steps (shipped: {shipped.inference_steps})")
    guidance = f"guidance scale (shipped: {shipped.unconditional_guidance_scale:g})"
    sampling.add_argument("--guidance", type=float, metavar="G", help=guidance)
    sampling.add_argument("--sampler", metavar="NAME", help="ddim, euler, dpm++2m, … (shipped: the pipeline's own)")
    sampling.add_argument("--eta", type=float, metavar="ETA", help="DDIM's noise, 0 to 1 (shipped: 0)")
    sampling.add_argument("--height", type=int, metavar="PX", help="default: the model's own")
    sampling.add_argument("--width", type=int, metavar="PX", help="default: the model's own")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, default=16, metavar="N", help="pictures at a time (default: 16)")
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    machine.add_argument("--precision", choices=("32", "bf16", "16"), default="32", help="of the weights (default: 32)")

    result = parser.add_argument_group("result")
    result.add_argument(
        "--reward",
        metavar="NAME|FILE",
        help="score the pictures: a .nemo file, symmetry, compressibility, incompressibility, none, or your own "
        "package.module:name "
        "(default: the adapter's run's, else the embedded reward)",
    )
    result.add_argument("--output", type=Path, default=Path("generated"), metavar="FOLDER", help="default: generated")
    result.add_argument(
        "--overwrite",
        action="store_true",
        help="write into FOLDER even if it holds files (default: FOLDER-2, FOLDER-3, … then)",
    )
    return parser


def read_request(arguments: argparse.Namespace) -> Request:
    """Check what the parser cannot.

    Raises:
        ConfigurationError, DataError: naming the option or the file's line.
    """
    prompts = [*arguments.prompt, *(_read_prompts(arguments.prompts_file) if arguments.prompts_file else [])]
    adapters = [parse_adapter(text) for text in arguments.lora]
    scales = [_number("--scales", part) for part in _parts("--scales", arguments.scales)]
    weights = _parts("--weights", arguments.weights)
    for kind in weights:
        annealed_weights(kind, 1)  # only to complain before anything is loaded
    tuned = bool(adapters or arguments.unet)
    comparisons = {"--compare": arguments.compare, "--scales": scales, "--weights": weights}
    untuned = next((option for option, given in comparisons.items() if given and not tuned), None)
    wrong = {
        "no prompt: give --prompt TEXT (repeatable) or --prompts-file FILE": not prompts,
        "--seeds and --num-images exclude each other: give one of them": arguments.seeds and arguments.num_images,
        f"{untuned} compares with a tuned model: give --lora PATH or --unet PATH too": untuned,
        "--lora and --unet exclude each other: an adapter belongs to the model it was made for": adapters
        and arguments.unet,
        "--scales scales adapters: it needs --lora PATH (a full fine-tune has --weights)": scales and not adapters,
        "--scales and --weights each make the rows of the grid: give one of them": scales and weights,
    }
    for message, given in wrong.items():
        if given:
            raise ConfigurationError(message)
    for name, expected in _KINDS.items():
        expected.read(f"--{name.replace('_', '-')}", getattr(arguments, name))
    made = {
        "prompts": prompts,
        "seeds": list(range(arguments.num_images))
        if arguments.num_images is not None
        else parse_seeds(arguments.seeds or "0"),
        "adapters": adapters,
        "scales": scales,
        "weights": weights,
    }
    asked = {name: value for name, value in vars(arguments).items() if name in Request.__annotations__}
    return Request(**{**asked, **made})


def parse_adapter(text: str) -> Adapter:
    """``PATH`` or ``PATH:WEIGHT``; a run directory stands for its ``export/``.

    Raises:
        ConfigurationError: there is no such file or folder.
    """
    path, weight = Path(text).expanduser(), 1.0
    if not path.exists():
        front, colon, tail = text.rpartition(":")
        if colon:
            try:
                path, weight = Path(front).expanduser(), float(tail)
            except ValueError:
                path, weight = Path(text).expanduser(), 1.0
    if not path.exists():
        raise ConfigurationError(f"--lora {text}: there is no file or folder {path}; expected PATH or PATH:WEIGHT")
    if not math.isfinite(weight):
        raise ConfigurationError(f"--lora {text}: the weight must be a finite number")
    name = "pytorch_lora_weights.safetensors"
    if path.is_dir() and not (path / name).is_file() and (path / "export" / name).is_file():
        path = path / "export"
    return Adapter(path, weight)


def parse_seeds(text: str) -> list[int]:
    """``0,1,7`` and ranges ``0-3``, in the order given, without repetitions.

    Raises:
        ConfigurationError: anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, final = part.strip().partition("-")
        if not first.isdecimal() or (dash and not final.isdecimal()) or (dash and int(final) < int(first)):
            raise ConfigurationError(
                f"--seeds {text}: {part.strip()!r} is no seed; expected a list such as 0,1,7 or 0-3"
            )
        seeds += range(int(first), int(final) + 1) if dash else [int(first)]
    return list(dict.fromkeys(seeds))


def _parts(option: str, text: str | None) -> list[str]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigurationError(f"{option} {text!r}: expected values between commas, one is empty")
    return parts


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigurationError(f"{option}: {text!r} is no finite number")
    return value


def _read_prompts(path: Path) -> list[str]:
    prompts = []
    try:
        with open_regular(path) as stream:
            for number, (_, line) in enumerate(text_lines(stream, MAX_PROMPT_BYTES + 3), start=1):
                if not line.strip():
                    continue
                try:
                    prompts.append(clean_prompt(decode_utf8(line)).strip())
                except ValueError as error:
                    raise DataError(f"{path}: line {number} {error}") from error
    except OSError as error:
        raise DataError(f"--prompts-file {path}: {error.strerror or error}; expected a text file of prompts") from error
    if not prompts:
        raise DataError(f"{path} holds no prompt; expected one prompt a line")
    return prompts


if __name__ == "__main__":
    raise SystemExit(main())
