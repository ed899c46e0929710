"""One training run, from the run directory to the report; every entry script ends here."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from nemo_aligner_diffusion.algorithms.base import TrainingMethod
from nemo_aligner_diffusion.algorithms.policy.ddpo import DDPO
from nemo_aligner_diffusion.algorithms.preference.self_made import FOLDER, own_preferences
from nemo_aligner_diffusion.algorithms.tuning import DenoiserTuning
from nemo_aligner_diffusion.data.datamodule import PromptDataModule, StreamDataModule
from nemo_aligner_diffusion.data.paths import PathSpec
from nemo_aligner_diffusion.data.preferences.pairs import PairDataModule
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.diffusion.recognition import EMBEDDED, recognise
from nemo_aligner_diffusion.embedded_assets import embedded_prompts_path, embedded_reward_path
from nemo_aligner_diffusion.evaluation.metrics.base import training_columns, validation_figures
from nemo_aligner_diffusion.evaluation.report import write_report
from nemo_aligner_diffusion.parallel.broadcast import load_once, on_every_process
from nemo_aligner_diffusion.parallel.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.rewards import build_reward, restore_reward
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.registry import import_paths
from nemo_aligner_diffusion.runtime.files import write_atomic
from nemo_aligner_diffusion.runtime.messages import log_to_screen
from nemo_aligner_diffusion.runtime.signals import Interruption
from nemo_aligner_diffusion.runtime.startup import Startup
from nemo_aligner_diffusion.training.build import build_model, build_module
from nemo_aligner_diffusion.training.callbacks.ema import EMACallback
from nemo_aligner_diffusion.training.callbacks.gradient_weight import GradientWeightFile
from nemo_aligner_diffusion.training.callbacks.metrics import MetricsCSV
from nemo_aligner_diffusion.training.callbacks.profile import Profile
from nemo_aligner_diffusion.training.callbacks.progress import TrainingProgress
from nemo_aligner_diffusion.training.callbacks.reward_normalization import RewardNormalization
from nemo_aligner_diffusion.training.callbacks.startup import StartupCallback
from nemo_aligner_diffusion.training.callbacks.validation import ValidationFiles, validation_loader
from nemo_aligner_diffusion.training.export import export_weights
from nemo_aligner_diffusion.training.run_frame import RunFrame
from nemo_aligner_diffusion.training.settings import ModelSettings, RunSettings
from nemo_aligner_diffusion.training.trial import try_out

log = logging.getLogger(__name__)


class _ValidatedData(StreamDataModule):
    """What is trained on by shards; validation prompts as a fixed list of (prompt, seed) pairs."""

    def __init__(self, validation_prompts: list[str], seeds: list[int], **training: Any) -> None:
        super().__init__(**training)
        self.validation_prompts = validation_prompts
        self.validation_seeds = seeds

    def val_dataloader(self) -> Any:
        if not self.validation_prompts:
            return []
        rank, size = self.data_parallel
        return validation_loader(self.validation_prompts, self.validation_seeds, self.validation_batch_size, rank, size)


class RunData(_ValidatedData, PromptDataModule):
    """Prompts."""


class RunPairs(_ValidatedData, PairDataModule):
    """Pairs of pictures."""


@dataclass(frozen=True)
class Given:
    """What a program hands over as objects in place of what the configuration names.

    Attributes:
        pipe: a pipeline; its denoiser itself is tuned.
        reward: tried once on pictures of one sampling step before the first step is paid for.
        method: its settings and its rule.
        prompts: name of a file → the prompts that it is to hold, in the run directory; the configuration names it.
        silent: no progress.
        keep: write checkpoints, export and report.
        callbacks: called after the run's own.
    """

    pipe: Any = None
    reward: Reward | None = None
    method: TrainingMethod | None = None
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    silent: bool = False
    keep: bool = True
    callbacks: Sequence[pl.Callback] = ()


@dataclass(frozen=True)
class Ended:
    """A run that has ended: its exit code, what it tuned, on which device, and how far it came."""

    code: int
    module: DenoiserTuning
    device: torch.device
    directory: Path
    step: int


def run_training(
    cfg: Mapping[str, Any] | RunSettings, interruption: Interruption | None = None, startup: Startup | None = None
) -> int:
    """Train as ``cfg`` says and leave the run directory complete.

    A program of several processes that calls this should leave by
    :func:`~nemo_aligner_diffusion.runtime.ending.end`, which says why.

    Args:
        cfg: from :func:`~nemo_aligner_diffusion.config.load.load_config`.
        interruption: takes signals already, while the program loads.
        startup: has timed already what came before.

    Returns:
        exit code: 0, or 130/143 after Ctrl-C/SIGTERM (export and report are there all the same); 0 or 75 where the run
        goes on in another start of its Slurm job (without them).

    Raises:
        AlignerError: with one clear message; the run directory says ``failed``.
    """
    log_to_screen()
    return train(RunSettings.of(cfg), interruption or Interruption(), startup=startup).code


def train(
    settings: RunSettings, interruption: Interruption, given: Given | None = None, startup: Startup | None = None
) -> Ended:
    """:func:`run_training` for programs: with objects of theirs, and what was tuned in their hands."""
    startup = startup or Startup()
    with RunFrame.open(settings, interruption, startup.enter) as frame:
        return _train(settings, frame, startup, given or Given())


def _in_words(section: ModelSettings) -> str:
    """What families differ in most."""

    def said(value: Any) -> str:
        return "the pipeline's own" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    infer = section.infer
    size = said(None) if infer.width is infer.height is None else f"{said(infer.width)} x {said(infer.height)}"
    return (
        f"sampling steps {said(infer.inference_steps)}, guidance {said(infer.unconditional_guidance_scale)}, solver "
        f"{said(infer.sampler_type)}, size {size}, learning rate {said(section.optim.lr)}"
    )


def _train(settings: RunSettings, frame: RunFrame, startup: Startup, given: Given) -> Ended:
    directory, device, watch = frame.directory, frame.device, frame.watch
    loop, section, layout = settings.loop, settings.model, settings.layout
    section.optim.check_installed()
    # a user's own is imported before anything is loaded
    method = on_every_process(lambda: _method(settings, given))
    for name, prompts in given.prompts.items():
        frame.inputs.append(name)
        write_atomic(directory.path / name, "".join(f"{prompt}\n" for prompt in prompts))
    shards = section.data.train_path
    makes_pairs = settings.reads_pairs(method) and shards is None

    def opened() -> RunData | RunPairs:
        watch.phase("opening the data")
        startup.enter("data index")
        data = _build_data(settings, method, shards)
        on_every_process(lambda: data.setup("fit"))
        return data

    if not makes_pairs:  # names a missing or unreadable shard before anything is loaded or written
        data = opened()
    watch.phase("loading the model")
    startup.enter("building")
    policy = NonFinitePolicy(section.nan_policy.max_consecutive)
    model = build_model(settings, device, startup.phase, given.pipe)
    if directory.is_writer:
        log.info("model family: %s (%s)", section.family, section.family_because)
        log.info("in effect: %s (defaults: conf/family/%s.yaml)", _in_words(section), section.family)
    on_every_process(lambda: method.check(section.infer.inference_steps or model.default_steps))
    reward = given.reward.to(device) if given.reward is not None else _build_reward(settings.rm, device, startup)
    startup.enter("building")
    if makes_pairs:
        watch.phase("making pairs of pictures")
        startup.enter("making pairs")
        if not (directory.path / FOLDER).exists():
            frame.inputs.append(FOLDER)
        shards = str(own_preferences(model, directory.path, section.preference.self_made, section.seed))
        data = opened()
        startup.enter("building")
    module = build_module(settings, model, reward, loop.max_steps, policy, method)
    if isinstance(data, RunPairs):
        pairs = data
        on_every_process(lambda: pairs.fit_to(model, module.sampling))
    module.validation_prompts = [prompt for prompt in data.validation_prompts for _ in data.validation_seeds]
    module.measure_validation = functools.partial(
        validation_figures, embedder=_embedder(section, reward), rewarded=reward.measures
    )
    if given.reward is not None:
        size = section.micro_batch_size
        reading = section.data
        prompts = read_prompts(data.train, size, reading.on_bad_sample, reading.on_bad_shard, reading.prompt_key)
        try_out(module, list(itertools.islice(itertools.cycle(prompts), size)), method.kind == "reward")
    startup.enter("checking the pipeline")
    on_every_process(module.check_pipeline)
    startup.enter("run directory")
    frame.begin(module, section.optim.name)
    ema = EMACallback(settings.exp_manager.ema) if settings.exp_manager.ema.enable else None
    callbacks: list[pl.Callback] = [
        *([Profile(section.profile, directory.path)] if section.profile.is_on else []),
        StartupCallback(startup, directory.path),
        RewardNormalization(directory.path),
        *([ema] if ema is not None else []),
        ValidationFiles(directory.path, settings.report.max_prompts),
        GradientWeightFile(directory.path),
        MetricsCSV(directory.path, training_columns(module.reports)),
        TrainingProgress(module.shown, silent=given.silent),
        *given.callbacks,
    ]
    startup.enter("trainer")
    validates = bool(data.validation_prompts)
    accumulation, _ = batches_of(settings, method)
    trainer = frame.make_trainer(loop, layout, accumulation, callbacks, validates=validates, saves=given.keep)

    def fit() -> None:
        # dropout masks differ between samples, and are the same where processes share a sample
        frame.fit(module, data, section.seed + trainer.global_rank // layout.tensor)

    def validate() -> None:
        if validates:
            frame.validate(module, data)

    def export() -> None:
        if frame.interruption.at_once and not module.parallel.holds_whole_weights:
            log.warning("stopped in the middle of a step, each process at another place: nothing is exported")
            return
        with ema.averaged_weights(module) if ema is not None else contextlib.nullcontext():
            path = export_weights(model, directory.export, module.parallel, trainer.is_global_zero, trainer.global_step)
        if path is not None:
            log.info("exported %s", path)

    def record() -> None:
        if model.truncated_prompts and trainer.is_global_zero:
            log.warning(
                "%d prompt%s longer than the text encoder's limit of %d tokens, and truncated",
                model.truncated_prompts,
                " was" if model.truncated_prompts == 1 else "s were",
                model.prompt_limit,
            )
        frame.record(
            pipeline=model.described() | ({} if given.pipe is None else {"given": given.pipe.name_or_path or ""}),
            truncated_prompts=model.truncated_prompts,
            skipped_steps=policy.skipped,
            non_finite_events=policy.events,
        )

    def report() -> None:
        if settings.report.enable:
            frame.report(lambda: write_report(directory.path))

    def salvage() -> None:
        if module.parallel.holds_whole_weights:  # else all processes would have to take part
            export()
        report()

    closing = [validate, export, record, report] if given.keep else [validate, record]
    code = frame.carry_out(fit, closing, salvage if given.keep else lambda: None)
    if ema is not None:
        ema.settle(module)
    if given.pipe is not None:
        model.offload.end(model.device)
    return Ended(code, module, device, directory.path, trainer.global_step)


def _method(settings: RunSettings, given: Given) -> TrainingMethod:
    method, steps = given.method or settings.method(), settings.model.infer.inference_steps
    if steps is not None:
        method.check(steps)
    return method


def _build_reward(rm: Mapping[str, Any], device: torch.device, startup: Startup) -> Reward:
    """The reward on ``device``; its files are read once on each node, but code of the user's own runs everywhere."""
    with startup.phase("reward"):
        if any(import_paths(rm)):
            return on_every_process(lambda: build_reward(rm, device))
        return load_once(lambda: build_reward(rm), device)


def batches_of(settings: RunSettings, method: TrainingMethod) -> tuple[int, dict[str, int]]:
    """Batches of the loader an optimizer step, and their sizes. A policy gradient's is the whole share of a process,
    as rewards are compared over the global batch, and comes once for each pass over it."""
    sizes = settings.model
    if not isinstance(method, DDPO):
        return settings.accumulation, {"micro_batch_size": sizes.micro_batch_size}
    share = sizes.global_batch_size // settings.layout.data
    return 1, {"micro_batch_size": share, "repeats": method.inner_passes}


def _build_data(
    settings: RunSettings, method: TrainingMethod | None = None, shards: PathSpec | None = None
) -> RunData | RunPairs:
    """Of the run's method, and of ``shards``; ``None``: those that are named, else the embedded prompts."""
    section, sizes = settings.model.data, settings.model
    method, shards = method or settings.method(), shards or section.train_path
    pairs = settings.reads_pairs(method)
    if settings.loop.val_check_interval == 0:
        prompts: list[str] = []
    elif section.prompts is not None:
        prompts = list(section.prompts)
    else:
        # a user's own prompts are validated on their first ones: the embedded ones say nothing about them
        source = section.validation_path or section.train_path or str(embedded_prompts_path("validation"))
        bad = section.on_bad_sample, section.on_bad_shard
        prompts = read_prompts(source, section.max_prompts, *bad, section.prompt_key, distinct=pairs)
    build: Any = functools.partial(RunPairs, settings=sizes.preference) if pairs else RunData
    return build(
        prompts[: section.max_prompts],
        list(section.seeds),
        train=shards or str(embedded_prompts_path("train")),
        **batches_of(settings, method)[1],
        global_batch_size=sizes.global_batch_size,
        seed=sizes.seed,
        epochs=settings.loop.max_epochs,
        validation_batch_size=sizes.validation_batch_size,
        **({} if pairs else {"prompt_key": section.prompt_key}),
        **section.reading,
    )


def _embedder(section: ModelSettings, reward: Reward) -> Reward | None:
    """What measures diversity: the reward itself where it embeds pictures, else the CLIP of the embedded model."""
    for module in reward.modules():
        if hasattr(module, "embed_images"):
            return module  # type: ignore[return-value]
    if recognise(section).architecture == EMBEDDED:
        return restore_reward(embedded_reward_path())
    return None
