"""``nad-plan``: the same words as a training command, and what that training will need.

Imports nothing heavy before the configuration has been read: ``--help`` and a misspelt key take no time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from nemo_aligner_diffusion.cli.train import parse_arguments
from nemo_aligner_diffusion.command_line import Parser
from nemo_aligner_diffusion.diffusion.settings import FAMILIES
from nemo_aligner_diffusion.planner.gpus import GPUS, gpu_named
from nemo_aligner_diffusion.planner.presets import MODELS, REWARDS, model_name, model_spec
from nemo_aligner_diffusion.runtime.ending import command

DESCRIPTION = """\
What a training run will need, before it runs: memory by part and phase, operations, bytes sent, seconds a step on a
named GPU, the layouts that fit, and what makes it fit if it does not. Recipe and overrides are those of
nad-train-draftp; nothing is downloaded or allocated."""
EPILOG = """\
keys that matter most: trainer.devices, trainer.num_nodes, trainer.precision, model.micro_batch_size,
model.global_batch_size, model.tensor_model_parallel_size, model.fsdp, model.activation_checkpointing,
model.decode_micro_batch_size, model.infer.inference_steps, model.infer.height, model.infer.width, peft=none

examples:
  nad-plan --model sd15 --gpu a100-80gb trainer.precision=bf16 model.infer.inference_steps=50
  nad-plan --model sdxl --gpu h100-80gb --layouts trainer.devices=8 model.global_batch_size=64 trainer.precision=bf16
  nad-plan --model sdxl --gpu rtx4090 trainer.precision=bf16 model.peft.lora_tuning.adapter_dim=32
  nad-plan --config-name drtune_sd --gpu cpu --json
Assumptions and what was checked: docs/planner.md"""


def _parser() -> Parser:
    parser = Parser(DESCRIPTION, EPILOG, add_help=False)
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)}, or your model's folder or file; default: the recipe's, "
        "or the embedded model")  # fmt: skip
    add("--reward", choices=(*REWARDS, "recipe"), help="the size of PickScore and HPSv2 is clip-h; recipe: what its rm "
        "section builds; default: clip-h for a named model whose recipe names no reward file")  # fmt: skip
    add("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}, or cpu: this machine's processors and free memory; default: "
        "cpu with trainer.accelerator=cpu, else h100-80gb")  # fmt: skip
    add("--layouts", action="store_true", help="also search every layout of trainer.devices × trainer.num_nodes GPUs "
        "for model.global_batch_size")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    return parser


@command(interrupted="interrupted; a plan writes nothing")
def main(argv: Sequence[str]) -> int:
    """Console command ``nad-plan``."""
    parser = _parser()
    options = parse_arguments("draftp_sd", argv, parser)
    if options.show_help:
        parser.print_help()
        return 0
    gpu = gpu_named(options.gpu or "h100-80gb") if options.gpu != "cpu" else None
    from nemo_aligner_diffusion.config.load import load_settings

    named = [] if options.model is None else _named(options.model)
    run = load_settings(options.config_name, [*named, *options.overrides], config_dir=options.config_path)
    from nemo_aligner_diffusion.embedded_assets import embedded_model_path

    preset = options.model if options.model in MODELS else None
    spec = model_spec(preset or model_name(run.model) or str(embedded_model_path()))
    reward = options.reward or (None if preset else "recipe")  # of one's own files what training will use
    from nemo_aligner_diffusion.planner.answer import as_json, show
    from nemo_aligner_diffusion.planner.plan import make_plan  # torch and all, only now
    from nemo_aligner_diffusion.planner.settings import Settings, settings_from

    if gpu is None or (options.gpu is None and run.trainer.accelerator == "cpu"):
        from nemo_aligner_diffusion.planner.processors import this_machine

        gpu = this_machine()

    def changed(words: Sequence[str]) -> Settings:
        more = load_settings(options.config_name, [*named, *options.overrides, *words], config_dir=options.config_path)
        return settings_from(more, spec, reward, not gpu.is_cpu)

    plan = make_plan(settings_from(run, spec, reward, not gpu.is_cpu), gpu, options.layouts, _say, changed)
    if options.json:
        print(json.dumps(as_json(plan), indent=2))
    else:
        show(plan)
    if plan.error is not None:
        raise plan.error
    return 0


def _named(model: str) -> list[str]:
    """``--model`` in words of the command line; the user's own count more."""
    from nemo_aligner_diffusion.config.words import quoted

    if model in MODELS:
        return [f"family={model}"] if model in FAMILIES else []
    return [f"model.from_pretrained={quoted(model)}"]


def _say(line: str) -> None:
    print(f"measuring: {line}", file=sys.stderr, flush=True)
