"""``nad-plan``: the same words as a training command, and what that training will need.

Imports nothing heavy before the configuration has been read: ``--help`` and a misspelt key take no time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from nemo_aligner_diffusion.command_line import command
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest
from nemo_aligner_diffusion.planner.gpus import GPUS, gpu_named
from nemo_aligner_diffusion.planner.presets import MODELS, REWARDS, model_spec

DESCRIPTION = """\
What a training run will need, before it runs: memory by part and phase, operations, bytes sent, seconds a step on a
named GPU, and the layouts that fit. Recipe and overrides are those of nad-train-draftp; nothing is downloaded or
allocated."""
EPILOG = """\
keys that matter most: trainer.devices, trainer.num_nodes, trainer.precision, model.micro_batch_size,
model.global_batch_size, model.tensor_model_parallel_size, model.fsdp, model.activation_checkpointing,
model.decode_micro_batch_size, model.infer.inference_steps, model.infer.height, model.infer.width, peft=none

examples:
  nad-plan --model sd15 --gpu a100-80gb trainer.precision=bf16 model.infer.inference_steps=50
  nad-plan --model sdxl --gpu h100-80gb --layouts trainer.devices=8 model.global_batch_size=64 trainer.precision=bf16
  nad-plan --config-name drtune_sd --json
Assumptions and what was checked: docs/planner.md"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; nad-plan --help lists all options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "nad-plan",
        usage="nad-plan [--config-name RECIPE] [key=value …] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)}, or a diffusers folder; default: the recipe's, which is "
        "the embedded model")  # fmt: skip
    add("--reward", choices=(*REWARDS, "recipe"), help="the size of PickScore and HPSv2 is clip-h; recipe: what its rm "
        "section builds; default: clip-h for a named model whose recipe names no reward file")  # fmt: skip
    add("--gpu", metavar="NAME", default="h100-80gb", help=f"{', '.join(GPUS)}; default %(default)s")
    add("--layouts", action="store_true", help="also search every layout of trainer.devices × trainer.num_nodes GPUs "
        "for model.global_batch_size")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    return parser


def take_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The planner's own options, and the words that are left for the configuration.

    Raises:
        ConfigurationError: an option without its value, with an impossible one, or misspelt.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    options.gpu = gpu_named(options.gpu)
    known = set(re.findall(r"--[a-z-]+", parser.format_help()))
    for word in rest:
        if word not in known and word.startswith("-") and (hint := closest(word, known, least=0.75)):
            raise ConfigurationError(f"unknown option {word!r}{hint} nad-plan --help lists all")
    return options, rest


@command(interrupted="interrupted; a plan writes nothing")
def main(argv: Sequence[str]) -> int:
    """Console command ``nad-plan``."""
    if any(word in ("--help", "-h") for word in argv):
        _parser().print_help()
        return 0
    options, words = take_options(argv)
    from nemo_aligner_diffusion.cli.train import parse_arguments
    from nemo_aligner_diffusion.config.load import load_settings

    arguments = parse_arguments("draftp_sd", words)
    run = load_settings(arguments.config_name, arguments.overrides, config_dir=arguments.config_path)
    from nemo_aligner_diffusion.embedded_assets import embedded_model_path

    spec = model_spec(options.model or run.model.from_pretrained or str(embedded_model_path()))
    from nemo_aligner_diffusion.planner.answer import as_json, show
    from nemo_aligner_diffusion.planner.plan import make_plan  # torch and all, only now
    from nemo_aligner_diffusion.planner.settings import settings_from

    settings = settings_from(run, spec, options.reward)
    plan = make_plan(settings, options.gpu, options.layouts, _say)
    if options.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        show(plan)
    if plan.error is not None:
        raise plan.error
    return 0


def _say(line: str) -> None:
    print(f"measuring: {line}", file=sys.stderr, flush=True)
