"""Reading a run directory, whatever state an interrupted run has left it in."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_aligner_diffusion.errors import first_line
from nemo_aligner_diffusion.formats.files import parse_json, read_bytes
from nemo_aligner_diffusion.formats.yaml_reader import read_yaml

Table = dict[str, list[float]]


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds. Missing or damaged files are empty here and named in ``problems``."""

    folder: Path
    config: dict[str, Any]
    metrics: Table
    validation: Table
    samples: list[tuple[int, Path]]  # (optimizer step, grid), ascending
    run: dict[str, Any]
    prompt_rewards: list[dict[str, Any]]  # of the last validation: prompt, seed, base_reward, reward
    prompt_rewards_step: int | None
    problems: list[str] = field(default_factory=list)
    startup: dict[str, Any] = field(default_factory=dict)  # startup.json: seconds to the first step, by phase

    @property
    def lora_export(self) -> Path | None:
        path = self.folder / "export" / "pytorch_lora_weights.safetensors"
        return path if path.is_file() else None

    @property
    def denoiser_export(self) -> Path | None:
        """A fully fine-tuned denoiser: ``export/unet``, ``export/transformer`` or whatever component was trained."""
        return next((path.parent for path in sorted((self.folder / "export").glob("[!.]*/config.json"))), None)

    def has(self, dotted: str) -> bool:
        """Whether the configuration has this key, be it null."""
        *sections, name = dotted.split(".")
        section = self.setting(".".join(sections))
        return isinstance(section, dict) and name in section

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted key; ``default`` where it is absent or null."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return default if value is None else value


def read_table(path: Path) -> Table:
    """A CSV of numbers as columns of equal length; what is no number is NaN, an incomplete last line is dropped.

    After a resume some steps may be written twice: of rows with the same ``step`` the last one counts.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        reader = csv.reader(stream)
        header = [name.strip() for name in next(reader, [])]
        rows = [row for row in reader if len(row) == len(header)]
    table = {name: [_number(row[i]) for row in rows] for i, name in enumerate(header) if name}
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
        path = folder / name
        if not path.is_file():
            return empty
        try:
            return read(path)
        except Exception as error:  # a damaged file must not take the report of the others with it
            problems.append(f"{name} cannot be read ({type(error).__name__}: {first_line(error)})")
            return empty

    scores = attempt("validation_samples.json", _read_prompt_rewards, (None, []))
    return RunFiles(
        folder=folder,
        config=attempt("config.yaml", _read_config, {}),
        metrics=attempt("metrics.csv", read_table, {}),
        validation=attempt("validation.csv", read_table, {}),
        samples=_samples(folder / "samples"),
        run=attempt("run.json", _read_object, {}),
        prompt_rewards=scores[1],
        prompt_rewards_step=scores[0],
        problems=problems,
        startup=attempt("startup.json", _read_object, {}),
    )


def _read_config(path: Path) -> dict[str, Any]:
    config = read_yaml(path)
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def _read_object(path: Path) -> dict[str, Any]:
    value = parse_json(read_bytes(path))
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
