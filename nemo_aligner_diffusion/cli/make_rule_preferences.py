"""``make_rule_preferences.py``: preference shards by a rule, from pictures of the embedded model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_aligner_diffusion.command_line import command

RULE_NAMES = ("colourfulness", "symmetry")  # of rules.py, which imports torch


@command(interrupted="interrupted; shards under their names are complete")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    arguments = build_parser().parse_args(argv)
    started = time.perf_counter()
    from nemo_aligner_diffusion.reward_training.rule_preferences import make_rule_preferences
    from nemo_aligner_diffusion.reward_training.rules import TIE_MARGINS

    margin = TIE_MARGINS[arguments.rule] if arguments.tie_margin is None else arguments.tie_margin
    made = make_rule_preferences(
        arguments.output,
        arguments.rule,
        margin,
        prompt_count=arguments.prompts,
        seeds_per_prompt=arguments.seeds_per_prompt,
        held_out=arguments.held_out,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
        progress=_Progress(),
    )
    pairs = made.train.samples + made.validation.samples
    for name, written, prompts in (
        ("training", made.train, made.prompts[0]),
        ("held out", made.validation, made.prompts[1]),
    ):
        print(f"{name:<9} {written.samples:,} pairs of {prompts} prompts in {written.paths[0].parent}")
    print(f"ties      {made.ties:,} of {pairs:,} (less than {margin:g} apart in {arguments.rule})")
    print(f"took      {time.perf_counter() - started:.0f} s")
    return 0


class _Progress:
    """A line every ten seconds."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self.last >= 10:
            self.last = now
            left = (now - self.started) / done * (total - done)
            print(f"{done} of {total} pictures, {left:.0f} s left", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_rule_preferences.py",
        description="Pictures of the embedded model in pairs, labelled by a rule: data to try reward training on.",
        epilog="example: make_rule_preferences.py colourfulness preferences/",
    )
    parser.add_argument("rule", choices=RULE_NAMES, help="what decides which picture is preferred")
    parser.add_argument("output", type=Path, help="folder; train/ and validation/ are made in it")
    parser.add_argument(
        "--tie-margin", type=_not_negative, metavar="X", help="smaller differences in the rule's units are ties"
    )
    parser.add_argument("--prompts", type=int, metavar="N", help="use N of the embedded prompts (default: %(default)s)",
                        default=160)  # fmt: skip
    parser.add_argument("--seeds-per-prompt", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--held-out", type=float, default=0.2, metavar="SHARE", help="of the prompts; default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="sampling steps; default: %(default)s")
    parser.add_argument(
        "--guidance", type=_not_negative, default=1.0, metavar="G", help="guidance scale; default: %(default)s (none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and the pictures; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier shards there")
    return parser


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 0")
    return value
