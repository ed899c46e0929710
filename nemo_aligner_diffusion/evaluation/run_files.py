"""Reading a run directory, whatever state an interrupted run has left it in."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.errors import AlignerError, first_line
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.yaml_reader import read_yaml
from nemo_aligner_diffusion.runtime.csv_table import read_rows

Table = dict[str, list[float]]
LEVELS_FILE = "gradient_weight.csv"
_DEEPEST = 50  # levels of a JSON document


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds. Missing or damaged files are empty here and named in ``problems``."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: Table = field(default_factory=dict)
    validation: Table = field(default_factory=dict)
    levels: Table = field(default_factory=dict)  # gradient_weight.csv: a row for each twentieth of the noise levels
    samples: list[tuple[int, Path]] = field(default_factory=list)  # (optimizer step, grid), ascending
    run: dict[str, Any] = field(default_factory=dict)
    startup: dict[str, Any] = field(default_factory=dict)  # startup.json: seconds to the first step, by phase
    # of the last validation: prompt, seed, base_reward, reward
    prompt_rewards: list[dict[str, Any]] = field(default_factory=list)
    prompt_rewards_step: int | None = None
    problems: list[str] = field(default_factory=list)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted key; ``default`` where it is absent or null."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return default if value is None else value

    @property
    def steps(self) -> float:
        """Optimizer steps done."""
        return last(self.metrics.get("step", [])) or 0.0

    def total(self, name: str) -> float:
        """The sum of a column of ``metrics.csv``."""
        return sum(value for value in self.metrics.get(name, []) if math.isfinite(value))


def finite(value: Any) -> float | None:
    """A number of a file of others, where it is one that can be shown."""
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def read_table(path: Path, problems: list[str] | None = None) -> Table:
    """A CSV of numbers, a row a ``step``, as columns of equal length; what is no number is NaN.

    After a resume some steps may be written twice: the last row counts. Damaged rows are left out and counted in
    ``problems``, but for the last, which a run that is killed may leave incomplete.
    """
    rows, _, damaged = read_rows(path)
    if damaged and problems is not None:
        problems.append(f"{path.name}: {damaged} of {damaged + len(rows)} rows are damaged and left out")
    by_step = {float(row["step"]): row for row in rows}
    ordered = [by_step[step] for step in sorted(by_step) if math.isfinite(step)]
    return {name: [_number(row[name]) for row in ordered] for name in (ordered[0] if ordered else ())}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_run(folder: str | Path) -> RunFiles:
    """Read ``config.yaml, metrics.csv, validation.csv, gradient_weight.csv, samples/`` and the JSON files.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the run directory (exp_manager.explicit_log_dir)")
    problems: list[str] = []
    step, prompt_rewards = _attempt(folder / "validation_samples.json", _read_prompt_rewards, problems) or (None, [])
    samples = [(re.fullmatch(r"step_(\d+)\.png", path.name), path) for path in folder.glob("samples/step_*.png")]
    return RunFiles(
        folder=folder,
        config=read_config(folder, problems),
        metrics=_attempt(folder / "metrics.csv", lambda path: read_table(path, problems), problems) or {},
        validation=_attempt(folder / "validation.csv", lambda path: read_table(path, problems), problems) or {},
        levels=_attempt(folder / LEVELS_FILE, _read_levels, problems) or {},
        samples=sorted((int(match.group(1)), path) for match, path in samples if match),
        run=_attempt(folder / "run.json", _read_object, problems) or {},
        startup=_attempt(folder / "startup.json", _read_object, problems) or {},
        prompt_rewards=prompt_rewards,
        prompt_rewards_step=step,
        problems=problems,
    )


def read_config(folder: Path, problems: list[str]) -> dict[str, Any]:
    """``config.yaml`` of a run directory; empty where there is none, or where it is damaged, which is a problem."""
    return _attempt(folder / "config.yaml", _read_config, problems) or {}


def _attempt(path: Path, read: Callable[[Path], Any], problems: list[str]) -> Any:
    """What is read; ``None`` where there is no such file, or where it is damaged, which is a problem."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except Exception as error:  # a damaged file must not take the report of the others with it
        problems.append(f"{path.name} cannot be read ({type(error).__name__}: {first_line(error)})")
        return None


def _read_levels(path: Path) -> Table:
    """A CSV of numbers as columns, in the order of its rows."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def _read_config(path: Path) -> dict[str, Any]:
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError("expected a mapping of keys")
    return {str(key): value for key, value in config.items()}


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path, AlignerError)
    _check_depth(value, _DEEPEST)
    return value


def _check_depth(value: Any, most: int) -> None:
    """Refuse what is nested deeper than any of ours: walking through it would end in a ``RecursionError``."""
    if most < 0:
        raise ValueError(f"is nested more than {_DEEPEST} deep")
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, most - 1)


def _read_prompt_rewards(path: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """``{"step": n, "prompts": [{prompt, seed, base_reward, reward}, …]}``."""
    value = _read_object(path)
    rows = [
        {
            "prompt": str(row["prompt"]),
            "seed": row.get("seed"),
            "base_reward": float(row["base_reward"]),
            "reward": float(row["reward"]),
        }
        for row in value["prompts"]
    ]
    return value.get("step"), [
        row for row in rows if math.isfinite(row["reward"]) and math.isfinite(row["base_reward"])
    ]


def column(table: Table, name: str) -> list[float]:
    """The values of a column that has a finite one; an empty list where there is none."""
    values = table.get(name, [])
    return values if any(map(math.isfinite, values)) else []


def last(values: list[float]) -> float | None:
    """The last finite value."""
    return next((value for value in reversed(values) if math.isfinite(value)), None)
