"""``test_reward_model.py``: how well a reward predicts preferences. ``--help`` imports no torch."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_aligner_diffusion.command_line import Parser, whole_number
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.runtime.ending import command


@command(interrupted="interrupted; nothing was written")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    arguments = build_parser().parse_args(argv)
    if not arguments.reward.is_file():
        raise ConfigurationError(f"{arguments.reward} does not exist; expected a reward .nemo")
    import torch

    from nemo_aligner_diffusion.reward_training.evaluate import preference_figures, reliability_plot, score_pairs
    from nemo_aligner_diffusion.rewards import restore_reward
    from nemo_aligner_diffusion.runtime.files import write_atomic

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    reward = restore_reward(arguments.reward, device=device, tokenizer=arguments.tokenizer)
    scores, labels = score_pairs(
        reward, arguments.shards, batch_size=arguments.batch_size, on_bad_sample=arguments.on_bad_sample, device=device
    )
    figures = preference_figures(scores, labels, arguments.bins)
    print(f"pairs                       {figures.pairs:,} in {time.perf_counter() - started:.1f} s")
    print(f"ties                        {figures.ties:,}, left out of what follows but the loss")
    print(f"accuracy                    {figures.accuracy:.4f}")
    print(f"mean confidence             {figures.mean_confidence:.4f}")
    print(f"expected calibration error  {figures.calibration_error:.4f} ({arguments.bins} bins)")
    print(f"divergence from the labels  {figures.loss:.4f}")
    if arguments.output is not None:
        summary = {"reward": str(arguments.reward), "shards": list(arguments.shards), **figures.as_dict()}
        write_atomic(arguments.output / "figures.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
        if figures.pairs > figures.ties:
            reliability_plot(arguments.output / "reliability.png", figures)
        print(f"written                     {arguments.output}/figures.json, reliability.png")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        "How well a reward predicts preferences: accuracy, ties, calibration.",
        "example: test_reward_model.py results/reward/export/reward.nemo preferences/validation --output test",
    )
    add = parser.add_argument
    add("reward", type=Path, help="a reward .nemo of any kind")
    add("shards", nargs="+", help="preference shards, folders of them, globs or brace ranges")
    add("--output", type=Path, help="folder for figures.json and reliability.png")
    add("--bins", type=whole_number, default=10, metavar="N", help="of the calibration; default: %(default)s")
    add("--batch-size", type=whole_number, default=32, metavar="N", help="pairs at once; default: %(default)s")
    add("--device", help="such as cpu or cuda; default: a GPU where there is one")
    add("--tokenizer", help="folder with vocab.json and merges.txt, where the .nemo only names its own")
    add("--on-bad-sample", choices=("error", "skip"), default="error", help="default: %(default)s")
    return parser
