"""What a reader of a run should be told without having to find it in the curves: signs of reward hacking above all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from nemo_aligner_diffusion.evaluation.figures import format_number
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, column, last

KEPT_DIVERSITY = 0.8  # share of the base model's diversity below which a run is said to have lost it
_ENOUGH_ROWS = 12  # fewer optimizer steps say nothing about a trend


@dataclass(frozen=True)
class Finding:
    """One remark: ``level`` is ``warning`` or ``note``."""

    level: str
    title: str
    text: str


def findings(run: RunFiles) -> list[Finding]:
    """Warnings first. Every rule is stated in its text, so that a reader can judge it."""
    found = [
        *_state(run),
        *_reward(run),
        *_diversity(run),
        *_kl(run),
        *_gradients(run),
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
        text = f"The page shows what was done until step {done:.0f}{of}.{reason}"
        found.append(
            Finding("warning", f"This run was {status}" if status == "interrupted" else "This run failed", text)
        )
    elif status == "running" and planned and done < planned:
        text = "It was still going when this page was written, or was killed without a chance to say so."
        found.append(Finding("note", f"Step {done:.0f}{of}", text))
    if not column(run.metrics, "reward", "loss"):
        found.append(
            Finding("warning", "No optimizer step yet", "metrics.csv has no row: there are no curves to show.")
        )
    return found


def _reward(run: RunFiles) -> list[Finding]:
    found = []
    tuned, base = column(run.validation, "reward"), column(run.validation, "base_reward")
    finite = [value for value in tuned if math.isfinite(value)]
    end, start = last(tuned), last(base)
    if end is not None and start is not None and end < start:
        found.append(
            Finding(
                "warning",
                "The tuned model scores below the base model",
                f"Validation reward {format_number(end)} against {format_number(start)}. A smaller learning rate, or "
                "more pictures a step (model.global_batch_size), usually helps.",
            )
        )
    if len(finite) >= 3 and start is not None and end is not None:
        best = max(finite)
        if best - start > 0 and best - end > 0.25 * (best - start):
            step = run.validation["step"][tuned.index(best)] if "step" in run.validation else math.nan
            found.append(
                Finding(
                    "warning",
                    "The reward has fallen from its best value",
                    f"It was {format_number(best)} at step {step:.0f} and is {format_number(end)} now: more than a "
                    "quarter of the gain is lost. Take an earlier checkpoint, or a smaller learning rate.",
                )
            )
    rows = run.prompt_rewards
    if rows and not (end is not None and start is not None and end <= start):
        share = sum(row["reward"] > row["base_reward"] for row in rows) / len(rows)
        if share < 0.5:
            found.append(
                Finding(
                    "warning",
                    f"Only {share:.0%} of the validation pictures improved",
                    "A mean that rises on few prompts is a gain in these alone: see the list of prompts below.",
                )
            )
    return found


def _diversity(run: RunFiles) -> list[Finding]:
    ratio = diversity_kept(run)
    if ratio is None or ratio >= KEPT_DIVERSITY:
        return []
    return [
        Finding(
            "warning",
            f"Diversity fell to {ratio:.0%} of the base model's",
            "Pictures of one prompt with different seeds look more alike than before (the mark is "
            f"{KEPT_DIVERSITY:.0%}). That is how a reward is hacked. Raise model.kl_coeff, stop earlier, or use the "
            "LoRA at a scale below 1.",
        )
    ]


def diversity_kept(run: RunFiles) -> float | None:
    """Last validation's distance between seeds, tuned divided by base; None where it was not measured."""
    given = last(column(run.validation, "diversity_ratio"))
    if given is not None:
        return given
    tuned, base = last(column(run.validation, "diversity")), last(column(run.validation, "base_diversity"))
    return tuned / base if tuned is not None and base else None


def _kl(run: RunFiles) -> list[Finding]:
    """KL bought per unit of reward, last third of the run against the first two."""
    pairs = [
        (reward, kl)
        for reward, kl in zip(column(run.metrics, "reward"), column(run.metrics, "kl_penalty"), strict=False)
        if math.isfinite(reward) and math.isfinite(kl)
    ]
    if len(pairs) < _ENOUGH_ROWS or max(kl for _, kl in pairs) <= 0:
        return []
    sixth = max(2, len(pairs) // 6)

    def mean(part: list[tuple[float, float]], which: int) -> float:
        return sum(pair[which] for pair in part) / len(part)

    middle = len(pairs) * 2 // 3
    start, knee, end = pairs[:sixth], pairs[middle - sixth // 2 : middle - sixth // 2 + sixth], pairs[-sixth:]
    gains = mean(knee, 0) - mean(start, 0), mean(end, 0) - mean(knee, 0)
    costs = mean(knee, 1) - mean(start, 1), mean(end, 1) - mean(knee, 1)
    if costs[1] <= 0 or costs[0] <= 0 or gains[0] <= 0:
        return []
    if gains[1] > 0:
        factor = (costs[1] / gains[1]) / (costs[0] / gains[0])
        told = f"cost {factor:.0f} times as much distance from the base model (KL) as before"
    else:
        factor, told = (math.inf, "brought no reward while the distance from the base model (KL) still grew")
    if factor < 4 or costs[1] < 0.3 * costs[0]:
        return []
    return [
        Finding(
            "warning",
            "The last third of the run is bought dearly",
            f"A further gain in reward {told}. Look at the pictures: the model may be leaving what the reward measures "
            "well. An earlier checkpoint or a larger model.kl_coeff may serve you better.",
        )
    ]


def _gradients(run: RunFiles) -> list[Finding]:
    norms = [value for value in column(run.metrics, "grad_norm") if math.isfinite(value)]
    if len(norms) < _ENOUGH_ROWS:
        return []
    tail = median(norms[-max(3, len(norms) // 10) :])
    usual = median(norms[: len(norms) * 2 // 3])
    if usual <= 0 or tail < 10 * usual:
        return []
    return [
        Finding(
            "warning",
            "Gradients are growing",
            f"Their norm is now {format_number(tail)}, {tail / usual:.0f} times what was usual before: training is "
            "about to become unstable. Use a smaller learning rate, fewer active steps, or a lower gradient_clip_val.",
        )
    ]


def _counters(run: RunFiles) -> list[Finding]:
    found = []
    skipped = _count(run, "skipped_steps")
    if skipped:
        found.append(
            Finding(
                "warning",
                f"{skipped:.0f} optimizer step{'s' if skipped != 1 else ''} skipped",
                "A reward or gradient was NaN or infinite there; the weights were left as they were.",
            )
        )
    truncated = _count(run, "truncated_prompts")
    if truncated:
        found.append(
            Finding(
                "note",
                f"{truncated:.0f} prompt{'s were' if truncated != 1 else ' was'} cut",
                "They are longer than the text encoder's limit; what lies beyond it has no effect on the picture.",
            )
        )
    return found


def _count(run: RunFiles, name: str) -> float:
    """A counter of ``run.json``, else the sum of the column of metrics.csv."""
    value = run.run.get(name)
    if isinstance(value, (int, float)):
        return float(value)
    return sum(value for value in run.metrics.get(name, []) if math.isfinite(value))
