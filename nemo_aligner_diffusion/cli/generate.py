"""``generate.py``: pictures from the base model, a tuned one, and anything between or beyond.

Imports nothing heavy: ``--help`` and mistakes in the arguments answer at once; the work is in
:mod:`nemo_aligner_diffusion.evaluation.generation`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.command_line import Parser, finite_number, whole_number
from nemo_aligner_diffusion.data.prompt_files import read_lines
from nemo_aligner_diffusion.diffusion.settings import SamplingSettings, WeightsSettings
from nemo_aligner_diffusion.errors import ConfigurationError, DataError
from nemo_aligner_diffusion.evaluation.request import Adapter, Request, annealed_weights
from nemo_aligner_diffusion.runtime.ending import command

EXAMPLES = """\
examples (docs/using_the_result.md has more):
  generate.py --prompt "red apple" --num-images 4
      four pictures from the embedded model
  generate.py --lora results/run/export --compare --prompt "red apple" --prompt animal
      base above tuned, with rewards
"""


@command(interrupted="interrupted; the pictures written so far are complete")
def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit status (0, or the ``exit_code`` of the error that was printed)."""
    request = read_request(argv)
    from nemo_aligner_diffusion.evaluation.generation import run_generation  # torch and all, only now

    run_generation(request)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All options, in the order in which one needs them; their names are those of :class:`Request`."""
    parser = Parser(
        "Pictures from the base model, a tuned one, and anything between or beyond: PNGs and a grid.", EXAMPLES
    )
    add_prompts(parser)
    add_model(parser, "repeated ones are mixed")

    compare = parser.add_argument_group("comparisons (rows of the grid)")
    compare.add_argument("--compare", action="store_true", help="the base model beside the tuned one, same seeds")
    rows = compare.add_mutually_exclusive_group()
    rows.add_argument(
        "--scales",
        type=numbers,
        default=[],
        metavar="LIST",
        help="factors on all adapter weights, such as 0,0.5,1,1.5",
    )
    rows.add_argument(
        "--weights",
        type=_parts,
        default=[],
        metavar="LIST",
        help="annealed guidance between base and tuned: base, draft, linear, power_P or numbers, comma-separated",
    )

    add_sampling(parser)
    result = parser.add_argument_group("result")
    result.add_argument(
        "--reward",
        metavar="NAME|FILE",
        help="score the pictures: a .nemo file, symmetry, compressibility, incompressibility, none, or your own "
        "package.module:name (default: the adapter's run's, else the embedded reward)",
    )
    result.add_argument("--output", type=Path, default=Path("generated"), metavar="FOLDER", help="default: generated")
    result.add_argument(
        "--overwrite",
        action="store_true",
        help="write into FOLDER even if it holds files (default: FOLDER-2, FOLDER-3, … then)",
    )
    return parser


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """What every command that makes pictures asks for first."""
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", action="append", dest="prompts", default=[], metavar="TEXT", help="may be repeated")
    what.add_argument("--prompts-file", type=Path, metavar="FILE", help="UTF-8 text file, one prompt a line")
    seeds = what.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seeds", type=parse_seeds, default=[0], metavar="LIST", help="such as 0,1,7 or 0-3 (default: 0)"
    )
    seeds.add_argument("--num-images", type=whole_number, metavar="N", help="the same as --seeds 0-(N-1)")


def add_model(parser: argparse.ArgumentParser, several: str) -> argparse._ArgumentGroup:
    """``several``: what becomes of more than one ``--lora``."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", type=Path, metavar="PATH", help="diffusers folder, hub id or file (default: embedded)"
    )
    model.add_argument("--vae", type=Path, metavar="PATH", help="another VAE: a folder or a file")
    model.add_argument(
        "--text", type=Path, metavar="FOLDER", help="text encoders and tokenizers: folder or hub id, beside a file"
    )
    tuned = model.add_mutually_exclusive_group()
    tuned.add_argument("--unet", type=Path, metavar="PATH", help="fully fine-tuned denoiser: export/unet, or a file")
    tuned.add_argument(
        "--lora",
        action="append",
        dest="adapters",
        type=parse_adapter,
        default=[],
        metavar="PATH[:WEIGHT]",
        help="export folder or .safetensors file; any real weight (default 1); " + several,
    )
    return model


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """And the machine."""
    sampling = parser.add_argument_group("sampling (default: as the adapter's run, else as the model's family)")
    sampling.add_argument("--steps", type=whole_number, metavar="N", help="sampling steps")
    sampling.add_argument("--guidance", type=finite_number, metavar="G", help="its scale")
    sampling.add_argument("--sampler", metavar="NAME", help="ddim, euler, dpm++2m, …")
    sampling.add_argument("--eta", type=finite_number, metavar="ETA", help="DDIM's noise, 0 to 1 (default: 0)")
    sampling.add_argument("--height", type=whole_number, metavar="PX", help="default: the model's own")
    sampling.add_argument("--width", type=whole_number, metavar="PX", help="default: the model's own")

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-size", type=whole_number, default=16, metavar="N", help="pictures at a time (default: 16)"
    )
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 … (default: a GPU where there is one)")
    machine.add_argument("--precision", choices=("32", "bf16", "16"), default="32", help="of the weights (default: 32)")


def read_request(argv: Sequence[str]) -> Request:
    """The command line, checked.

    Raises:
        ConfigurationError, DataError: naming the option or the file's line.
    """
    given = prompts_and_seeds(vars(build_parser().parse_args(join_negative_lists(argv))))
    request = Request(**given, usual=usual_sampling(given["model"]))
    for kind in request.weights:
        annealed_weights(kind, 1)  # only to complain before anything is loaded
    for option in ("compare", "scales", "weights"):
        if given[option] and not (request.adapters or request.unet):
            raise ConfigurationError(f"--{option} compares with a tuned model: give --lora PATH or --unet PATH too")
    if request.scales and request.unet:
        raise ConfigurationError("--scales scales adapters: it needs --lora PATH (a full fine-tune has --weights)")
    return request


def prompts_and_seeds(given: dict[str, Any]) -> dict[str, Any]:
    """The options with what their files hold.

    Raises:
        ConfigurationError, DataError: there is no prompt; a line of the file is none.
    """
    file, count = given.pop("prompts_file"), given.pop("num_images")
    if file is not None:
        given["prompts"] = [*given["prompts"], *_read_prompts(file)]
    if count is not None:
        given["seeds"] = list(range(count))
    if not given["prompts"]:
        raise ConfigurationError("no prompt: give --prompt TEXT (repeatable) or --prompts-file FILE")
    return given


def usual_sampling(model: Path | None) -> SamplingSettings:
    """As the family of ``model`` samples, of the embedded one without."""
    from nemo_aligner_diffusion.config.families import family_of, sampling_of  # here: `--help` needs no OmegaConf
    from nemo_aligner_diffusion.diffusion.recognition import recognise

    weights = WeightsSettings(from_pretrained=None if model is None else str(model))
    return sampling_of(family_of(recognise(weights, fetch=True))[0])


def join_negative_lists(argv: Sequence[str]) -> list[str]:
    """``--scales -1,0,1`` as ``--scales=-1,0,1``: argparse takes a list that begins with a minus for an option."""
    words = list(argv)
    for index in range(len(words) - 1, 0, -1):
        negative = words[index][:1] == "-" and words[index][1:2] in tuple("0123456789.")
        if words[index - 1] in ("--scales", "--weights") and negative:
            words[index - 1 : index + 1] = [f"{words[index - 1]}={words[index]}"]
    return words


def parse_adapter(text: str) -> Adapter:
    """``PATH`` or ``PATH:WEIGHT``; a run directory stands for its ``export/``.

    Raises:
        ArgumentTypeError: there is no such file or folder, or the weight is no number.
    """
    path, weight = Path(text).expanduser(), 1.0
    front, colon, tail = text.rpartition(":")
    if colon and not path.exists() and Path(front).expanduser().exists():
        path, weight = Path(front).expanduser(), finite_number(tail)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file or folder {text}; expected PATH or PATH:WEIGHT")
    name = "pytorch_lora_weights.safetensors"
    if path.is_dir() and not (path / name).is_file() and (path / "export" / name).is_file():
        path = path / "export"
    return Adapter(path, weight)


def parse_seeds(text: str) -> list[int]:
    """``0,1,7`` and ranges ``0-3``, in the order given, without repetitions.

    Raises:
        ArgumentTypeError: anything else.
    """
    seeds: list[int] = []
    for part in _parts(text):
        first, dash, final = part.partition("-")
        if not first.isdecimal() or (dash and not final.isdecimal()) or (dash and int(final) < int(first)):
            raise argparse.ArgumentTypeError(f"{part!r} is no seed; expected a list such as 0,1,7 or 0-3")
        seeds += range(int(first), int(final) + 1) if dash else [int(first)]
    return list(dict.fromkeys(seeds))


def numbers(text: str) -> list[float]:
    """``0,0.5,1``."""
    return [finite_number(part) for part in _parts(text)]


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected values between commas, one is empty")
    return parts


def _read_prompts(path: Path) -> list[str]:
    def stop(message: str) -> None:
        raise DataError(message)

    prompts = [located.prompt.strip() for _, located in read_lines(path, stop) if located.prompt]
    if not prompts:
        raise DataError(f"{path} holds no prompt; expected one prompt a line")
    return prompts
