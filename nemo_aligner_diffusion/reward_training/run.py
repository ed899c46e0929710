"""One reward training, from the run directory to the ``.nemo`` and the report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import EarlyStopping

from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.reward_training.best_weights import BestWeights
from nemo_aligner_diffusion.reward_training.clip_files import (
    SAVE_DTYPES,
    load_hugging_face_clip,
    load_nemo_clip,
    save_clip_reward,
)
from nemo_aligner_diffusion.reward_training.config import accumulation
from nemo_aligner_diffusion.reward_training.preference_clip import PreferenceCLIP, TrainedParts
from nemo_aligner_diffusion.reward_training.preference_data import PreferenceDataModule
from nemo_aligner_diffusion.reward_training.report import write_reward_report
from nemo_aligner_diffusion.rewards.clip import CLIPReward
from nemo_aligner_diffusion.training.checkpointing import ResumePoint, TrainingCheckpoint, find_resume_point
from nemo_aligner_diffusion.training.interruption import Interruption, InterruptionCallback, RunTimer, run_then_close
from nemo_aligner_diffusion.training.metrics_logging import MetricsCSV, build_loggers
from nemo_aligner_diffusion.training.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.training.optimizers import build_optimizer
from nemo_aligner_diffusion.training.progress import TrainingProgress
from nemo_aligner_diffusion.training.run_directory import RunDirectory
from nemo_aligner_diffusion.training.schedules import build_schedule

log = logging.getLogger(__name__)

COLUMNS = ("step", "loss", "accuracy", "ties", "grad_norm", "lr", "logit_scale", "images_per_second")
VALIDATION_COLUMNS = ("step", "loss", "accuracy", "calibration_error", "pairs", "ties")
_PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


class PreferenceProgress(TrainingProgress):
    """:class:`TrainingProgress` with the figures of this training."""

    def describe(self, figures: Mapping[str, Any]) -> str:
        if "loss" not in figures:
            return ""
        speed = figures["images"] / figures["seconds"] if figures.get("seconds") else float("nan")
        return f"loss {figures['loss']:.4f}  accuracy {figures['accuracy']:.3f}  {speed:.0f} images/s"

    def describe_validation(self, figures: Mapping[str, Any]) -> str:
        return (
            f"loss {figures['loss']:.4f}, accuracy {figures['accuracy']:.3f} without {figures['ties']} of "
            f"{figures['pairs']} pairs that are ties, calibration error {figures['calibration_error']:.3f}"
        )


def run_reward_training(cfg: DictConfig) -> int:
    """Train as ``cfg`` says and leave the run directory complete.

    ``export/reward.nemo`` holds the weights of the best validation, or the last ones where there was none.

    Args:
        cfg: from :func:`~nemo_aligner_diffusion.reward_training.config.load_reward_config`.

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
    reward = load_start(cfg)
    data = build_data(cfg, reward)
    data.setup("fit")  # names a missing or unreadable shard before anything is written
    policy = NonFinitePolicy(cfg.model.nan_policy.max_consecutive)
    module = build_module(cfg, reward, policy)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    log.info("training %s of %s parameters", f"{trained:,}", f"{sum(p.numel() for p in module.parameters()):,}")

    directory.write_config(cfg)
    directory.begin()
    interruption = Interruption()
    validates = data.validation is not None and cfg.trainer.val_check_interval > 0
    best = BestWeights(cfg.trainer.early_stopping.metric)
    callbacks: list[pl.Callback] = [
        best,
        MetricsCSV(directory.path, COLUMNS, VALIDATION_COLUMNS),
        PreferenceProgress(),
        InterruptionCallback(interruption),
        TrainingCheckpoint(
            directory.checkpoints, every_n_optimizer_steps=cfg.trainer.save_interval or None, resume=resume
        ),
    ]
    stopping = cfg.trainer.early_stopping
    if validates and stopping.patience > 0:
        callbacks.append(
            EarlyStopping(
                f"val_{stopping.metric}",
                mode="min" if stopping.metric == "loss" else "max",
                patience=stopping.patience,
                min_delta=stopping.min_delta,
                check_finite=False,  # an accuracy is NaN where all pairs are ties
                check_on_train_epoch_end=False,
            )
        )
    timer = RunTimer.from_config(cfg.exp_manager)
    if timer is not None:
        callbacks.append(timer)
    trainer = _build_trainer(cfg, directory, callbacks, resume, validates)
    if trainer.world_size > 1:
        policy.any_rank = lambda bad: trainer.strategy.reduce_boolean_decision(bad, all=False)
    if trainer.is_global_zero:
        log.info("run directory: %s", directory.path)
    figures: dict[str, Any] = {}

    def train() -> None:
        torch.manual_seed(cfg.model.seed)
        trainer.fit(module, datamodule=data, ckpt_path=str(resume.path) if resume is not None else None)

    def validate() -> None:
        if validates and module.validated_step != trainer.global_step and interruption.requested is None:
            trainer.validate(module, datamodule=data, verbose=False)

    def export() -> None:
        figures["optimizer steps"] = trainer.global_step
        figures.update({f"last validation: {name}": value for name, value in module.last_validation.items()})
        if best.restore(module):
            figures[f"best validation {best.metric}"] = best.value
            figures["reward.nemo holds the weights of step"] = best.step
        if trainer.is_global_zero:
            target = save_clip_reward(
                module.reward,
                directory.path / "export" / "reward.nemo",
                dtype=SAVE_DTYPES[cfg.model.save_dtype],
                extra={"trained_by": "nemo_aligner_diffusion.reward_training", "trained_steps": trainer.global_step},
            )
            log.info("exported %s", target)

    def record() -> None:
        directory.finish(
            "interrupted" if interruption.requested else "finished",
            step=trainer.global_step,
            best_step=best.step,
            skipped_steps=policy.skipped,
            non_finite_events=policy.events,
        )

    def report() -> None:
        if cfg.report.enable and trainer.is_global_zero:
            log.info("report: %s", write_reward_report(directory.path, figures))

    try:
        return run_then_close(interruption, train, [validate, export, record, report])
    except Exception as error:
        directory.finish("failed", step=trainer.global_step, error=str(error))
        raise


def load_start(cfg: DictConfig) -> CLIPReward:
    """The CLIP that the training starts from: in float32, named ``clip``."""
    if cfg.model.from_pretrained is not None:
        reward = load_hugging_face_clip(cfg.model.from_pretrained)
    else:
        reward = load_nemo_clip(cfg.model.restore_from_path or embedded_reward_path(), cfg.model.tokenizer)
    return reward


def build_data(cfg: DictConfig, reward: CLIPReward) -> PreferenceDataModule:
    """The pairs of training and validation, prepared as the model wants its pictures."""
    section = cfg.model.data
    return PreferenceDataModule(
        _plain(section.train.webdataset.local_root_path),
        _plain(section.validation.webdataset.local_root_path),
        image_size=reward.image_size,
        interpolation=reward.interpolation,
        micro_batch_size=cfg.model.micro_batch_size,
        global_batch_size=cfg.model.global_batch_size,
        seed=cfg.model.seed,
        shuffle_buffer=section.shuffle_buffer,
        num_workers=section.num_workers,
        epochs=cfg.trainer.max_epochs,
        on_bad_sample=section.on_bad_sample,
    )


def build_module(cfg: DictConfig, reward: CLIPReward, guard: NonFinitePolicy | None = None) -> PreferenceCLIP:
    """The Lightning module with its optimizer and schedule."""
    fused = cfg.trainer.precision not in ("16", "16-mixed")

    def optimizer(parameters: list[tuple[str, torch.nn.Parameter]]) -> tuple[torch.optim.Optimizer, Any]:
        built = build_optimizer(parameters, cfg.model.optim, allow_fused=fused)
        return built, build_schedule(built, cfg.model.optim.sched, cfg.trainer.max_steps)

    parts = TrainedParts(
        vision_layers=0 if cfg.model.vision.freeze else cfg.model.vision.trainable_layers,
        text_layers=0 if cfg.model.text.freeze else cfg.model.text.trainable_layers,
        projections=cfg.model.projections,
        logit_scale=cfg.model.logit_scale,
    )
    return PreferenceCLIP(
        reward, parts, optimizer, activation_checkpointing=cfg.model.activation_checkpointing, guard=guard
    )


def _build_trainer(
    cfg: DictConfig,
    directory: RunDirectory,
    callbacks: list[pl.Callback],
    resume: ResumePoint | None,
    validates: bool,
) -> pl.Trainer:
    loop, batches = cfg.trainer, accumulation(cfg)
    ranks = loop.num_nodes * (loop.devices if isinstance(loop.devices, int) else len(loop.devices))
    return pl.Trainer(
        accelerator=loop.accelerator,
        devices=_plain(loop.devices),
        num_nodes=loop.num_nodes,
        precision=_PRECISIONS.get(loop.precision, loop.precision),
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=loop.max_steps,
        max_epochs=1,  # one pass of the loader is all passes over the pairs
        accumulate_grad_batches=batches,
        gradient_clip_val=loop.gradient_clip_val or None,
        val_check_interval=loop.val_check_interval * batches if validates else None,
        check_val_every_n_epoch=None,
        limit_val_batches=loop.limit_val_batches if validates else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=loop.log_every_n_steps,
        logger=build_loggers(cfg, directory.path, resume.step if resume is not None else 0),
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_model_summary=False,
    )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _quiet() -> None:
    """Our own lines on the screen, and of the libraries only what concerns the user."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("nemo_aligner_diffusion").setLevel(logging.INFO)
    for noisy in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for pattern in (
        ".*does not have many workers.*",
        ".*isinstance.treespec.*",
        ".*IterableDataset.*__len__.*",
        ".*in eval mode at the start of training.*",
    ):
        warnings.filterwarnings("ignore", pattern)
