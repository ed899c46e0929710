"""One reward training, from the run directory to the ``.nemo`` and the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping

from nemo_aligner_diffusion.data.preferences.reward_pairs import PreferenceDataModule
from nemo_aligner_diffusion.parallel.broadcast import load_once, on_every_process
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.parallel.non_finite import NonFinitePolicy
from nemo_aligner_diffusion.parallel.parallelism import Parallelism
from nemo_aligner_diffusion.reward_training.best_weights import BestWeights
from nemo_aligner_diffusion.reward_training.clip_files import (
    SAVE_DTYPES,
    load_start,
    save_clip_reward,
)
from nemo_aligner_diffusion.reward_training.configuration import RewardTrainingSettings
from nemo_aligner_diffusion.reward_training.outcome import write_reward_report
from nemo_aligner_diffusion.reward_training.preference_clip import PreferenceCLIP
from nemo_aligner_diffusion.runtime.messages import log_to_screen
from nemo_aligner_diffusion.runtime.signals import Interruption
from nemo_aligner_diffusion.training.build import optimizer_factory
from nemo_aligner_diffusion.training.callbacks.metrics import MetricsCSV
from nemo_aligner_diffusion.training.callbacks.progress import TrainingProgress
from nemo_aligner_diffusion.training.run_frame import RunFrame

log = logging.getLogger(__name__)

COLUMNS = ("step", "loss", "accuracy", "ties", "grad_norm", "lr", "logit_scale", "images_per_second")
VALIDATION_COLUMNS = ("step", "loss", "accuracy", "calibration_error", "pairs", "ties")


class ConfiguredEarlyStopping(EarlyStopping):
    """Goes on from a checkpoint with the patience that is configured now."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})


def run_reward_training(cfg: Mapping[str, Any], interruption: Interruption | None = None) -> int:
    """Train as ``cfg`` says and leave the run directory complete.

    ``export/reward.nemo`` holds the weights of the best validation, or the last ones where there was none.

    Args:
        cfg: from :func:`~nemo_aligner_diffusion.reward_training.configuration.load_reward_config`.
        interruption, returned code, errors: as of :func:`~nemo_aligner_diffusion.training.run.run_training`.
    """
    log_to_screen()
    settings = RewardTrainingSettings.of(cfg)
    with RunFrame.open(settings, interruption or Interruption()) as frame:
        return _run(settings, frame)


def _run(settings: RewardTrainingSettings, frame: RunFrame) -> int:
    loop, section = settings.loop, settings.model
    directory, stopping = frame.directory, loop.early_stopping
    frame.watch.phase("loading the model")
    reward = load_once(lambda: load_start(section), frame.device)
    frame.watch.phase("opening the data")
    data = PreferenceDataModule(
        section.data.train_path,
        section.data.validation_path,
        prepare=reward.preprocessing.square,
        micro_batch_size=section.micro_batch_size,
        global_batch_size=section.global_batch_size,
        seed=section.seed,
        epochs=loop.max_epochs,
        **section.data.reading,
    )
    on_every_process(lambda: data.setup("fit"))  # names a missing or unreadable shard before anything is written
    policy = NonFinitePolicy(section.nan_policy.max_consecutive)
    layout = Layout(data=settings.trainer.world_size)
    module = PreferenceCLIP(
        reward,
        section,
        optimizer_factory(section.optim, settings.trainer, loop.max_steps),
        activation_checkpointing=section.activation_checkpointing,
        guard=policy,
        parallel=Parallelism(layout),
    )

    frame.begin(module, section.optim.name)
    validates = data.validation is not None and loop.val_check_interval > 0
    best = BestWeights(stopping.metric)
    callbacks: list[pl.Callback] = [
        best,
        MetricsCSV(directory.path, COLUMNS, VALIDATION_COLUMNS),
        TrainingProgress({"loss": "loss", "accuracy": "accuracy"}),
    ]
    if validates and stopping.patience > 0:
        callbacks.append(
            ConfiguredEarlyStopping(
                f"val_{stopping.metric}",
                mode="min" if stopping.metric == "loss" else "max",
                patience=stopping.patience,
                min_delta=stopping.min_delta,
                check_finite=False,  # an accuracy is NaN where all pairs are ties
                check_on_train_epoch_end=False,
            )
        )
    # what early stopping and the best weights learn from a validation is not in the checkpoint that comes before it
    trainer = frame.make_trainer(
        loop, layout, settings.accumulation, callbacks, validates=validates, validate_again=True
    )
    if trainer.is_global_zero:
        trained = sum(p.numel() for _, p in module.trainable_parameters())
        log.info("training %s of %s parameters", f"{trained:,}", f"{sum(p.numel() for p in module.parameters()):,}")
    figures: dict[str, Any] = {}

    def train() -> None:
        frame.fit(module, data, section.seed)

    def validate() -> None:
        if validates:
            frame.validate(module, data)

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
                dtype=SAVE_DTYPES[section.save_dtype],
                extra={"trained_by": "nemo_aligner_diffusion.reward_training", "trained_steps": trainer.global_step},
            )
            log.info("exported %s", target)

    def record() -> None:
        frame.record(best_step=best.step, skipped_steps=policy.skipped, non_finite_events=policy.events)

    def report() -> None:
        if settings.report.enable:
            frame.report(lambda: write_reward_report(directory.path, figures))

    return frame.carry_out(train, [validate, export, record, report])
