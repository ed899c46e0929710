"""What the page says, as plain data: the template (``page.html``) sets it into HTML and escapes it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.algorithms.registry import title_of
from nemo_aligner_diffusion.evaluation.metrics.base import Tile
from nemo_aligner_diffusion.evaluation.metrics.registry import metrics
from nemo_aligner_diffusion.evaluation.report.charts import charts
from nemo_aligner_diffusion.evaluation.report.findings import findings, planned_steps
from nemo_aligner_diffusion.evaluation.report.pictures import before_after, over_training
from nemo_aligner_diffusion.evaluation.report.usage import usage
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, last
from nemo_aligner_diffusion.evaluation.text import format_gain, format_number

_SHOWN_ELSEWHERE = {"skipped_steps", "truncated_prompts", "pid", "pipeline"}
_MOST_ROWS = 1000  # of a table


def build_view(run: RunFiles) -> dict[str, Any]:
    """The values of the template: ``sections`` are (anchor, title, what is shown there; nothing where it is empty)."""
    shown_charts = charts(run)
    sections = [
        ("before-after", "Before and after", before_after(run)),
        ("prompts", "Prompt by prompt", _prompts(run)),
        ("curves", "Curves", shown_charts),
        ("over-training", "How the pictures changed", over_training(run)),
        ("use", "Using the result", usage(run)),
        ("settings", "Settings", _settings(run)),
        ("environment", "Environment", _environment(run)),
    ]
    return {
        "name": _name(run),
        "algorithm": _algorithm(run),
        "lead": _lead(run),
        "tiles": _tiles(run),
        "findings": findings(run),  # last: a picture that could not be read is one
        "sections": sections,
    }


def _words(run: RunFiles) -> list[str]:
    """The ``key=value`` words of the command line that began the run."""
    words = run.run.get("command")
    return [str(word).lstrip("+~") for word in words if "=" in str(word)] if isinstance(words, list) else []


def _name(run: RunFiles) -> str:
    """The run's name where somebody chose one: a recipe's own tells nothing once its method has been changed."""
    given = any(word.startswith("name=") for word in _words(run))
    return str(run.setting("name", "")) if given else run.folder.resolve().name


def _algorithm(run: RunFiles) -> str:
    return title_of(str(run.setting("model.algorithm", "Reward tuning")))


def _reward_name(run: RunFiles) -> str:
    name = run.setting("rm.name", "clip")
    path = run.setting("rm.model.restore_from_path")
    if name == "clip":
        return f"the reward model {Path(str(path)).name}" if path else "the embedded CLIP reward"
    if name in ("composite", "ensemble"):
        article, parts = "a" if name == "composite" else "an", run.setting("rm.parts")
        return f"{article} {name} of {', '.join(map(str, parts))}" if isinstance(parts, dict) else f"{article} {name}"
    if name == "classifier":
        return f"the class {run.setting('rm.target_class')} of a classifier"
    if name == "detection":
        action = "the absence of " if run.setting("rm.remove", False) else ""
        return f"{action}{run.setting('rm.query') or 'what the prompt names'}, by a detector"
    if name == "custom":
        return f"the reward {run.setting('rm.import_path')}"
    return f"{name} (an analytic reward)" if name != "feature_symmetry" else "symmetry in a CLIP's features"


def _lead(run: RunFiles) -> str:
    path = run.setting("model.from_pretrained") or run.setting("model.unet_config.from_pretrained")
    model = Path(str(path)).name if path else "the embedded model"
    rank = run.setting("model.peft.lora_tuning.adapter_dim")
    trained = f"a LoRA of rank {rank} of" if rank else "a LoRA of"
    if run.setting("model.peft.peft_scheme", "none") == "none":
        trained = "all denoiser weights of"
    sentence = f"{_algorithm(run)} tuned {trained} {model}, towards {_reward_name(run)}."
    steps, seconds, pictures = _steps(run), _total(run, "seconds"), _total(run, "images")
    if steps:
        made = f" and {pictures:,.0f} generated pictures" if pictures else ""
        sentence += f" {steps:,.0f} optimizer steps{made}{f' in {duration(seconds)}' if seconds else ''}."
    return sentence


def _steps(run: RunFiles) -> float:
    return last(run.metrics.get("step", [])) or 0.0


def _total(run: RunFiles, name: str) -> float:
    """``seconds`` or ``images`` of the whole run."""
    value = run.run.get(name)
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return sum(value for value in run.metrics.get(name, []) if math.isfinite(value))


def duration(seconds: float) -> str:
    """``42 s``, ``4 min 12 s``, ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _tiles(run: RunFiles) -> list[Tile]:
    tiles = [tile for metric in metrics() if (tile := metric.tile(run)) is not None]
    if _steps(run):
        planned, seconds = planned_steps(run), _total(run, "seconds")
        under = [f"of {planned}"] * bool(planned) + [duration(seconds)] * bool(seconds)
        tiles.append(Tile("Optimizer steps", f"{_steps(run):,.0f}", " · ".join(under)))
    return tiles


def _prompts(run: RunFiles) -> dict[str, Any] | None:
    """Rewards of each validation picture, largest gain first, with bars from base to tuned."""
    rows = sorted(run.prompt_rewards, key=lambda row: row["base_reward"] - row["reward"])
    if not rows:
        return None
    values = [row[key] for row in rows for key in ("base_reward", "reward")]
    low, span = min(values), (max(values) - min(values)) or 1.0
    lines = []
    for row in rows[:_MOST_ROWS]:
        base, tuned = row["base_reward"], row["reward"]
        start, end = sorted((100 * (base - low) / span, 100 * (tuned - low) / span))
        lines.append(
            {
                "prompt": row["prompt"],
                "seed": "" if row["seed"] is None else row["seed"],
                "base": format_number(base),
                "tuned": format_number(tuned),
                "gain": format_gain(tuned - base, tuned),
                "kind": "gain" if tuned > base else "loss",
                "direction": "up" if tuned >= base else "down",
                "left": f"{start:.1f}",
                "width": f"{end - start:.1f}",
                "mark": f"{100 * (base - low) / span:.1f}",
            }
        )
    better = sum(row["reward"] > row["base_reward"] for row in rows)
    return {"rows": lines, "count": len(rows), "better": better, "step": run.prompt_rewards_step}


def _settings(run: RunFiles) -> dict[str, Any]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in _flatten(run.config) if run.config else ():
        parts = key.split(".")  # two levels where the first is a large room (model.optim), else one
        room = ".".join(parts[:2]) if parts[0] == "model" and len(parts) > 2 else parts[0] if len(parts) > 1 else "run"
        groups.setdefault(room, []).append((key, value))
    return {"groups": groups, "chosen": {word.partition("=")[0] for word in _words(run)}}


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    facts = {key: value for key, value in run.run.items() if key not in _SHOWN_ELSEWHERE}
    if isinstance(facts.get("command"), list):
        facts["command"] = " ".join(map(str, facts["command"]))
    if "line" in run.startup:
        facts["start"] = run.startup["line"]
    return [(key, value) for key, value in _flatten(facts) if key]


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        yield prefix, text
