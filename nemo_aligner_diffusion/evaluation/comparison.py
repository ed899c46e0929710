"""The work of ``nad-evaluate``: several models on the same prompts and seeds, by every reward and judge asked for.

Pictures are made first, one PNG each, and scored as they are stored; what is there already is not made again, so a call
that was stopped goes on, and parts of the rows may be made by other processes or machines (``--shard``).
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from nemo_aligner_diffusion.diffusion.generate import generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import load_lora_weights, mix
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.errors import DataError, OutputError, first_line
from nemo_aligner_diffusion.evaluation.diversity import embed_images
from nemo_aligner_diffusion.evaluation.figures import picture_grid, save_image, to_pictures
from nemo_aligner_diffusion.evaluation.generation import (
    DTYPES,
    Settings,
    asked_reward,
    device_of,
    resolve_settings,
    run_of,
    set_sampler,
    slug,
)
from nemo_aligner_diffusion.evaluation.metrics.base import Finding, ValidationMetric, metrics, of_kind
from nemo_aligner_diffusion.evaluation.request import Adapter, EvaluationRequest
from nemo_aligner_diffusion.evaluation.run_files import RunFiles
from nemo_aligner_diffusion.evaluation.statistics import (
    bootstrap_interval,
    frechet_distance,
    kernel_distance,
    sign_flip_p,
)
from nemo_aligner_diffusion.evaluation.text import format_gain, format_number
from nemo_aligner_diffusion.formats.checkpoints import load_component
from nemo_aligner_diffusion.formats.files import read_json
from nemo_aligner_diffusion.formats.pictures import decode_picture
from nemo_aligner_diffusion.rewards import restore_reward
from nemo_aligner_diffusion.rewards.base import Reward, scores_of
from nemo_aligner_diffusion.rewards.registry import build_reward
from nemo_aligner_diffusion.runtime.files import write_atomic
from nemo_aligner_diffusion.runtime.messages import quiet_libraries

REQUEST_FILE = "request.json"
_IN_GRID = 12  # prompts
_REAL = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Row:
    """One model: the base, or an adapter at a scale."""

    label: str
    adapter: Adapter | None = None
    scale: float = 1.0
    unet: bool = False

    @property
    def folder(self) -> str:
        return slug(self.label)


def rows_of(request: EvaluationRequest) -> list[Row]:
    """The base model first; of each adapter the scales."""
    rows = [Row("base")] + ([Row("tuned", unet=True)] if request.unet else [])
    for adapter in request.adapters:
        name = adapter.path.parent.name if adapter.path.name == "export" else adapter.path.stem
        rows += [
            Row(name if scale == 1 else f"{name} at {scale:g}", adapter, scale) for scale in request.scales or [1.0]
        ]
    unique: dict[str, Row] = {}  # by folder
    for row in rows:
        names = itertools.chain([row.label], (f"{row.label} ({number})" for number in itertools.count(2)))
        own = next(named for name in names if (named := replace(row, label=name)).folder not in unique)
        unique[own.folder] = own
    return list(unique.values())


class Stored:
    """A model's pictures as they are stored, read when they are looked at: what metrics take for :class:`.Pictures`."""

    def __init__(self, files: Sequence[Path], prompts: Sequence[str], seeds: Sequence[int], embedder: Any) -> None:
        self.files, self.prompts, self.seeds, self.embedder = list(files), list(prompts), list(seeds), embedder
        self.rewards: list[float] = []

    @property
    def images(self) -> Tensor:
        return torch.stack([read_picture(file) for file in self.files])

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Pictures ``(B, 3, H, W)`` and their prompts."""
        for start in range(0, len(self.files), size):
            rows = slice(start, start + size)
            yield torch.stack([read_picture(file) for file in self.files[rows]]), self.prompts[rows]

    @functools.cached_property
    def embeddings(self) -> Tensor:
        device = next(self.embedder.parameters()).device
        return torch.cat([embed_images(self.embedder, images.to(device)) for images, _ in self.batches(64)])


Scores = dict[str, list[float]]  # by reward


def run_evaluation(request: EvaluationRequest) -> Path:
    """Make what is missing, score all of it, and write the tables; a shard makes its pictures alone.

    Returns:
        the folder: ``pictures/``, ``scores.csv`` and ``scores.parquet`` (a row a picture), ``summary.csv`` and
        ``summary.json`` (a row a model), ``grid.png``.

    Raises:
        AlignerError: a path, name or size that does not fit; the folder is of another request.
    """
    run, rows = run_of(request), rows_of(request)
    settings, device = resolve_settings(request, run), device_of(request.device)
    quiet_libraries()
    judges = {} if request.shard else _judges(request.rewards, device)
    output = _claim(request, settings, rows)
    missing = {row: _missing(output, row, request) for row in rows}
    if any(missing.values()):
        _make(request, settings, missing, output, device)
    if request.shard is not None:
        print(f"shard {request.shard[0]} of {request.shard[1]} is complete; a call without --shard scores all")
        return output
    embedder = restore_reward(request.clip or embedded_reward_path(), device=device)
    pairs = list(request.pairs)
    prompts, seeds = [request.prompts[prompt] for prompt, _ in pairs], [seed for _, seed in pairs]
    stored = {
        row.label: Stored([path_of(output, row, *pair) for pair in pairs], prompts, seeds, embedder) for row in rows
    }
    scores = {label: _scores(mine, judges, request.batch_size, device) for label, mine in stored.items()}
    real = None if request.real is None else _real(request.real, embedder)
    summary = [_summary(label, stored, scores, real, _trained_on(run)) for label in stored]
    _write(output, stored, scores, summary)
    save_image(_grid(stored, scores, request), output / "grid.png")
    _print(summary, list(judges))
    print(f"written to {output}: scores.csv, summary.csv, summary.json, grid.png and the pictures")
    return output


def _trained_on(run: RunFiles | None) -> str | None:
    """The judge that is the reward which the first adapter was tuned on: no judge of it."""
    if run is None:
        return None
    name, path = run.setting("rm.name", "clip"), run.setting("rm.model.restore_from_path")
    return Path(str(path)).stem if path else "embedded" if name == "clip" else str(name)


def path_of(output: Path, row: Row, prompt: int, seed: int) -> Path:
    return output / "pictures" / row.folder / f"{prompt:05d}_seed{seed}.png"


def read_picture(path: Path) -> Tensor:
    """``(3, H, W)`` in [0, 1].

    Raises:
        DataError: it is no picture, or damaged.
    """
    try:
        picture = decode_picture(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} {first_line(error)}") from error
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


def _judges(asked: Sequence[str], device: torch.device) -> dict[str, Reward]:
    """By the names of their columns."""
    found: dict[str, Reward] = {}
    for text in asked:
        path = Path(text).expanduser()
        if text == "embedded" or path.is_file():
            file = embedded_reward_path() if text == "embedded" else path
            found["embedded" if text == "embedded" else path.stem] = restore_reward(file, device=device)
        elif (section := asked_reward(text)) is not None:
            found[text] = build_reward(section, device)
    return found


@torch.no_grad()
def _scores(stored: Stored, judges: Mapping[str, Reward], batch_size: int, device: torch.device) -> Scores:
    found: Scores = {name: [] for name in judges}
    for images, prompts in stored.batches(batch_size):
        for name, judge in judges.items():
            found[name] += scores_of(judge, images.to(device), prompts)[0].tolist()
    return found


def _claim(request: EvaluationRequest, settings: Settings, rows: Sequence[Row]) -> Path:
    """The folder, which holds nothing or an evaluation of the same models, prompts, seeds and sampling.

    Raises:
        OutputError: it holds another one, or cannot be written to.
    """
    output = request.output.expanduser()
    told = {
        "prompts": request.prompts, "seeds": request.seeds, "rows": [row.label for row in rows],
        "adapters": [[str(adapter.path), adapter.weight, _stamp(adapter.path)] for adapter in request.adapters],
        "tuned denoiser": request.unet and [str(request.unet), _stamp(request.unet)],
        "model": [str(getattr(settings, part)) for part in ("model", "revision", "unet", "vae", "text")],
        "sampling": vars(settings.sampling), "sampler": settings.sampler,
        "precision": request.precision,
    }  # fmt: skip
    file = output / REQUEST_FILE
    if file.exists():
        before = read_json(file, OutputError)
        changed = [name for name in told if before.get(name) != told[name]]
        if changed and not request.overwrite:
            raise OutputError(
                f"{output} is an evaluation with other {', '.join(changed)}: give another --output, or --overwrite"
            )
        if changed:
            shutil.rmtree(output / "pictures", ignore_errors=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {output}: {error.strerror or error}; expected a folder to be made") from error
    write_atomic(file, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return output


def _stamp(path: Path) -> list[list[Any]]:
    """Sizes and times of weights, by which those of another training are told apart."""
    path = path.expanduser()
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()]


def _missing(output: Path, row: Row, request: EvaluationRequest) -> list[tuple[int, int]]:
    """(number of the prompt, seed) of this shard's pictures that are not there."""
    part, parts = request.shard or (1, 1)
    mine = list(request.pairs)[part - 1 :: parts]
    return [pair for pair in mine if not path_of(output, row, *pair).exists()]


def _make(
    request: EvaluationRequest,
    settings: Settings,
    missing: Mapping[Row, Sequence[tuple[int, int]]],
    output: Path,
    device: torch.device,
) -> None:
    model = load_model(settings.model, settings.unet, settings.vae, DTYPES[request.precision],
                       text_path=settings.text, revision=settings.revision, **settings.pipeline)  # fmt: skip
    set_sampler(model, settings)
    for number, adapter in enumerate(request.adapters):
        load_lora_weights(model.denoiser, adapter.path, f"adapter_{number}", type(model.pipe))
    if request.unet is not None:
        model.keep_reference()
        load_component(model.denoiser, model.trained, request.unet)
    model.to(device)
    for row, pairs in missing.items():
        (output / "pictures" / row.folder).mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        for start in range(0, len(pairs), request.batch_size):
            batch = pairs[start : start + request.batch_size]
            with _as_row(model, row, request):
                prompts = [request.prompts[prompt] for prompt, _ in batch]
                images = generate(model, prompts, [seed for _, seed in batch], settings.sampling, request.batch_size)
            for pair, picture in zip(batch, to_pictures(images), strict=True):
                save_image(picture, path_of(output, row, *pair))
        print(f"{row.label}: {len(pairs)} pictures in {time.perf_counter() - started:.1f} s", flush=True)


def _as_row(model: DiffusionModel, row: Row, request: EvaluationRequest) -> AbstractContextManager[None]:
    if row.adapter is None:
        return nullcontext() if row.unet or not (request.adapters or request.unet) else model.reference()
    names = [f"adapter_{number}" for number in range(len(request.adapters))]
    own = request.adapters.index(row.adapter)
    weights = {name: row.scale * row.adapter.weight * (number == own) for number, name in enumerate(names)}
    mix(model.denoiser, weights)
    return nullcontext()


def _real(folder: Path, embedder: Any) -> Tensor:
    files = sorted(path for path in folder.expanduser().rglob("*") if path.suffix.lower() in _REAL)
    if len(files) < 2:
        raise DataError(f"--real {folder}: {len(files)} pictures ({', '.join(_REAL)}); expected two at least")
    device = next(embedder.parameters()).device
    # each by itself: they need not be of one size
    return torch.cat([embed_images(embedder, read_picture(file)[None].to(device)) for file in files])


def _summary(
    label: str, stored: Mapping[str, Stored], scores: Mapping[str, Scores], real: Tensor | None, trained: str | None
) -> dict[str, Any]:
    """A row of the summary: means; beside the base model gains, their intervals over prompts, and who beats it."""
    own, base = stored[label], stored["base"]
    row: dict[str, Any] = {"model": label, "pictures": len(own.files)}
    for name, mine in scores[label].items():
        row[name] = fmean(mine)
        if label != "base":
            both = list(zip(mine, scores["base"][name], strict=True))
            gains = _by_prompt(own.prompts, [a - b for a, b in both])
            beats = _by_prompt(own.prompts, [float(a > b) + 0.5 * (a == b) for a, b in both])
            for kind, values in (("gain", gains), ("beats", beats)):
                row[f"{name}_{kind}"] = fmean(values)
                row[f"{name}_{kind}_low"], row[f"{name}_{kind}_high"] = bootstrap_interval(values)
            row[f"{name}_p"] = sign_flip_p(gains)
    known: Any = (base, own)
    measured = [metric.measure(*known) for metric in of_kind(ValidationMetric) if not metric.of_rewards]
    row |= {name: value for found in measured for name, value in found.items() if value is not None}
    texts = normalize(own.embedder.embed_texts(own.prompts).float().cpu(), dim=-1)
    row["clip_score"] = 100 * float((own.embeddings * texts).sum(-1).clamp(min=0).mean())
    if real is not None:
        row["frechet_distance"] = frechet_distance(own.embeddings, real)
        row["kernel_distance"] = kernel_distance(own.embeddings, real)
    if label != "base":
        row["signals"] = [f"{finding.title}. {finding.text}" for finding in _signals(row, trained)]
    return row


def _signals(row: Mapping[str, Any], trained: str | None) -> list[Finding]:
    """What may be a reward that is hacked, in words."""
    table = {name: [float(value)] for name, value in row.items() if isinstance(value, (int, float))}
    run = RunFiles(Path(), validation={"step": [0.0], **table})
    found = [finding for metric in metrics() for finding in metric.findings(run)]
    judges = [name.removesuffix("_gain") for name in row if name.endswith("_gain")]
    rises = [name for name in judges if name == trained and row[f"{name}_gain_low"] > 0]
    for name in judges:
        if name != trained and rises and row[f"{name}_gain_high"] < 0:
            text = f"{name} gave no gradient and falls, while {rises[0]}, which the model was tuned on, rises."
            found.append(Finding("warning", f"A held-out judge falls ({name})", text))
    return found


def _by_prompt(prompts: Sequence[str], values: Sequence[float]) -> list[float]:
    """Means over the seeds of each prompt, which are not independent of one another."""
    found: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        found.setdefault(prompt, []).append(value)
    return [fmean(of) for of in found.values()]


def _write(
    output: Path,
    stored: Mapping[str, Stored],
    scores: Mapping[str, Scores],
    summary: Sequence[Mapping[str, Any]],
) -> None:
    columns: dict[str, list[Any]] = {"model": [], "prompt": [], "seed": []}
    for label, mine in stored.items():
        columns["model"] += [label] * len(mine.files)
        columns["prompt"] += mine.prompts
        columns["seed"] += mine.seeds
        for name, values in scores[label].items():
            columns.setdefault(name, []).extend(values)
    write_atomic(output / "scores.csv", _csv(columns))
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        print("note: scores.parquet is left out: pip install 'nemo-aligner-diffusion[parquet]'", file=sys.stderr)
    else:
        buffer = io.BytesIO()
        pa.parquet.write_table(pa.table(columns), buffer)
        write_atomic(output / "scores.parquet", buffer.getvalue())
    names = list(dict.fromkeys(name for row in summary for name in row if name != "signals"))
    write_atomic(output / "summary.csv", _csv({name: [row.get(name) for row in summary] for name in names}))
    finite = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
              for row in summary]  # fmt: skip
    write_atomic(output / "summary.json", json.dumps(finite, indent=1, ensure_ascii=False) + "\n")


def _csv(columns: Mapping[str, Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def _grid(stored: Mapping[str, Stored], scores: Mapping[str, Scores], request: EvaluationRequest) -> Image.Image:
    """The first seed of each prompt, a row a model."""
    base, first = stored["base"], request.seeds[0]
    places = [place for place, seed in enumerate(base.seeds) if seed == first][:_IN_GRID]
    shown = next(iter(scores["base"]), None)
    rewards = {} if shown is None else {label: [of[shown][i] for i in places] for label, of in scores.items()}
    return picture_grid(
        {label: [read_picture(mine.files[i]) for i in places] for label, mine in stored.items()},
        [base.prompts[i] for i in places],
        rewards=rewards,
        seeds=[first] * len(places),
        title=f"{shown or 'no reward'}, seed {first}",
    )


def _print(summary: Sequence[Mapping[str, Any]], rewards: Sequence[str]) -> None:
    for row in summary:
        print(row["model"])
        for name in rewards:
            line = f"  {name:24s} {format_number(row[name])}"
            if f"{name}_gain" in row:
                low, high = row[f"{name}_gain_low"], row[f"{name}_gain_high"]
                line += (
                    f"  {format_gain(row[f'{name}_gain'], row[name])} ({low:+.3g} to {high:+.3g}), beats the base on "
                    f"{row[f'{name}_beats']:.0%} ({row[f'{name}_beats_low']:.0%} to {row[f'{name}_beats_high']:.0%})"
                )
            print(line)
        diversity = f", diversity {format_number(row['diversity'])}" if "diversity" in row else ""
        print(f"  CLIPScore {row['clip_score']:.1f}, sharpness {format_number(row['sharpness'])}{diversity}")
        for signal in row.get("signals", ()):
            print(f"  ! {signal}")
