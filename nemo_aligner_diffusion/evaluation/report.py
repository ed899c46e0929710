"""``report.html``: one self-contained page about a run, made from the files of its run directory alone.

Read are ``config.yaml``, ``metrics.csv``, ``validation.csv``, ``samples/step_*.png``, ``export/``, and where present

- ``run.json``: any of ``status`` (``finished``, ``interrupted``, ``failed``, ``running``), ``error``, ``seconds``,
  ``images``, ``skipped_steps``, ``truncated_prompts``, ``command`` (a list; its ``key=value`` words are shown as
  chosen by the user); everything else in it is shown as environment;
- ``validation_samples.json``: ``{"step": n, "prompts": [{"prompt", "seed", "base_reward", "reward"}, …]}``.

Of these any may be missing: a run stopped after its first step has a report too.

Example::

    python -m nemo_aligner_diffusion.evaluation.report results/my_run
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.algorithms.registry import title_of
from nemo_aligner_diffusion.command_line import command
from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.evaluation.figures import format_gain, format_number
from nemo_aligner_diffusion.evaluation.findings import diversity_kept, findings, planned_steps
from nemo_aligner_diffusion.evaluation.report_charts import charts
from nemo_aligner_diffusion.evaluation.report_page import SCRIPT, STYLE
from nemo_aligner_diffusion.evaluation.report_pictures import before_after, over_training
from nemo_aligner_diffusion.evaluation.report_usage import usage
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, column, last, read_run
from nemo_aligner_diffusion.runtime.files import write_atomic

_TOLD_ELSEWHERE = {"skipped_steps", "truncated_prompts", "pid", "pipeline"}


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into the run directory and return its path.

    Raises:
        OutputError: the directory does not exist or cannot be written to.
    """
    try:
        run = read_run(run_dir)
    except FileNotFoundError as error:
        raise OutputError(str(error)) from error
    return write_atomic(Path(run_dir) / "report.html", render_report(run))


def render_report(run: RunFiles) -> str:
    """The page as text; needs nothing but what ``run`` holds and the pictures it points to."""
    main_charts, more_charts = charts(run)
    training = over_training(run)
    sections = [
        ("before-after", "Before and after", before_after(run)),
        ("prompts", "Prompt by prompt", _prompts(run)),
        ("curves", "Curves", _chart_section(main_charts, more_charts)),
        ("over-training", "How the pictures changed", training),
        ("use", "Using the result", usage(run)),
        ("settings", "Settings", _settings(run)),
        ("environment", "Environment", _environment(run)),
    ]
    shown = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in shown)
    body = "".join(f'<section id="{anchor}"><h2>{title}</h2>{content}</section>' for anchor, title, content in shown)
    title = f"{_algorithm(run)}: {run.setting('name', run.folder.resolve().name)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing may be loaded from anywhere: the page is complete, and prompts are other people's text.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header>{_headline(run)}<nav>{links}</nav></header><main>{_tiles(run)}{_findings(run)}{body}</main>"
        "<footer>Written by nemo_aligner_diffusion from the files of the run directory; nothing is loaded from "
        f"elsewhere.</footer><script>{SCRIPT}</script></body></html>\n"
    )


def _algorithm(run: RunFiles) -> str:
    return title_of(str(run.setting("model.algorithm", "Reward tuning")))


def _reward_name(run: RunFiles) -> str:
    name = run.setting("rm.name", "clip")
    path = run.setting("rm.model.restore_from_path")
    if name == "clip":
        return f"the reward model {Path(str(path)).name}" if path else "the embedded CLIP reward"
    if name in ("composite", "ensemble"):
        article, parts = "a" if name == "composite" else "an", run.setting("rm.parts", {})
        return f"{article} {name} of {', '.join(map(str, parts))}" if parts else f"{article} {name} reward"
    if name == "classifier":
        return f"the class {run.setting('rm.target_class')} of a classifier"
    if name == "detection":
        action = "the absence of " if run.setting("rm.remove", False) else ""
        return f"{action}{run.setting('rm.query') or 'what the prompt names'}, by a detector"
    if name == "custom":
        return f"the reward {run.setting('rm.import_path')}"
    return f"{name} (an analytic reward)" if name != "feature_symmetry" else "symmetry in a CLIP's features"


def _model_name(run: RunFiles) -> str:
    path = run.setting("model.from_pretrained") or run.setting("model.unet_config.from_pretrained")
    return Path(str(path)).name if path else "the embedded model"


def _trained(run: RunFiles) -> str:
    if run.setting("model.peft.peft_scheme", "none") in ("none", None):
        return "all weights of the denoiser"
    rank = run.setting("model.peft.lora_tuning.adapter_dim")
    return f"a LoRA of rank {rank}" if rank else "a LoRA"


def _headline(run: RunFiles) -> str:
    steps, seconds = _steps(run), _seconds(run)
    lead = f"{_trained(run)} of {_model_name(run)}, towards {_reward_name(run)}".replace(
        "all weights of the denoiser of", "all denoiser weights of"
    )
    sentence = f"{_algorithm(run)} tuned {lead}."
    if steps:
        pictures = _pictures(run)
        made = f" and {pictures:,.0f} generated pictures" if pictures else ""
        took = f" in {duration(seconds)}" if seconds else ""
        sentence += f" {steps:,.0f} optimizer steps{made}{took}."
    return (
        f"<h1>{escape(str(run.setting('name', run.folder.resolve().name)))} "
        f'<span class="quiet">· {escape(_algorithm(run))}</span></h1><p class="lead">{escape(sentence)}</p>'
    )


def _steps(run: RunFiles) -> float:
    return last(run.metrics.get("step", [])) or 0.0


def _seconds(run: RunFiles) -> float:
    value = run.run.get("seconds")
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return sum(value for value in run.metrics.get("seconds", []) if math.isfinite(value))


def _pictures(run: RunFiles) -> float:
    value = run.run.get("images")
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return sum(value for value in run.metrics.get("images", []) if math.isfinite(value))


def duration(seconds: float) -> str:
    """``42 s``, ``4 min 12 s``, ``3 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _tiles(run: RunFiles) -> str:
    tiles: list[tuple[str, str, str]] = []  # label, value (HTML), under
    tuned, base = last(column(run.validation, "reward")), last(column(run.validation, "base_reward"))
    if tuned is not None and base is not None:
        kind = "gain" if tuned > base else "loss" if tuned < base else "quiet"
        under = f'<span class="{kind}">{format_gain(tuned - base, tuned)}</span> on fixed prompts and seeds'
        tiles.append(("Validation reward", f"{format_number(base)} → {format_number(tuned)}", under))
    rewards = [value for value in column(run.metrics, "reward") if math.isfinite(value)]
    if rewards:
        window = max(1, min(10, len(rewards) // 4))
        before, after = sum(rewards[:window]) / window, sum(rewards[-window:]) / window
        under = f"first and last {window} steps" if window > 1 else "first and last step"
        tiles.append(("Training reward", f"{format_number(before)} → {format_number(after)}", under))
    share = _share_improved(run)
    if share:
        tiles.append(("Tuned beats base on", f"{share[0]:.0%}", share[1]))
    kept = diversity_kept(run)
    if kept is not None:
        tiles.append(("Diversity kept", f"{kept:.0%}", "distance between seeds, tuned / base"))
    kl = last(column(run.metrics, "kl_penalty"))
    if kl:  # 0 throughout without the penalty: then it was not measured
        tiles.append(("KL penalty", format_number(kl), f"last step, coefficient {_text(run, 'model.kl_coeff')}"))
    if _steps(run):
        of = f"of {planned_steps(run)}" if planned_steps(run) else ""
        seconds = _seconds(run)
        under = " · ".join(part for part in (of, duration(seconds) if seconds else "") if part)
        tiles.append(("Optimizer steps", f"{_steps(run):,.0f}", under))
    memory = [value for value in column(run.metrics, "peak_memory_bytes") if math.isfinite(value)]
    if memory:
        tiles.append(("Peak memory", f"{max(memory) / 2**30:.2f} GiB", ""))
    cells = "".join(
        f'<div class="tile"><span class="label">{label}</span><b>{value}</b><span class="under">{under}</span></div>'
        for label, value, under in tiles
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _text(run: RunFiles, key: str) -> str:
    return escape(str(run.setting(key, "–")))


def _share_improved(run: RunFiles) -> tuple[float, str] | None:
    rows = run.prompt_rewards
    if rows:
        better = sum(row["reward"] > row["base_reward"] for row in rows)
        under = f"{better} of {len(rows)} validation pictures"
        gains: dict[str, list[float]] = {}
        for row in rows:
            gains.setdefault(row["prompt"], []).append(row["reward"] - row["base_reward"])
        if len(gains) < len(rows):  # several seeds a prompt
            under += f"; {sum(sum(gain) > 0 for gain in gains.values())} of {len(gains)} prompts on average"
        return better / len(rows), under
    value = last(column(run.validation, "share_improved"))
    return None if value is None else (value, "of the validation pictures")


def _findings(run: RunFiles) -> str:
    items = [f'<li class="{item.level}"><b>{escape(item.title)}</b>{escape(item.text)}</li>' for item in findings(run)]
    return f'<ul class="findings">{"".join(items)}</ul>' if items else ""


def _chart_section(main: Sequence[str], more: Sequence[str]) -> str:
    body = f'<div class="charts">{"".join(main)}</div>' if main else '<p class="quiet">No rows yet.</p>'
    if more:
        body += f'<details><summary>Speed, memory and more</summary><div class="charts">{"".join(more)}</div></details>'
    return body


def _prompts(run: RunFiles) -> str:
    """Rewards of each validation picture, largest gain first, as a table with bars from base to tuned."""
    rows = sorted(run.prompt_rewards, key=lambda row: row["base_reward"] - row["reward"])
    if not rows:
        return ""
    values = [row[key] for row in rows for key in ("base_reward", "reward")]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def percent(value: float) -> float:
        return 100 * (value - low) / span

    lines = []
    for row in rows:
        base, tuned = row["base_reward"], row["reward"]
        left, width = percent(min(base, tuned)), percent(max(base, tuned)) - percent(min(base, tuned))
        kind = "gain" if tuned > base else "loss"
        direction = "up" if tuned >= base else "down"
        bar = (
            f'<span class="bar"><i class="{direction}" style="left:{left:.1f}%;width:{width:.1f}%"></i>'
            f'<u style="left:calc({percent(base):.1f}% - 1px)"></u></span>'
        )
        seed = "" if row["seed"] is None else escape(str(row["seed"]))
        lines.append(
            f'<tr><td>{escape(row["prompt"])}</td><td class="number">{seed}</td>'
            f'<td class="number">{format_number(base)}</td><td class="number">{format_number(tuned)}</td>'
            f'<td class="number {kind}">{format_gain(tuned - base, tuned)}</td><td>{bar}</td></tr>'
        )
    table = (
        '<div class="scroll"><table><thead><tr><th>prompt</th><th class="number">seed</th><th class="number">base</th>'
        '<th class="number">tuned</th><th class="number">gain</th><th>base (mark) to tuned</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
    step = "" if run.prompt_rewards_step is None else f" at step {run.prompt_rewards_step}"
    better = sum(row["reward"] > row["base_reward"] for row in rows)
    told = (
        f'<p class="quiet">Validation{step}: {better} of {len(rows)} pictures score higher than the base model\'s.</p>'
    )
    if len(rows) <= 12:
        return told + table
    return f"{told}<details><summary>All {len(rows)} pictures, largest gain first</summary>{table}</details>"


def _settings(run: RunFiles) -> str:
    if not run.config:
        return '<p class="quiet">config.yaml is missing.</p>'
    words = run.run.get("command")
    words = words if isinstance(words, list) else []
    chosen = {str(word).lstrip("+~").partition("=")[0] for word in words if "=" in str(word)}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in _flatten(run.config):
        groups.setdefault(_group(key), []).append((key, value))
    tables = []
    for group, rows in groups.items():
        lines = "".join(
            f'<tr><td><code class="{"chosen" if key in chosen else ""}">{escape(key)}</code></td>'
            f"<td><code>{escape(value)}</code></td></tr>"
            for key, value in rows
        )
        tables.append(f"<details><summary>{escape(group)}</summary><table><tbody>{lines}</tbody></table></details>")
    hint = " Keys given on the command line are coloured." if chosen else ""
    return (
        f'<p class="hint">The resolved configuration, as in config.yaml.{hint}</p><div class="toolbar">'
        '<input type="search" id="settings-search" placeholder="Search keys and values" aria-label="Search settings">'
        "</div>"
        f"{''.join(tables)}"
    )


def _group(key: str) -> str:
    """Two levels where the first is a large room (``model.optim``), else one."""
    parts = key.split(".")
    if parts[0] == "model" and len(parts) > 2:
        return ".".join(parts[:2])
    return parts[0] if len(parts) > 1 else "run"


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _environment(run: RunFiles) -> str:
    facts = {key: value for key, value in run.run.items() if key not in _TOLD_ELSEWHERE}
    if isinstance(facts.get("command"), list):
        facts["command"] = " ".join(map(str, facts["command"]))
    if "line" in run.startup:
        facts["start"] = run.startup["line"]
    lines = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td><code>{escape(value)}</code></td></tr>"
        for key, value in _flatten(facts)
        if key
    )
    return f"<details><summary>Where and with what it ran</summary><table>{lines}</table></details>" if lines else ""


@command(interrupted="interrupted")
def main(argv: Sequence[str]) -> int:
    """``python -m nemo_aligner_diffusion.evaluation.report RUN_DIRECTORY …``: write the report of each again."""
    arguments = list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m nemo_aligner_diffusion.evaluation.report RUN_DIRECTORY [RUN_DIRECTORY …]")
        return 0 if arguments else 2
    for folder in arguments:
        print(write_report(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
