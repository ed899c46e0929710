"""What a reader of a run should be told without having to find it in the curves: the run's state, and each metric's."""

from __future__ import annotations

from nemo_aligner_diffusion.evaluation.metrics.base import Finding
from nemo_aligner_diffusion.evaluation.metrics.registry import metrics
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, column, last


def findings(run: RunFiles) -> list[Finding]:
    """Warnings first. Every rule is stated in its text, so that a reader can judge it."""
    found = [
        *_state(run),
        *[finding for metric in metrics() for finding in metric.findings(run)],
        *_counters(run),
        *[Finding("warning", "A file of the run is damaged", problem) for problem in run.problems],
    ]
    return sorted(found, key=lambda finding: finding.level != "warning")


def planned_steps(run: RunFiles) -> int | None:
    """``max_steps`` of the configuration (any ``trainer.*`` section), None where the run is bounded otherwise."""
    trainer = run.config.get("trainer")
    sections = [trainer, *trainer.values()] if isinstance(trainer, dict) else []
    given = [section.get("max_steps") for section in sections if isinstance(section, dict)]
    return min((limit for limit in given if isinstance(limit, int) and limit > 0), default=None)


def _state(run: RunFiles) -> list[Finding]:
    status, planned = str(run.run.get("status", "")), planned_steps(run)
    done = last(run.metrics.get("step", [])) or 0
    of = f" of {planned}" if planned else ""
    found = []
    if status in ("interrupted", "failed"):
        reason = f" {run.run['error']}" if run.run.get("error") else ""
        title = f"This run was {status}" if status == "interrupted" else "This run failed"
        found.append(Finding("warning", title, f"The page shows what was done until step {done:.0f}{of}.{reason}"))
    elif status == "running" and planned and done < planned:
        text = "It was still going when this page was written, or was killed without a chance to say so."
        found.append(Finding("note", f"Step {done:.0f}{of}", text))
    if not column(run.metrics, "reward", "loss"):
        text = "metrics.csv has no row: there are no curves to show."
        found.append(Finding("warning", "No optimizer step yet", text))
    return found


def _counters(run: RunFiles) -> list[Finding]:
    found = []
    skipped = run.total("skipped_steps")
    if skipped:
        text = "A reward or gradient was NaN or infinite there; the weights were left as they were."
        title = f"{skipped:.0f} optimizer step{'s' if skipped != 1 else ''} skipped"
        found.append(Finding("warning", title, text))
    truncated = run.total("truncated_prompts")
    if truncated:
        text = "They are longer than the text encoder's limit; what lies beyond it has no effect on the picture."
        found.append(Finding("note", f"{truncated:.0f} prompt{'s were' if truncated != 1 else ' was'} cut", text))
    return found
