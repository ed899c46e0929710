"""``make_rule_preferences.py`` and ``judge_rule.py``: preferences by a rule, and what became of it in the end.

The one makes preference shards from pictures of the embedded model. The other asks whether tuning on a reward that
learnt the rule moved pictures by it: base against tuned, same noise. The rule itself is measured, not the reward; and
the original embedded CLIP, which had no part in it, says whether one can still tell what the pictures show.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.cli.generate import read_request
from nemo_aligner_diffusion.command_line import Parser, finite_number, whole_number
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.ending import command

RULE_NAMES = ("colourfulness", "symmetry")  # rewards that see a picture alone, and need no file


@command(interrupted="interrupted; shards under their names are complete")
def make_main(argv: Sequence[str]) -> int:
    """``make_rule_preferences.py``; returns the exit status."""
    arguments = make_parser().parse_args(argv)
    if min(arguments.prompts, arguments.seeds_per_prompt) < 2:
        raise ConfigurationError("--prompts and --seeds-per-prompt: expected at least 2, as pairs are of two pictures")
    started = time.perf_counter()
    from nemo_aligner_diffusion.algorithms.preference.self_made import make_rule_preferences

    for name, written in zip(("training", "held out"), make_rule_preferences(**vars(arguments)), strict=True):
        print(f"{name:<9} {written.samples:,} pairs in {written.paths[0].parent}")
    print(f"took      {time.perf_counter() - started:.0f} s")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Pictures of the embedded model in pairs, labelled by a rule: data to try reward training on.",
        "example: make_rule_preferences.py colourfulness preferences/",
    )
    add = parser.add_argument
    add("rule", help=f"what decides which is preferred: {', '.join(RULE_NAMES)}, or a reward without files, as clip")
    add("output", type=Path, help="folder; train/ and validation/ are made in it")
    add("--prompts", type=whole_number, metavar="N", default=160, help="of the embedded ones; default: %(default)s")
    add("--seeds-per-prompt", type=whole_number, default=4, metavar="N", help="default: %(default)s")
    add("--steps", type=whole_number, default=10, metavar="N", help="sampling steps; default: %(default)s")
    add("--seed", type=int, default=0, help="of the split and the pictures; default: %(default)s")
    add("--label-noise", type=_share, default=0.0, metavar="P", help="share of labels turned round; default: 0")
    add("--overwrite", action="store_true", help="replace earlier shards there")
    return parser


def _share(text: str) -> float:
    value = finite_number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share from 0 to 1")
    return value


@command(interrupted="interrupted; the pictures written so far are complete")
def judge_main(argv: Sequence[str]) -> int:
    """``judge_rule.py``: pictures of the embedded validation prompts; returns the exit status."""
    arguments = judge_parser().parse_args(argv)
    from nemo_aligner_diffusion.config.families import sampling_of
    from nemo_aligner_diffusion.data.prompts import read_prompts
    from nemo_aligner_diffusion.embedded_assets import embedded_prompts_path, embedded_reward_path
    from nemo_aligner_diffusion.evaluation.diversity import recognisability
    from nemo_aligner_diffusion.evaluation.generation import run_generation
    from nemo_aligner_diffusion.rewards import restore_reward

    prompts = read_prompts(str(embedded_prompts_path("validation")))
    usual = sampling_of("embedded")  # whatever the run sampled with
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    words += ["--compare", f"--lora={arguments.lora}", f"--output={arguments.output}", "--overwrite"]
    words += [f"--seeds=100-{99 + arguments.seeds}", f"--steps={usual.inference_steps}"]
    words += [f"--guidance={usual.unconditional_guidance_scale}"]
    words += [f"--reward={arguments.rule}"]
    result = run_generation(read_request(words))
    names = [prompt for prompt in prompts for _ in range(arguments.seeds)]
    candidates = read_prompts(str(embedded_prompts_path("train")))
    clip: Any = restore_reward(embedded_reward_path())
    for label, images in result.images.items():
        found = recognisability(clip, images, names, candidates)
        score = float(clip(images, names).detach().mean())
        print(
            f"original CLIP, {label}: finds the prompt first {found.top1:.3f}, mean reciprocal rank "
            f"{found.mean_reciprocal_rank:.3f}, mean score {score:.2f}"
        )
    return 0


def judge_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "Did tuning on a learnt reward move the embedded model's pictures by the rule that it learnt?",
        "example: judge_rule.py colourfulness results/colourful/export --output results/judged",
    )
    add = parser.add_argument
    add("rule", choices=RULE_NAMES, help="what is measured")
    add("lora", type=Path, help="export folder of a run on the embedded model, or its .safetensors")
    add("--output", type=Path, default=Path("judged"), help="folder of the pictures; default: %(default)s")
    add("--seeds", type=whole_number, default=2, metavar="N", help="pictures of each prompt; default: %(default)s")
    return parser
