"""Reading a run directory, whatever state an interrupted run has left it in."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.errors import first_line
from nemo_aligner_diffusion.formats.files import parse_json, read_bytes
from nemo_aligner_diffusion.formats.yaml_reader import read_yaml

Table = dict[str, list[float]]
_DEEPEST = 50  # levels of a JSON document
_MOST_COLUMNS = 200  # of a table


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds. Missing or damaged files are empty here and named in ``problems``."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    metrics: Table = field(default_factory=dict)
    validation: Table = field(default_factory=dict)
    samples: list[tuple[int, Path]] = field(default_factory=list)  # (optimizer step, grid), ascending
    run: dict[str, Any] = field(default_factory=dict)
    # of the last validation: prompt, seed, base_reward, reward
    prompt_rewards: list[dict[str, Any]] = field(default_factory=list)
    prompt_rewards_step: int | None = None
    problems: list[str] = field(default_factory=list)
    startup: dict[str, Any] = field(default_factory=dict)  # startup.json: seconds to the first step, by phase

    @property
    def lora_export(self) -> Path | None:
        path = self.folder / "export" / "pytorch_lora_weights.safetensors"
        return path if path.is_file() else None

    @property
    def denoiser_export(self) -> Path | None:
        """A fully fine-tuned denoiser: ``export/unet``, ``export/transformer`` or whatever component was trained."""
        found = sorted((self.folder / "export").glob("[!.]*/config.json"))
        return next((path.parent for path in found if path.parent.name.isidentifier()), None)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted key; ``default`` where it is absent or null."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return default if value is None else value

    def total(self, name: str) -> float:
        """A counter of ``run.json``, else the sum of the column of ``metrics.csv``."""
        value = finite(self.run.get(name))
        return (
            value if value is not None else sum(value for value in self.metrics.get(name, []) if math.isfinite(value))
        )


def finite(value: Any) -> float | None:
    """A number of a file of others, where it is one that can be shown."""
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def read_table(path: Path, problems: list[str] | None = None) -> Table:
    """A CSV of numbers as columns of equal length; what is no number is NaN, an incomplete last line is dropped.

    After a resume some steps may be written twice: of rows with the same ``step`` the last one counts. Rows of another
    length, or with bytes that are no UTF-8, are left out and counted in ``problems``.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\0", "\ufffd").splitlines()
    header, *rows = list(csv.reader(lines[:1])) + list(csv.reader(lines[1:])) or [[]]

    def is_whole(row: list[str]) -> bool:
        return len(row) == len(header) and not any("\ufffd" in cell for cell in row)

    whole = [row for row in rows if is_whole(row)]
    damaged = len(rows) - len(whole) - (1 if rows and not is_whole(rows[-1]) else 0)  # the last one is cut at times
    if problems is not None and damaged:
        problems.append(f"{path.name}: {damaged} of {len(rows)} rows are damaged and left out")
    names = [name.strip() for name in header[:_MOST_COLUMNS]]
    table = {name: [_number(row[i]) for row in whole] for i, name in enumerate(names) if name}
    if "step" not in table:
        return table
    last = {step: index for index, step in enumerate(table["step"]) if math.isfinite(step)}
    order = [last[step] for step in sorted(last)]
    return {name: [values[index] for index in order] for name, values in table.items()}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_run(folder: str | Path) -> RunFiles:
    """Read ``config.yaml, metrics.csv, validation.csv, samples/, run.json, startup.json, validation_samples.json``.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the run directory (exp_manager.explicit_log_dir)")
    problems: list[str] = []

    def attempt(name: str, read: Any, empty: Any) -> Any:
        return _attempt(folder / name, read, empty, problems)

    scores = attempt("validation_samples.json", _read_prompt_rewards, (None, []))
    return RunFiles(
        folder=folder,
        config=read_config(folder, problems),
        metrics=attempt("metrics.csv", lambda path: read_table(path, problems), {}),
        validation=attempt("validation.csv", lambda path: read_table(path, problems), {}),
        samples=_samples(folder / "samples"),
        run=attempt("run.json", _read_object, {}),
        prompt_rewards=scores[1],
        prompt_rewards_step=scores[0],
        problems=problems,
        startup=attempt("startup.json", _read_object, {}),
    )


def _attempt(path: Path, read: Callable[[Path], Any], empty: Any, problems: list[str]) -> Any:
    if not path.is_file():
        return empty
    try:
        return read(path)
    except Exception as error:  # a damaged file must not take the report of the others with it
        problems.append(f"{path.name} cannot be read ({type(error).__name__}: {first_line(error)})")
        return empty


def read_config(folder: Path, problems: list[str]) -> dict[str, Any]:
    """``config.yaml`` of a run directory; empty where there is none, or where it is damaged, which is a problem."""
    return _attempt(folder / "config.yaml", _read_config, {}, problems)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_yaml(path)
    if not isinstance(config, dict):
        raise ValueError("expected a mapping of keys")
    return {str(key): value for key, value in config.items()}


def parse_shallow_json(data: bytes) -> Any:
    """A JSON document that can be walked through: deeper nesting than any of ours is a ``ValueError``."""
    value = parse_json(data)
    level, depth = [value], 0
    while level:
        if depth > _DEEPEST:
            raise ValueError(f"is nested more than {_DEEPEST} deep")
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level, depth = [value for values in inner for value in values], depth + 1
    return value


def _read_object(path: Path) -> dict[str, Any]:
    value = parse_shallow_json(read_bytes(path))
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _read_prompt_rewards(path: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """``{"step": n, "prompts": [{prompt, seed, base_reward, reward}, …]}``, or a list of such (the last one counts)."""
    value = parse_json(read_bytes(path))
    if isinstance(value, list):
        value = value[-1]
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


def _samples(folder: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"step_(\d+)\.png", path.name), path) for path in folder.glob("step_*.png")]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def column(table: Table, *names: str) -> list[float]:
    """The first of these columns that has a finite value; an empty list where none has."""
    for name in names:
        if any(map(math.isfinite, table.get(name, []))):
            return table[name]
    return []


def last(values: list[float]) -> float | None:
    """The last finite value."""
    return next((value for value in reversed(values) if math.isfinite(value)), None)
