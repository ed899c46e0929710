"""One training run, from the run directory to the report; every entry script ends here."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from typing import Any

import diffusers
import pytorch_lightning as pl
import torch
import transformers
from omegaconf import DictConfig, OmegaConf

from nemo_aligner_diffusion.data.datamodule import PromptDataModule
from nemo_aligner_diffusion.data.prompts import read_prompts
from nemo_aligner_diffusion.embedded_assets import embedded_prompts_path, embedded_reward_path
from nemo_aligner_diffusion.errors import AlignerError
from nemo_aligner_diffusion.evaluation.diversity import Embedder
from nemo_aligner_diffusion.evaluation.report import write_report
from nemo_aligner_diffusion.rewards import build_reward, restore_reward
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.training.assemble import build_model, build_module, precision_name
from nemo_aligner_diffusion.training.checkpointing import TrainingCheckpoint, find_resume_point
from nemo_aligner_diffusion.training.config import derived, loop_section
from nemo_aligner_diffusion.training.ema import EMACallback
from nemo_aligner_diffusion.training.export import export_weights
from nemo_aligner_diffusion.training.interruption import (
    Interruption,
    InterruptionCallback,
    RunTimer,
    run_then_close,
)
from nemo_aligner_diffusion.training.metrics_logging import MetricsCSV, build_loggers
from nemo_aligner_diffusion.training.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.training.progress import TrainingProgress
from nemo_aligner_diffusion.training.reward_normalization import RewardNormalization
from nemo_aligner_diffusion.training.run_directory import RunDirectory
from nemo_aligner_diffusion.training.validation import ValidationFiles, validation_loader

log = logging.getLogger(__name__)


class RunData(PromptDataModule):
    """Training prompts by shards; validation prompts as a fixed list of (prompt, seed) pairs."""

    def __init__(self, validation_prompts: list[str], seeds: list[int], **training: Any) -> None:
        super().__init__(**training)
        self.validation_prompts = validation_prompts
        self.validation_seeds = seeds

    def val_dataloader(self) -> Any:
        if not self.validation_prompts:
            return []
        rank, size = self.data_parallel
        return validation_loader(self.validation_prompts, self.validation_seeds, self.validation_batch_size, rank, size)


def run_training(cfg: DictConfig) -> int:
    """Train as ``cfg`` says and leave the run directory complete.

    Args:
        cfg: from :func:`~nemo_aligner_diffusion.training.config.load_config`.

    Returns:
        exit code: 0, or 130/143 after Ctrl-C/SIGTERM (export and report are there all the same).

    Raises:
        AlignerError: with one clear message; the run directory says ``failed``.
    """
    _quiet()
    directory = RunDirectory.prepare(cfg.exp_manager, default_name=cfg.name)
    resume = find_resume_point(directory.checkpoints) if cfg.exp_manager.resume_if_exists else None
    if resume is not None:
        for key, (before, now) in directory.changed_keys(cfg).items():
            log.warning("resuming with %s = %s; it was %s", key, now, before)
    data = _build_data(cfg)
    data.setup("fit")  # names a missing or unreadable shard before anything is loaded or written
    started = time.perf_counter()
    loop = loop_section(cfg)
    policy = NonFinitePolicy(cfg.model.nan_policy.max_consecutive)
    model = build_model(cfg)
    reward = build_reward(cfg.rm)
    module = build_module(cfg, model, reward, loop.max_steps, policy)
    module.validation_prompts = [prompt for prompt in data.validation_prompts for _ in data.validation_seeds]
    log.info("model and reward loaded in %.1f s", time.perf_counter() - started)

    directory.write_config(cfg)
    directory.begin()
    interruption = Interruption()
    ema = EMACallback.from_config(cfg.exp_manager.ema)
    checkpoint = TrainingCheckpoint(
        directory.checkpoints, every_n_optimizer_steps=loop.save_interval or None, resume=resume
    )
    callbacks: list[pl.Callback] = [
        RewardNormalization(directory.path, resumed=resume is not None),
        *([ema] if ema is not None else []),
        ValidationFiles(directory.path, _embedder(cfg, reward), cfg.report.max_prompts),
        MetricsCSV(directory.path),
        TrainingProgress(),
        InterruptionCallback(interruption),
        checkpoint,
    ]
    timer = RunTimer.from_config(cfg.exp_manager)
    if timer is not None:
        callbacks.append(timer)
    trainer = _build_trainer(cfg, directory, callbacks, resume.step if resume is not None else 0)
    if trainer.is_global_zero:
        log.info("run directory: %s", directory.path)

    def train() -> None:
        torch.manual_seed(cfg.model.seed + trainer.global_rank)  # dropout masks differ between ranks
        trainer.fit(module, datamodule=data, ckpt_path=str(resume.path) if resume is not None else None)

    def validate() -> None:
        due = data.validation_prompts and module.validated_step != trainer.global_step
        if due and interruption.requested is None:
            trainer.validate(module, datamodule=data, verbose=False)

    def export() -> None:
        if trainer.is_global_zero:
            with ema.averaged_weights(module) if ema is not None else contextlib.nullcontext():
                log.info("exported %s", export_weights(model, directory.export))

    def record() -> None:
        if model.truncated_prompts and trainer.is_global_zero:
            log.warning(
                "%d prompt%s longer than the text encoder's limit of %d tokens, and truncated",
                model.truncated_prompts,
                " was" if model.truncated_prompts == 1 else "s were",
                model.tokenizer.model_max_length,
            )
        directory.finish(
            "interrupted" if interruption.requested else "finished",
            step=trainer.global_step,
            truncated_prompts=model.truncated_prompts,
            skipped_steps=policy.skipped,
            non_finite_events=policy.events,
        )

    def report() -> None:
        if cfg.report.enable and trainer.is_global_zero:
            log.info("report: %s", write_report(directory.path))

    try:
        return run_then_close(interruption, train, [validate, export, record, report])
    except Exception as error:
        directory.finish("failed", step=trainer.global_step, error=str(error))
        if isinstance(error, AlignerError) and trainer.global_step > 0:  # what was learnt so far is not lost
            with contextlib.suppress(Exception):
                export()
                report()
        raise


def _build_data(cfg: DictConfig) -> RunData:
    section = cfg.model.data
    validation = section.validation
    if loop_section(cfg).val_check_interval == 0:
        prompts: list[str] = []
    elif validation.prompts is not None:
        prompts = list(validation.prompts)
    else:
        # a user's own prompts are validated on their first ones: the embedded ones say nothing about them
        source = (
            _plain(validation.webdataset.local_root_path)
            or _plain(section.train.webdataset.local_root_path)
            or str(embedded_prompts_path("validation"))
        )
        prompts = read_prompts(source, limit=validation.max_prompts, on_bad_sample=section.on_bad_sample)
    return RunData(
        prompts[: validation.max_prompts],
        list(validation.seeds),
        train=_plain(section.train.webdataset.local_root_path) or str(embedded_prompts_path("train")),
        micro_batch_size=cfg.model.micro_batch_size,
        global_batch_size=cfg.model.global_batch_size,
        seed=cfg.model.seed,
        shuffle_buffer=section.shuffle_buffer,
        num_workers=section.num_workers,
        epochs=loop_section(cfg).max_epochs,
        on_bad_sample=section.on_bad_sample,
        validation_batch_size=max(cfg.model.micro_batch_size, 8),
    )


def _build_trainer(
    cfg: DictConfig, directory: RunDirectory, callbacks: list[pl.Callback], resumed_step: int
) -> pl.Trainer:
    loop, batches = loop_section(cfg), derived(cfg)
    interval = loop.val_check_interval * batches.accumulation
    return pl.Trainer(
        accelerator=cfg.trainer.accelerator,
        devices=_plain(cfg.trainer.devices),
        num_nodes=cfg.trainer.num_nodes,
        precision=precision_name(cfg),  # type: ignore[arg-type]
        strategy="ddp" if batches.world_size > 1 else "auto",
        max_steps=loop.max_steps,
        max_epochs=1,  # one pass of the loader is all passes over the prompts
        accumulate_grad_batches=batches.accumulation,
        gradient_clip_val=loop.gradient_clip_val or None,
        val_check_interval=interval or None,
        check_val_every_n_epoch=None,
        limit_val_batches=loop.limit_val_batches if interval else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        logger=build_loggers(cfg, directory.path, resumed_step),
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_model_summary=False,
    )


def _embedder(cfg: DictConfig, reward: Reward) -> Embedder | None:
    """What measures diversity: the reward itself where it embeds pictures, else the CLIP of the embedded model."""
    for module in reward.modules():
        if hasattr(module, "embed_images"):
            return module  # type: ignore[return-value]
    if cfg.model.from_pretrained is None:
        return restore_reward(embedded_reward_path())  # type: ignore[return-value]
    return None


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _quiet() -> None:
    """Our own lines on the screen, and of the libraries only what concerns the user."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("nemo_aligner_diffusion").setLevel(logging.INFO)
    for noisy in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    for pattern in (
        ".*does not have many workers.*",
        ".*isinstance.treespec.*",
        ".*IterableDataset.*__len__.*",
        ".*in eval mode at the start of training.*",  # frozen parts, on purpose
    ):
        warnings.filterwarnings("ignore", pattern)
