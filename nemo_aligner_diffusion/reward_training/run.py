"""One reward training, from the run directory to the ``.nemo`` and the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import EarlyStopping

from nemo_aligner_diffusion.config.checks import precision_name, world_size
from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.parallel.broadcast import load_once, on_every_process
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.reward_training.best_weights import BestWeights
from nemo_aligner_diffusion.reward_training.clip_files import (
    SAVE_DTYPES,
    load_hugging_face_clip,
    load_nemo_clip,
    save_clip_reward,
)
from nemo_aligner_diffusion.reward_training.configuration import accumulation
from nemo_aligner_diffusion.reward_training.outcome import write_reward_report
from nemo_aligner_diffusion.reward_training.preference_clip import PreferenceCLIP, TrainedParts
from nemo_aligner_diffusion.reward_training.preference_data import PreferenceDataModule
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
from nemo_aligner_diffusion.runtime.faults import RunWatch, watched
from nemo_aligner_diffusion.training.callbacks.interruption import Interruption
from nemo_aligner_diffusion.training.callbacks.metrics import MetricsCSV
from nemo_aligner_diffusion.training.callbacks.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.training.callbacks.progress import TrainingProgress
from nemo_aligner_diffusion.training.optimizers import build_optimizer
from nemo_aligner_diffusion.training.run_frame import RunFrame, plain, quiet
from nemo_aligner_diffusion.training.schedules import build_schedule

log = logging.getLogger(__name__)

COLUMNS = ("step", "loss", "accuracy", "ties", "grad_norm", "lr", "logit_scale", "images_per_second")
VALIDATION_COLUMNS = ("step", "loss", "accuracy", "calibration_error", "pairs", "ties")


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


def run_reward_training(cfg: DictConfig, interruption: Interruption | None = None) -> int:
    """Train as ``cfg`` says and leave the run directory complete.

    ``export/reward.nemo`` holds the weights of the best validation, or the last ones where there was none.

    Args:
        cfg: from :func:`~nemo_aligner_diffusion.reward_training.configuration.load_reward_config`.
        interruption: takes signals already, while the program loads.

    Returns:
        exit code: 0, or 130/143 after Ctrl-C/SIGTERM (export and report are there all the same); 0 or 75 where the run
        goes on in another start of its Slurm job (without them).

    Raises:
        AlignerError: with one clear message; the run directory says ``failed``.
    """
    quiet()
    with watched(cfg) as watch:
        return _run(cfg, watch, interruption or Interruption())


def _run(cfg: DictConfig, watch: RunWatch, interruption: Interruption) -> int:
    frame = RunFrame.open(cfg, watch, interruption)
    directory = frame.directory
    watch.phase("loading the model")
    reward = load_once(lambda: load_start(cfg), frame.device)
    watch.phase("opening the data")
    data = build_data(cfg, reward)
    on_every_process(lambda: data.setup("fit"))  # names a missing or unreadable shard before anything is written
    policy = NonFinitePolicy(cfg.model.nan_policy.max_consecutive)
    layout = Layout(data=world_size(cfg))
    module = build_module(cfg, reward, policy, Parallelism(layout))

    frame.begin()
    validates = data.validation is not None and cfg.trainer.val_check_interval > 0
    best = BestWeights(cfg.trainer.early_stopping.metric)
    stopping = cfg.trainer.early_stopping
    callbacks: list[pl.Callback] = [
        best,
        MetricsCSV(directory.path, COLUMNS, VALIDATION_COLUMNS),
        PreferenceProgress(),
    ]
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
    interval = cfg.trainer.val_check_interval if validates else 0
    # what early stopping and the best weights learn from a validation is not in the checkpoint that comes before it
    callbacks += frame.callbacks(cfg.trainer.save_interval, interval, validate_again=True)
    trainer = frame.trainer(cfg.trainer, layout, accumulation(cfg), callbacks, validates)
    if trainer.is_global_zero:
        trained = sum(p.numel() for _, p in module.trainable_parameters())
        log.info("training %s of %s parameters", f"{trained:,}", f"{sum(p.numel() for p in module.parameters()):,}")
        log.info("run directory: %s", directory.path)
    figures: dict[str, Any] = {}

    def train() -> None:
        torch.manual_seed(cfg.model.seed)
        trainer.fit(module, datamodule=data, ckpt_path=str(frame.resume.path) if frame.resume is not None else None)

    def validate() -> None:
        if validates and module.validated_step != trainer.global_step and not frame.cut_short:
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
        frame.record(trainer, best_step=best.step, skipped_steps=policy.skipped, non_finite_events=policy.events)

    def report() -> None:
        if cfg.report.enable and trainer.is_global_zero:
            log.info("report: %s", write_reward_report(directory.path, figures))

    return frame.carry_out(trainer, cfg.trainer.max_steps, train, [validate, export, record, report])


def load_start(cfg: DictConfig) -> CLIPReward:
    """The CLIP that the training starts from: in float32, named ``clip``."""
    if cfg.model.from_pretrained is not None:
        return load_hugging_face_clip(cfg.model.from_pretrained)
    return load_nemo_clip(cfg.model.restore_from_path or embedded_reward_path(), cfg.model.tokenizer)


def build_data(cfg: DictConfig, reward: CLIPReward) -> PreferenceDataModule:
    """The pairs of training and validation, prepared as the model wants its pictures."""
    section = cfg.model.data
    return PreferenceDataModule(
        plain(section.train.webdataset.local_root_path),
        plain(section.validation.webdataset.local_root_path),
        preprocessing=reward.preprocessing,
        micro_batch_size=cfg.model.micro_batch_size,
        global_batch_size=cfg.model.global_batch_size,
        seed=cfg.model.seed,
        shuffle_buffer=section.shuffle_buffer,
        num_workers=section.num_workers,
        epochs=cfg.trainer.max_epochs,
        on_bad_sample=section.on_bad_sample,
        on_bad_shard=section.on_bad_shard,
        index_folder=section.index_folder,
        worker_timeout_seconds=section.worker_timeout_seconds,
    )


def build_module(
    cfg: DictConfig, reward: CLIPReward, guard: NonFinitePolicy | None = None, parallel: Parallelism | None = None
) -> PreferenceCLIP:
    """The Lightning module with its optimizer and schedule."""

    def optimizer(parameters: list[tuple[str, torch.nn.Parameter]]) -> tuple[torch.optim.Optimizer, Any]:
        # Lightning lets no fused optimizer be clipped under a loss scale
        built = build_optimizer(parameters, cfg.model.optim, allow_fused=precision_name(cfg) != "16-mixed")
        return built, build_schedule(built, cfg.model.optim.sched, cfg.trainer.max_steps)

    parts = TrainedParts(
        vision_layers=0 if cfg.model.vision.freeze else cfg.model.vision.trainable_layers,
        text_layers=0 if cfg.model.text.freeze else cfg.model.text.trainable_layers,
        projections=cfg.model.projections,
        logit_scale=cfg.model.logit_scale,
    )
    return PreferenceCLIP(
        reward,
        parts,
        optimizer,
        activation_checkpointing=cfg.model.activation_checkpointing,
        guard=guard,
        parallel=parallel,
    )
