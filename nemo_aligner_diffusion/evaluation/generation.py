"""The work of ``generate.py``: load a model and what was learnt, make the rows that were asked for, write them down."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.diffusion.lora import load_lora_weights, mix
from nemo_aligner_diffusion.diffusion.model import DiffusionModel
from nemo_aligner_diffusion.diffusion.settings import PipelineSettings, SamplingSettings
from nemo_aligner_diffusion.diffusion.trajectory import check_repeatable
from nemo_aligner_diffusion.embedded_assets import embedded_model_path
from nemo_aligner_diffusion.errors import AlignerError, CheckpointError, ConfigurationError, OutputError, printable
from nemo_aligner_diffusion.evaluation.figures import picture_grid, save_image, to_pictures
from nemo_aligner_diffusion.evaluation.request import Request, annealed_weights
from nemo_aligner_diffusion.evaluation.run_files import RunFiles, read_config
from nemo_aligner_diffusion.evaluation.text import format_gain, format_number
from nemo_aligner_diffusion.formats.checkpoints import load_component
from nemo_aligner_diffusion.formats.hub import is_hub_name
from nemo_aligner_diffusion.rewards.base import Reward, scores_of
from nemo_aligner_diffusion.rewards.registry import build_reward, import_paths, rewards
from nemo_aligner_diffusion.rewards.settings import RewardSettings
from nemo_aligner_diffusion.rewards.support.parted import apply_statistics, check_measured, read_statistics
from nemo_aligner_diffusion.runtime.messages import quiet_libraries

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
_MOST_IN_GRID = 240  # columns; the single pictures are written in any case
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

Pairs = Sequence[tuple[str, int]]  # (prompt, seed)


@dataclass(frozen=True)
class Settings:
    """How pictures are made, with every default filled in."""

    model: Path | None  # None: what ``unet``'s weights belong to, or the embedded one
    unet: Path | None  # weights of the *base* model's denoiser, where they are not the model folder's own
    vae: Path | None
    text: Path | None  # where its text encoders are from
    revision: str | None
    sampling: Sampling
    sampler: str | None  # None: the pipeline's own
    pipeline: Mapping[str, Any]  # model.pipeline: trained, stateless, arguments


@dataclass(frozen=True)
class Variant:
    """One row: the base model, or the tuned one with ``scale`` on its adapters and perhaps annealed guidance."""

    label: str
    tuned: bool = True
    scale: float = 1.0
    annealing: str | None = None


@dataclass
class Result:
    """What was made.

    Attributes:
        output: the folder written to.
        images: by variant's label, ``(N, 3, H, W)`` in ``[0, 1]``; N runs over prompts and, fastest, seeds.
        rewards: by variant's label, N numbers; empty without a reward.
        files: the single pictures, then the grid.
    """

    output: Path
    images: dict[str, Tensor] = field(default_factory=dict)
    rewards: dict[str, list[float]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def run_generation(request: Request) -> Result:
    """Make and write all pictures of a request; print where they are and how they score.

    Raises:
        AlignerError: a path, name or size that does not fit. Everything is checked and loaded before the first file.
    """
    run = run_of(request)
    settings = resolve_settings(request, run)
    device = device_of(request.device)
    quiet_libraries()
    model = load_model(settings.model, settings.unet, settings.vae, DTYPES[request.precision],
                       text_path=settings.text, revision=settings.revision, **settings.pipeline)  # fmt: skip
    set_sampler(model, settings)
    _check_size(model, settings.sampling)
    with naming_the_base(settings, run):
        _load_tuned(model, request)
    model.to(device)
    reward = _reward(request, run, device)
    _warn_of_truncation(model, request.prompts)
    pairs = [(prompt, seed) for prompt in request.prompts for seed in request.seeds]
    prompts, seeds = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
    variants = plan_variants(request)
    check_repeatable(model, model.inputs(prompts[:1], **vars(settings.sampling)))  # before there is a folder
    result = Result(_claim_folder(request.output, request.overwrite))
    for variant in variants:
        started = time.perf_counter()
        annealing = None if variant.annealing is None else partial(annealed_weights, variant.annealing)
        with _as_variant(model, variant, request):
            images = generate(model, prompts, seeds, settings.sampling, request.batch_size, tuned_weights=annealing)
        print(f"{variant.label}: {len(pairs)} picture(s) in {time.perf_counter() - started:.1f} s", flush=True)
        result.images[variant.label] = images
        if reward is not None:
            result.rewards[variant.label] = _scores(reward, images.to(device), prompts, request.batch_size)
        facts = {**_facts(request, settings), "row": variant.label}
        name = variant.label if len(variants) > 1 else ""
        scores = result.rewards.get(variant.label)
        result.files += _write_pictures(result.output, images, pairs, name, facts, scores)
    result.files.append(_write_grid(result.output, result.images, result.rewards, pairs, _describe(settings)))
    if reward is not None:
        _print_rewards(result.rewards, reward.name)
    print(f"written to {result.output}: {len(result.files) - 1} picture(s) and {result.files[-1].name}")
    return result


def plan_variants(request: Request) -> list[Variant]:
    """The rows, from top to bottom, each once."""
    tuned = bool(request.adapters or request.unet)
    rows = [Variant("base", tuned=False)] if request.compare or not tuned else []
    if request.scales:
        rows += [Variant(f"scale {scale:g}", scale=scale) for scale in request.scales]
    elif request.weights:
        rows += [Variant(f"weight {kind}", annealing=kind) for kind in request.weights]
    elif tuned:
        rows.append(Variant("tuned"))
    return list({row.label: row for row in rows}.values())


def resolve_settings(request: Request, run: RunFiles | None) -> Settings:
    """The command line over the settings of the run that made the adapter, without one over those of the family.

    Raises:
        ConfigurationError: weights that the run was based on have moved, or its settings are none.
    """
    config = run.config if run else {}
    try:
        infer, pipeline = SamplingSettings.from_tree(config), PipelineSettings.from_tree(config).declared()
        infer = request.usual if run is None or run.setting("model.infer") is None else infer
    except ConfigurationError as error:
        raise ConfigurationError(f"{run.folder if run else ''}/config.yaml: {error}") from error

    def base_path(key: str) -> Path | None:
        value = run.setting(key) if run else None
        if value is None or request.model is not None:
            return None
        path = Path(str(value)).expanduser()
        if not path.exists() and not is_hub_name(str(value)):
            where = run.folder / "config.yaml" if run else "config.yaml"
            there = "is gone" if path.is_absolute() else f"is not there, seen from {Path.cwd()}"
            raise ConfigurationError(
                f"{path} {there}: {where} names it as {key}, which this adapter was made for; "
                "give the model's present place with --model FOLDER"
            )
        return path

    def first(given: Any, otherwise: Any) -> Any:
        return otherwise if given is None else given

    return Settings(
        model=request.model or base_path("model.from_pretrained"),
        unet=base_path("model.unet_config.from_pretrained"),
        vae=request.vae or base_path("model.first_stage_config.from_pretrained"),
        text=request.text or base_path("model.cond_stage_config.from_pretrained"),
        revision=run.setting("model.revision") if run and request.model is None else None,
        sampling=Sampling(
            first(request.steps, infer.inference_steps),
            first(request.guidance, infer.unconditional_guidance_scale),
            first(request.height, infer.height),
            first(request.width, infer.width),
            first(request.eta, infer.eta),
        ),
        sampler=first(request.sampler, infer.sampler_type),
        pipeline={name: value for name, value in pipeline.items() if value},
    )


def run_of(request: Request) -> RunFiles | None:
    """The run directory around the (first) adapter or the fine-tuned denoiser, if it is one; its settings alone."""
    path = request.adapters[0].path if request.adapters else request.unet
    for folder in list(path.absolute().parents)[:2] if path is not None else []:
        if folder.name != "export" and (folder / "config.yaml").is_file():
            problems: list[str] = []
            run = RunFiles(folder, read_config(folder, problems))
            for problem in problems:
                text = (
                    f"{folder}: {problem}; the pictures are made with the model family's settings, not with the run's"
                )
                print(f"warning: {printable(text, 600)}", file=sys.stderr)
            return run
    return None


@contextmanager
def naming_the_base(settings: Settings, run: RunFiles | None) -> Iterator[None]:
    """A LoRA that does not fit the embedded model, which nobody asked for: the message says why that was taken."""
    try:
        yield
    except CheckpointError as error:
        if run is not None or settings.model is not None or "not fit the denoiser" not in str(error):
            raise
        raise CheckpointError(
            f"{error}; no --model was given and it is in no run's folder, so the embedded model was taken"
        ) from error


def device_of(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"--device {name}: this device cannot be used here ({reason}); try cpu") from error
    return device


def set_sampler(model: DiffusionModel, settings: Settings) -> None:
    try:
        model.set_scheduler(settings.sampler, settings.sampling.eta)
    except ConfigurationError as error:  # written for the training configuration; here the same things are options
        text = str(error)
        for key, option in (("sampler_type", "--sampler"), ("eta", "--eta")):
            text = text.replace(f"model.infer.{key}", option)
        raise ConfigurationError(text) from error


def _check_size(model: DiffusionModel, sampling: Sampling) -> None:
    """Some pipelines make the next smaller size instead."""
    multiple = getattr(model.pipe, "vae_scale_factor", 1)
    for option, value in (("--height", sampling.height), ("--width", sampling.width)):
        if value is not None and value % multiple:
            near = max(1, round(value / multiple)) * multiple
            raise ConfigurationError(
                f"{option} {value}: this model makes pictures whose sides are multiples of {multiple}; "
                f"the nearest is {near}"
            )


def _load_tuned(model: DiffusionModel, request: Request) -> None:
    with warnings.catch_warnings():  # peft warns of a second adapter; here that is what was asked for
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for index, adapter in enumerate(request.adapters):
            load_lora_weights(model.denoiser, adapter.path, f"adapter_{index}", type(model.pipe))
    if request.unet is not None:
        if request.compare or request.weights:
            model.keep_reference()
        load_component(model.denoiser, model.trained, request.unet)


def _as_variant(model: DiffusionModel, variant: Variant, request: Request) -> AbstractContextManager[None]:
    """Within, the model is the row's: base, tuned, or tuned at a scale (θ = θ_pre + s·Σ_k α_k·θ_LoRA^k)."""
    if not variant.tuned:
        return model.reference() if request.adapters or request.unet else nullcontext()
    if request.adapters:
        weights = {f"adapter_{i}": variant.scale * adapter.weight for i, adapter in enumerate(request.adapters)}
        mix(model.denoiser, weights)
    return nullcontext()


def _reward(request: Request, run: RunFiles | None, device: torch.device) -> Reward | None:
    """The reward asked for; else the run's own, else the embedded one, as far as they can be had."""
    if request.reward is not None:
        asked = asked_reward(request.reward)
        return None if asked is None else build_reward(asked, device)
    section = run.setting("rm", {"name": "clip"}) if run else {"name": "clip"}
    section = section if isinstance(section, dict) else {"name": section}
    if section.get("name") == "none":
        return None
    for key, value in import_paths(section):  # code that a folder names, which may be somebody else's
        print(
            f"note: the pictures are not scored: the run's reward is Python code ({key} = {value}), which is imported "
            f"only where you name it yourself: --reward {value}",
            file=sys.stderr,
        )
        return None
    try:
        reward = build_reward(section, device)
        if run is not None:
            apply_statistics(reward, read_statistics(run.folder))
        check_measured(reward)
        return reward
    except AlignerError as error:
        print(f"note: the pictures are not scored, the reward cannot be loaded: {error}", file=sys.stderr)
        return None


def asked_reward(asked: str) -> dict[str, Any] | None:
    """The ``rm`` section that ``--reward`` stands for; ``None`` for none."""
    # those that need neither a network nor a setting
    analytic = [name for name, kind in rewards().items() if kind.make is RewardSettings.make]
    if asked.lower() == "none":
        return None
    if asked.lower() in analytic:
        return {"name": asked.lower()}
    if Path(asked).expanduser().exists():
        return {"name": "clip", "model": {"restore_from_path": asked}}
    if _IMPORT_PATH.fullmatch(asked):
        return {"name": "custom", "import_path": asked}
    raise ConfigurationError(
        f"--reward {asked}: neither a file nor one of {', '.join(analytic)}; "
        "expected one of these, a .nemo file, or your own package.module:name"
    )


@torch.no_grad()
def _scores(reward: Reward, images: Tensor, prompts: list[str], batch_size: int) -> list[float]:
    parts = [
        scores_of(reward, images[start : start + batch_size], prompts[start : start + batch_size])[0]
        for start in range(0, len(prompts), batch_size)
    ]
    return torch.cat(parts).tolist()


def _warn_of_truncation(model: DiffusionModel, prompts: list[str]) -> None:
    if cut := model.count_truncated(prompts):
        longer = f"{cut} prompt(s) are longer than {model.prompt_limit} tokens"
        print(f"warning: {longer}; what lies beyond has no effect", file=sys.stderr)


def _facts(request: Request, settings: Settings) -> dict[str, Any]:
    """What a picture's metadata says of its making; paths as the user gave them."""
    return {
        "model": (settings.model or settings.unet or embedded_model_path()).name,
        "unet": os.fspath(request.unet) if request.unet else None,
        "lora": {os.fspath(adapter.path): adapter.weight for adapter in request.adapters},
        "steps": settings.sampling.steps,
        "guidance": settings.sampling.guidance_scale,
        "sampler": settings.sampler,
        "eta": settings.sampling.eta,
    }


def _describe(settings: Settings) -> str:
    steps, scale, eta = settings.sampling.steps, settings.sampling.guidance_scale, settings.sampling.eta
    sampler = "the pipeline's own sampler" if settings.sampler is None else settings.sampler.lower()
    guidance = "the pipeline's own guidance" if scale is None else f"guidance {scale:g}"
    return f"{steps or 'its own'} steps, {guidance}, {sampler}{f', eta {eta:g}' if eta else ''}"


def _claim_folder(wanted: Path, overwrite: bool) -> Path:
    """Make ``wanted``; where it holds files already take ``wanted-2``, ``wanted-3``, … unless ``overwrite``.

    Raises:
        OutputError: it is a file, or cannot be written to.
    """
    wanted = wanted.expanduser()
    numbered = (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2))
    try:
        for folder in itertools.chain([wanted], numbered):
            folder.mkdir(parents=True, exist_ok=True)
            if overwrite or not any(folder.iterdir()):
                break
        return folder
    except OSError as error:
        raise OutputError(
            f"--output {wanted}: {error.strerror or error}; expected a folder that can be made and written to"
        ) from error


def _write_pictures(
    folder: Path, images: Any, pairs: Pairs, row: str, facts: Mapping[str, Any], rewards: Sequence[float] | None
) -> list[Path]:
    """One PNG a picture, named by number, prompt, seed and row; its text chunks: ``prompt``, ``settings`` (JSON)."""
    # "scale -1" and "scale 1" must not become one name
    suffix = f"_{slug(re.sub(r'-(?=[0-9.])', 'minus ', row))}" if row else ""
    paths = []
    for index, (picture, (prompt, seed)) in enumerate(zip(to_pictures(images), pairs, strict=True)):
        made = {"prompt": prompt, "seed": seed, **facts, "height": picture.height, "width": picture.width}
        if rewards is not None:
            made["reward"] = rewards[index]
        metadata = {"prompt": prompt, "settings": json.dumps(made, ensure_ascii=False)}
        paths.append(save_image(picture, folder / f"{index:04d}_{slug(prompt)}_seed{seed}{suffix}.png", metadata))
    return paths


def _write_grid(
    folder: Path, images: Mapping[str, Any], rewards: Mapping[str, Sequence[float]], pairs: Pairs, title: str
) -> Path:
    """``grid.png``: a row for each variant; a single one as prompts by seeds."""
    if len(pairs) > _MOST_IN_GRID:
        title += f"; the first {_MOST_IN_GRID} of {len(pairs)}"
        pairs = pairs[:_MOST_IN_GRID]
    seeds = [seed for _, seed in pairs]
    different = len(set(seeds))
    single = len(images) == 1
    grid = picture_grid(
        {"" if single else label: part[: len(pairs)] for label, part in images.items()},
        [prompt if different == 1 else f"{prompt} (seed {seed})" for prompt, seed in pairs],
        rewards={"" if single else label: part[: len(pairs)] for label, part in rewards.items()},
        seeds=seeds,
        title=title,
        max_columns=different if single and 1 < different <= 10 else None,
    )
    return save_image(grid, folder / "grid.png")


def _print_rewards(rewards: Mapping[str, Sequence[float]], name: str) -> None:
    """The means, and gains over the base model where it is there; each picture's stands in the grid and in its file."""
    base = rewards.get("base")
    for label, values in rewards.items():
        mean = fmean(values)
        line = f"mean reward ({name}), {label}: {format_number(mean)}"
        if base and label != "base":
            better = sum(value > other for value, other in zip(values, base, strict=True))
            line += f" ({format_gain(mean - fmean(base), mean)}; above base on {better} of {len(values)})"
        print(line)


def slug(text: str) -> str:
    """Letters and digits of any script, at most 40 of them: safe in a file name everywhere."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-.")[:40].rstrip("-.") or "picture"
