"""What the page says, as plain data: the template (``page.html``) sets it into HTML and escapes it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.algorithms.registry import methods, title_of
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.metrics.base import Finding, Tile, metrics
from nemo_aligner_diffusion.evaluation.report.charts import charts
from nemo_aligner_diffusion.evaluation.report.pictures import before_after, over_training
from nemo_aligner_diffusion.evaluation.report.usage import usage
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, column, finite
from nemo_aligner_diffusion.keys import flatten
from nemo_aligner_diffusion.rewards.registry import read_reward

_SHOWN_ELSEWHERE = {"skipped_steps", "truncated_prompts", "pid", "pipeline"}
_MOST_ROWS = 1000  # of a table


def build_view(run: RunFiles) -> dict[str, Any]:
    """The values of the template: ``sections`` are (anchor, title, what is shown there; nothing where it is empty)."""
    sections = [
        ("before-after", "Before and after", before_after(run)),
        ("prompts", "Prompt by prompt", _prompts(run)),
        ("curves", "Curves", charts(run)),
        ("over-training", "How the pictures changed", over_training(run)),
        ("use", "Using the result", usage(run)),
        ("settings", "Settings", _settings(run)),
        ("environment", "Environment", _environment(run)),
    ]
    algorithm = title_of(str(run.setting("model.algorithm", "Reward tuning")))
    return {
        "name": _name(run),
        "algorithm": algorithm,
        "lead": f"{algorithm} {_lead(run)}",
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


def _reward_name(run: RunFiles) -> str:
    try:
        return read_reward(run.setting("rm"))[0].describe()
    except ConfigurationError:  # of another version of this project, or damaged
        return f"the reward {run.setting('rm.name', '')}"


def _lead(run: RunFiles) -> str:
    path = run.setting("model.from_pretrained") or run.setting("model.unet_config.from_pretrained")
    model = Path(str(path)).name if path else "the embedded model"
    rank = run.setting("model.peft.lora_tuning.adapter_dim")
    trained = f"a LoRA of rank {rank} of" if rank else "a LoRA of"
    if run.setting("model.peft.peft_scheme", "none") == "none":
        trained = "all denoiser weights of"
    method = methods().get(str(run.setting("model.algorithm")))
    if method is not None and method.data == "pairs":
        sentence = f"tuned {trained} {model} on preferences between pictures; {_reward_name(run)} watches."
    else:
        sentence = f"tuned {trained} {model}, towards {_reward_name(run)}."
    seconds, pictures, pairs = (run.total(name) for name in ("seconds", "images", "pairs"))
    if run.steps:
        made = f" and {pictures:,.0f} generated pictures" if pictures else f" and {pairs:,.0f} pairs" if pairs else ""
        sentence += (
            f" {run.steps:,.0f} optimizer steps{made}{f' in {timedelta(seconds=round(seconds))}' if seconds else ''}."
        )
    return sentence


def _tiles(run: RunFiles) -> list[Tile]:
    tiles = [tile for metric in metrics() if (tile := metric.tile(run)) is not None]
    if run.steps:
        planned, seconds = _planned_steps(run), run.total("seconds")
        under = [f"of {planned}"] * bool(planned) + [str(timedelta(seconds=round(seconds)))] * bool(seconds)
        tiles.append(Tile("Optimizer steps", f"{run.steps:,.0f}", " · ".join(under)))
    return tiles


def _planned_steps(run: RunFiles) -> int | None:
    """``max_steps`` of the configuration (any ``trainer.*`` section), None where the run is bounded otherwise."""
    trainer = run.config.get("trainer")
    sections = [trainer, *trainer.values()] if isinstance(trainer, dict) else []
    given = [section.get("max_steps") for section in sections if isinstance(section, dict)]
    return min((limit for limit in given if isinstance(limit, int) and limit > 0), default=None)


def findings(run: RunFiles) -> list[Finding]:
    """What a reader should be told without having to find it: warnings first. Every rule is stated in its text."""
    found = [
        *_state(run),
        *[finding for metric in metrics() for finding in metric.findings(run)],
        *[Finding("warning", "A file of the run is damaged", problem) for problem in run.problems],
    ]
    return sorted(found, key=lambda finding: finding.level != "warning")


def _state(run: RunFiles) -> list[Finding]:
    found = []
    status, planned = run.run.get("status"), _planned_steps(run)
    done = f"step {run.steps:.0f}{f' of {planned}' if planned else ''}"
    if status in ("interrupted", "failed"):
        title = "This run was interrupted" if status == "interrupted" else "This run failed"
        text = f"The page shows what was done until {done}. {run.run.get('error') or ''}"
        found.append(Finding("warning", title, text.rstrip()))
    elif status == "running" and planned and run.steps < planned:
        text = "It was still going when this page was written, or was killed without a chance to say so."
        found.append(Finding("note", done.capitalize(), text))
    if not (column(run.metrics, "reward") or column(run.metrics, "loss")):
        text = "metrics.csv has no row: there are no curves to show."
        found.append(Finding("warning", "No optimizer step yet", text))
    if skipped := finite(run.run.get("skipped_steps")):
        text = "A reward or gradient was NaN or infinite there; the weights were left as they were."
        title = f"{skipped:.0f} optimizer step{'s' if skipped != 1 else ''} skipped"
        found.append(Finding("warning", title, text))
    if truncated := finite(run.run.get("truncated_prompts")):
        text = "They are longer than the text encoder's limit; what lies beyond it has no effect on the picture."
        found.append(Finding("note", f"{truncated:.0f} prompt{'s were' if truncated != 1 else ' was'} cut", text))
    return found


def _prompts(run: RunFiles) -> dict[str, Any] | None:
    """Rewards of each validation picture, largest gain first, with bars from base to tuned."""
    rows = sorted(run.prompt_rewards, key=lambda row: row["base_reward"] - row["reward"])
    if not rows:
        return None
    values = [row[key] for row in rows for key in ("base_reward", "reward")]
    low, span = min(values), (max(values) - min(values)) or 1.0
    lines = []
    for row in rows[:_MOST_ROWS]:
        mark, end = (100 * (row[key] - low) / span for key in ("base_reward", "reward"))
        lines.append({**row, "mark": mark, "left": min(mark, end), "width": abs(end - mark)})
    better = sum(row["reward"] > row["base_reward"] for row in rows)
    return {"rows": lines, "count": len(rows), "better": better, "step": run.prompt_rewards_step}


def _settings(run: RunFiles) -> dict[str, Any]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in _leaves(run.config):
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
    return _leaves(facts)


def _leaves(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """Dotted keys and their values, written as in YAML."""

    def written(value: Any) -> str:
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    return [(key, written(value)) for key, value in flatten(tree, dotted=True).items()]
