"""Did tuning on a learnt reward move pictures by the rule that the reward learnt? Base against tuned, same noise.

The rule itself is measured, not the reward that learnt it; and by the original embedded CLIP, which had no part in it,
whether one can still tell what the pictures show.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.cli.make_rule_preferences import RULE_NAMES
from nemo_aligner_diffusion.command_line import command

SHOWN = 8  # columns of the grid


@command(interrupted="interrupted")
def main(argv: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    arguments = build_parser().parse_args(argv)
    figures = judge(arguments.rule, arguments.lora, arguments.output, arguments.seeds)
    base, tuned = figures["base"], figures["tuned"]
    print(f"{'':<42}{'base':>10}{'tuned':>10}")
    for name in base:
        print(f"{name:<42}{base[name]:>10.4g}{tuned[name]:>10.4g}")
    print(f"{figures['moved']:.0%} of {figures['pictures']} pictures have more {arguments.rule} than before")
    return 0


def judge(rule: str, lora: Path, output: Path, seeds: int = 2) -> dict[str, Any]:
    """Write ``figures.json`` and ``pictures.png`` into ``output`` and return the figures.

    Pictures are those of the embedded validation prompts, sampled as the shipped recipes sample.

    Args:
        lora: export folder of a run on the embedded model, or its ``.safetensors`` file.
        seeds: pictures of each prompt.
    """
    import torch

    from nemo_aligner_diffusion.data.prompts import read_prompts
    from nemo_aligner_diffusion.diffusion.generate import generate
    from nemo_aligner_diffusion.diffusion.loading import load_model
    from nemo_aligner_diffusion.diffusion.lora import load_lora_weights
    from nemo_aligner_diffusion.diffusion.settings import SamplingSettings
    from nemo_aligner_diffusion.embedded_assets import embedded_model_path, embedded_prompts_path, embedded_reward_path
    from nemo_aligner_diffusion.evaluation.diversity import recognisability
    from nemo_aligner_diffusion.evaluation.figures import picture_grid, save_image
    from nemo_aligner_diffusion.reward_training.rules import RULES
    from nemo_aligner_diffusion.rewards import restore_reward
    from nemo_aligner_diffusion.runtime.files import write_atomic
    from nemo_aligner_diffusion.training.build import build_sampling

    sampling = build_sampling(SamplingSettings())
    prompts = read_prompts(str(embedded_prompts_path("validation")))
    names = [prompt for prompt in prompts for _ in range(seeds)]
    numbers = [100 + seed for _ in prompts for seed in range(seeds)]
    model = load_model(embedded_model_path())
    clip: Any = restore_reward(embedded_reward_path())
    candidates = read_prompts(str(embedded_prompts_path("train")))
    values, pictures, figures = [], [], dict[str, Any]()
    for which in ("base", "tuned"):
        if which == "tuned":
            load_lora_weights(model.denoiser, lora, "judged")
        images = generate(model, names, numbers, sampling)
        found = recognisability(clip, images, names, candidates)
        with torch.no_grad():
            fit = float(clip(images, names).mean())
        values.append(RULES[rule](images))
        pictures.append(images)
        figures[which] = {
            rule: float(values[-1].mean()),
            "original CLIP: finds the prompt first": found.top1,
            "original CLIP: mean reciprocal rank": found.mean_reciprocal_rank,
            "original CLIP: mean score": fit,
        }
    figures["moved"] = float((values[1] > values[0]).double().mean())
    figures["pictures"] = len(names)
    rows = list(range(0, len(names), seeds))[:SHOWN]
    grid = picture_grid(
        {"base": pictures[0][rows], "tuned": pictures[1][rows]},
        [names[row] for row in rows],
        rewards={"base": values[0][rows].tolist(), "tuned": values[1][rows].tolist()},
        title=f"{rule}: base above, tuned on the learnt reward below",
    )
    save_image(grid, output / "pictures.png")
    write_atomic(output / "figures.json", json.dumps(figures, indent=1) + "\n")
    return figures


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="judge_rule.py",
        description="Did tuning on a learnt reward move the embedded model's pictures by the rule that it learnt?",
        epilog="example: judge_rule.py colourfulness results/colourful/export --output results/judged",
    )
    parser.add_argument("rule", choices=RULE_NAMES, help="what is measured")
    parser.add_argument("lora", type=Path, help="export folder of a run on the embedded model, or its .safetensors")
    parser.add_argument("--output", type=Path, default=Path("judged"), help="folder; default: %(default)s")
    parser.add_argument(
        "--seeds", type=int, default=2, metavar="N", help="pictures of each prompt; default: %(default)s"
    )
    return parser
