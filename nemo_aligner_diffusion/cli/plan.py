"""``nad-plan``: the same words as a training command, and what that training will need.

Imports nothing heavy before the configuration has been read: ``--help`` and a misspelt key take no time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from nemo_aligner_diffusion.command_line import command
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest
from nemo_aligner_diffusion.planner.gpus import GPUS, gpu_named
from nemo_aligner_diffusion.planner.options import Options
from nemo_aligner_diffusion.planner.presets import MODELS, REWARDS, model_spec

HELP = f"""\
usage: nad-plan [--config-name RECIPE] [key=value …] [options]

What a training run will need, before it runs: memory by part and phase, operations, bytes sent, seconds a step on a
named GPU, and the layouts that fit. Recipe and overrides are those of nad-train-draftp; nothing is downloaded or
allocated.

options:
  --model NAME         {", ".join(MODELS)}, or a diffusers folder; default: the recipe's, which is the embedded model
  --reward NAME        {", ".join(REWARDS)} (the size of PickScore and HPSv2), or recipe: what its rm section builds;
                       default: clip-h for a named model whose recipe names no reward file
  --gpu NAME           {", ".join(GPUS)}; default h100-80gb
  --gpus-per-node N    GPUs in a server; default: trainer.devices
  --layouts            also search every layout of trainer.devices × trainer.num_nodes GPUs for model.global_batch_size
  --tensor-sizes N,N   tensor-parallel sizes to search; default 1, 2, 4, 8, up to the first that fits
  --no-sharding        leave FSDP out of the search
  --attention KIND     auto (FlashAttention or memory-efficient), math (holds the scores)
  --json               print JSON
  --help               this

keys that matter most: trainer.devices, trainer.num_nodes, trainer.precision, model.micro_batch_size,
model.global_batch_size, model.tensor_model_parallel_size, model.fsdp, model.activation_checkpointing,
model.decode_micro_batch_size, model.infer.inference_steps, model.infer.height, model.infer.width, peft=none

examples:
  nad-plan --model sd15 --gpu a100-80gb trainer.precision=bf16 model.infer.inference_steps=50
  nad-plan --model sdxl --gpu h100-80gb --layouts trainer.devices=8 model.global_batch_size=64 trainer.precision=bf16
  nad-plan --config-name drtune_sd --json
Assumptions and what was checked: docs/planner.md"""


_FLAGS = ("--layouts", "--no-sharding", "--json")
_WITH_VALUES = ("--model", "--reward", "--gpu", "--gpus-per-node", "--tensor-sizes", "--attention")


def take_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The planner's own options, and the words that are left for the configuration.

    Raises:
        ConfigurationError: an option without its value, with an impossible one, or misspelt.
    """
    options, rest, words = Options(), [], list(argv)
    while words:
        word = words.pop(0)
        name, separator, value = word.partition("=")
        if name in _FLAGS:
            options.layouts |= name == "--layouts"
            options.sharding &= name != "--no-sharding"
            options.json |= name == "--json"
        elif name in _WITH_VALUES:
            if not separator:
                if not words:
                    raise ConfigurationError(f"{name} needs a value")
                value = words.pop(0)
            _set(options, name, value)
        elif name.startswith("-") and (hint := closest(name, (*_FLAGS, *_WITH_VALUES), least=0.75)):
            raise ConfigurationError(f"unknown option {word!r}{hint} nad-plan --help lists all")
        else:
            rest.append(word)
    return options, rest


def _set(options: Options, name: str, value: str) -> None:
    if name in ("--gpus-per-node", "--tensor-sizes"):
        numbers = value.split(",") if name == "--tensor-sizes" else [value]
        if not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
            raise ConfigurationError(f"{name} {value!r}: expected whole numbers of at least 1")
        if name == "--tensor-sizes":
            options.tensor_sizes = tuple(int(number) for number in numbers)
        else:
            options.gpus_per_node = int(value)
        return
    choices = {"--reward": (*REWARDS, "recipe"), "--attention": ("auto", "math")}.get(name)
    if choices is not None and value not in choices:
        raise ConfigurationError(f"{name} {value!r}: expected one of {', '.join(choices)}")
    if name == "--gpu":
        gpu_named(value)
    setattr(options, name.strip("-"), value)


@command(interrupted="interrupted; a plan writes nothing")
def main(argv: Sequence[str]) -> int:
    """Console command ``nad-plan``."""
    if any(word in ("--help", "-h") for word in argv):
        print(HELP)
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

    plan = make_plan(run, spec, options, lambda line: print(f"measuring: {line}", file=sys.stderr, flush=True))
    if options.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        show(plan)
    if plan.error is not None:
        raise plan.error
    return 0
