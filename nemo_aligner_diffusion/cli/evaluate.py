"""``nad-evaluate``: base and tuned models on the same prompts and seeds, by every reward and judge asked for.

Imports nothing heavy; the work is in :mod:`nemo_aligner_diffusion.evaluation.comparison`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from nemo_aligner_diffusion.cli.generate import (
    add_model,
    add_prompts,
    add_sampling,
    join_negative_lists,
    numbers,
    prompts_and_seeds,
    usual_sampling,
)
from nemo_aligner_diffusion.command_line import Parser
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.request import EvaluationRequest
from nemo_aligner_diffusion.runtime.ending import command

EXAMPLES = """\
examples:
  nad-evaluate --lora results/run/export --prompts-file prompts.txt --seeds 0-15
      base and tuned by the embedded reward; scores.csv, summary.json, grid.png in evaluation/
  nad-evaluate --lora a/export --lora b/export --scales 0.5,1 --prompt "red apple" --reward pickscore.nemo
      two adapters at two scales each, by a reward of yours
  nad-evaluate … --shard 1/4      (and 2/4, 3/4, 4/4 elsewhere; then once without --shard)
"""


@command(interrupted="interrupted; the same command goes on")
def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    request = read_request(argv)
    from nemo_aligner_diffusion.evaluation.comparison import run_evaluation

    run_evaluation(request)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("Base and tuned models on the same prompts and seeds, by every reward and judge.", EXAMPLES)
    add_prompts(parser)
    model = add_model(parser, "each is a model of its own")
    model.add_argument(
        "--scales", type=numbers, default=[], metavar="LIST", help="each adapter at each of these scales"
    )
    add_sampling(parser)
    judged = parser.add_argument_group("judges")
    judged.add_argument(
        "--reward",
        action="append",
        dest="rewards",
        default=[],
        metavar="NAME|FILE",
        help="a .nemo file, embedded, symmetry, compressibility …, or your own package.module:name; may be repeated "
        "(default: embedded); one that the model was not tuned on is a held-out judge",
    )
    judged.add_argument(
        "--clip", type=Path, metavar="FILE", help="CLIP .nemo for diversity, CLIPScore, distances (default: embedded)"
    )
    judged.add_argument("--real", type=Path, metavar="FOLDER", help="pictures for the Fréchet and kernel distances")
    result = parser.add_argument_group("result")
    result.add_argument("--shard", type=parse_shard, metavar="I/N", help="make this part of the pictures, and no table")
    result.add_argument("--output", type=Path, default=Path("evaluation"), metavar="FOLDER", help="default: evaluation")
    result.add_argument("--overwrite", action="store_true", help="begin anew where FOLDER is of another evaluation")
    return parser


def read_request(argv: Sequence[str]) -> EvaluationRequest:
    """The command line, checked.

    Raises:
        ConfigurationError, DataError: naming the option or the file's line.
    """
    given = prompts_and_seeds(vars(build_parser().parse_args(join_negative_lists(argv))))
    given["rewards"] = given["rewards"] or ["embedded"]
    if given["scales"] and not given["adapters"]:
        raise ConfigurationError("--scales scales adapters: it needs --lora PATH")
    if given["real"] is not None and not given["real"].expanduser().is_dir():
        raise ConfigurationError(f"--real {given['real']}: expected a folder of pictures")
    return EvaluationRequest(**given, usual=usual_sampling(given["model"]))


def parse_shard(text: str) -> tuple[int, int]:
    """``2/4``.

    Raises:
        ArgumentTypeError: anything else.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 1 to N, such as 2/4")
    return part, parts
