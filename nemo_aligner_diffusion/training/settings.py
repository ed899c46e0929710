"""All settings of a run: the sections of the packages, put together. No torch here.

:class:`RunSettings` is what a checked configuration becomes, once; code takes the section that it needs. A new class of
settings is named here as a part, or as a base where its keys stand beside others of one section.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from nemo_aligner_diffusion.algorithms.base import TrainingMethod
from nemo_aligner_diffusion.algorithms.custom import is_import_path
from nemo_aligner_diffusion.algorithms.registry import method_of, methods
from nemo_aligner_diffusion.algorithms.settings import RewardTuningSettings
from nemo_aligner_diffusion.data.preferences.settings import PairSettings
from nemo_aligner_diffusion.data.settings import PromptSettings
from nemo_aligner_diffusion.diffusion.recognition import EMBEDDED, recognise
from nemo_aligner_diffusion.diffusion.settings import WeightsSettings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.evaluation.settings import ReportSettings
from nemo_aligner_diffusion.formats.hub import is_hub_name
from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.parallel.settings import LayoutSettings
from nemo_aligner_diffusion.runtime.settings import (
    MachineSettings,
    RequeueSettings,
    RunDirectorySettings,
    WatchSettings,
)
from nemo_aligner_diffusion.settings import LOOP, TEXT, Kind, Settings, integer, number, part, setting
from nemo_aligner_diffusion.training.callbacks.settings import (
    BestCheckpointSettings,
    CheckpointSettings,
    EMASettings,
    LoggerSettings,
    NonFiniteSettings,
    ProfileSettings,
    TimeLimitSettings,
)
from nemo_aligner_diffusion.training.optimizers import OptimizerSettings

Self = TypeVar("Self", bound="ProgramSettings")

_PLACES = (  # the run's directory, and what names weights of the model: config.yaml and the report have whole paths
    "exp_manager.explicit_log_dir",
    *("model.from_pretrained", "model.unet_config.from_pretrained", "model.first_stage_config.from_pretrained"),
    *("model.first_stage_config.small_decoder", "model.cond_stage_config.from_pretrained"),
    "model.peft.restore_from_path",
)


def _absolute(text: str) -> str:
    """Of a file or folder that is here; a hub's id as it is."""
    path = os.path.expanduser(text)
    whole = os.path.abspath(path)
    try:
        return whole if os.path.samefile(whole, path) else text  # not where `..` follows a link
    except OSError:
        return text


@dataclass(frozen=True)
class LoopSettings(Settings):
    """The training loop; a recipe places it at trainer.<recipe>, and trainer.draftp_sd.* means it in every recipe."""

    section = f"trainer.{LOOP}"
    title = "Training loop"

    max_epochs: int | None = setting(
        None,
        integer(1, nullable=True),
        "stop after this many passes over the prompts; integer >= 1, null: only max_steps counts",
    )
    max_steps: int = setting(30, integer(1), "stop after this many optimizer steps; integer >= 1")
    val_check_interval: int = setting(10, integer(0), "optimizer steps between two validations; integer >= 1, 0: none")
    limit_val_batches: float = setting(
        1.0,
        Kind("batches"),
        "how much validation: an integer counts batches, a fraction in (0, 1] is of all; 0: none",
    )
    save_interval: int = setting(
        10, integer(0), "optimizer steps between two checkpoints; integer >= 1, 0: only the last"
    )
    gradient_clip_val: float | None = setting(
        1.0,
        number(0, nullable=True),
        "largest gradient norm (L2, all trained parameters); > 0, null or 0: no clipping",
    )


@dataclass(frozen=True)
class ExperimentSettings(WatchSettings, RequeueSettings, TimeLimitSettings, LoggerSettings, RunDirectorySettings):
    """Where the run's files go, who else hears of its figures, how it resumes. Spelt as NeMo's exp_manager."""

    title = "Results, logging, resuming"

    checkpoint_callback_params: CheckpointSettings = part(CheckpointSettings)


@dataclass(frozen=True)
class DiffusionExperimentSettings(ExperimentSettings):
    """Where the run's files go, who else hears of its figures, how it resumes. Spelt as NeMo's exp_manager."""

    checkpoint_callback_params: BestCheckpointSettings = part(BestCheckpointSettings)
    ema: EMASettings = part(EMASettings)


@dataclass(frozen=True)
class ModelSettings(RewardTuningSettings, LayoutSettings, WeightsSettings):
    """The model, sampling and the loss."""

    title = "Model, sampling, loss"

    nan_policy: NonFiniteSettings = part(NonFiniteSettings)
    profile: ProfileSettings = part(ProfileSettings)
    optim: OptimizerSettings = part(OptimizerSettings)
    data: PromptSettings = part(PromptSettings)
    preference: PairSettings = part(PairSettings)

    @property
    def keeps_8_bits(self) -> bool:
        """Whether frozen weights are in 8 bits with scales."""
        return self.frozen_precision in ("int8", "fp8")

    @property
    def undivided(self) -> list[str]:
        """``key = value`` of what is of whole parameters or networks: with it there are replicas alone."""
        eight, moments = [self.given("frozen_precision")], [self.optim.given("name")]
        found = (eight if self.keeps_8_bits else []) + ([] if self.optim.can_be_split else moments)
        return found + [self.given(key) for key in ("rollout_compile", "replay_compile") if getattr(self, key)]

    @property
    def steps_kept(self) -> int:
        """``kept_steps``; none where FSDP2 would gather the weights of all of them in one backward pass."""
        return 0 if self.fsdp else self.kept_steps


@dataclass(frozen=True)
class ProgramSettings(Settings):
    """What every training has, whatever it trains.

    Attributes:
        tree: the whole configuration that was read, for what other rooms read of it: ``rm``, the method's section.
        shown: the same for ``config.yaml``: texts of the environment are references (``${oc.env:TOKEN}``).
    """

    title = "Run"

    name: str = setting("draftp_sd", TEXT, "name of the run: loggers and reports show it; any text")
    trainer: MachineSettings = part(MachineSettings)
    exp_manager: ExperimentSettings = part(ExperimentSettings)
    tree: Mapping[str, Any] = field(default_factory=dict, repr=False)
    shown: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls: type[Self], cfg: Mapping[str, Any] | Self) -> Self:
        """From a checked configuration; settings are what they are.

        Raises:
            ConfigurationError: settings that do not fit together.
        """
        if isinstance(cfg, cls):
            return cfg
        tree: Any = cfg
        shown: Any = cfg
        if isinstance(cfg, DictConfig):
            tree, shown = (OmegaConf.to_container(cfg, resolve=resolve) for resolve in (True, False))
        loops = [name for name, section in tree["trainer"].items() if isinstance(section, Mapping)]
        settings = replace(cls.from_tree(tree, *loops[:1]), tree=tree, shown=shown)
        settings.check()
        return settings

    def check(self) -> None:
        """What one section cannot check alone.

        Raises:
            ConfigurationError: naming the keys, their values and what would be right.
        """

    def recorded(self) -> str:
        """``config.yaml``: what is :attr:`shown`, weights that are here by absolute paths: it is read from anywhere."""
        tree: Any = copy.deepcopy(self.shown)
        for key in _PLACES:
            *sections, last = key.split(".")
            node: Any = tree
            for section in sections:
                node = node.get(section) or {}
            if isinstance(node.get(last), str):
                node[last] = _absolute(node[last])
        return OmegaConf.to_yaml(tree)

    def check_resumes(self, changed: Mapping[str, tuple[Any, Any]]) -> None:
        """Whether a run can be gone on with although settings have changed.

        Args:
            changed: ``{dotted key: (then, now)}``.

        Raises:
            ConfigurationError: no.
        """

    def resuming(self: Self) -> Self:
        """The same run, going on where its directory stands."""
        section = replace(self.exp_manager, resume_if_exists=True, resume_ignore_no_checkpoint=True)
        changed = {"resume_if_exists": True, "resume_ignore_no_checkpoint": True}
        tree, shown = ({**tree, "exp_manager": {**tree["exp_manager"], **changed}} for tree in (self.tree, self.shown))
        return replace(self, exp_manager=section, tree=tree, shown=shown)


@dataclass(frozen=True)
class RunSettings(ProgramSettings):
    """A run of reward fine-tuning."""

    loop: LoopSettings = part(LoopSettings)
    exp_manager: DiffusionExperimentSettings = part(DiffusionExperimentSettings)
    model: ModelSettings = part(ModelSettings)
    report: ReportSettings = part(ReportSettings)

    @property
    def rm(self) -> dict[str, Any]:
        """The reward's section, as :func:`~nemo_aligner_diffusion.rewards.registry.build_reward` takes it."""
        return self.tree["rm"]

    @property
    def layout(self) -> Layout:
        return self.model.layout(self.trainer)

    @property
    def accumulation(self) -> int:
        """Micro-batches an optimizer step on each process."""
        return self.model.accumulation(self.trainer)

    def method(self) -> TrainingMethod:
        """The method; a user's own module is imported for it."""
        return method_of(self.tree)

    def reads_pairs(self, method: TrainingMethod | type[TrainingMethod]) -> bool:
        """Whether ``method`` reads pairs of pictures: with ``pairs=online`` it reads prompts."""
        return method.data == "pairs" and self.model.preference.pairs == "shards"

    def check(self) -> None:
        self.model.accumulation(self.trainer)
        self._check_precisions()
        self._check_pairs()
        if self.model.cache_prompts and "text_encoder" in (self.model.fsdp_frozen or ()):
            raise ConfigurationError(
                f"{self.model.given('cache_prompts')} with text_encoder in model.fsdp_frozen: processes that shard a "
                "text encoder must all call it equally often; leave one of the two out"
            )
        steps = self.model.infer.inference_steps  # of a pipeline's own number the loaded model knows
        if steps is not None and not is_import_path(self.model.algorithm):  # a user's module is imported in training
            self.method().check(steps)
        self.model.optim.sched.factor(self.loop.max_steps)
        self.model.profile.check(self.loop.max_steps, self.trainer.world_size)
        cut = [self.model.given("fsdp")] if self.model.fsdp else []
        cut += [self.model.given("tensor_model_parallel_size")] if self.model.tensor_model_parallel_size > 1 else []
        if cut and self.model.undivided:
            raise ConfigurationError(
                f"{', '.join(self.model.undivided)} with {', '.join(cut)}: 8 bits have scales that are not cut, and "
                "what is compiled is a whole network; expected replicas, or null and another optimizer (FSDP2 shards "
                "its state)"
            )

    def check_resumes(self, changed: Mapping[str, tuple[Any, Any]]) -> None:
        """The model must be the one that the run is of; a path that is gone may stand for one that has moved."""
        keys = self.model.keys()
        now = {keys[f]: getattr(self.model, f) for f in ("from_pretrained", "denoiser_path", "vae_path", "text_path")}
        then = {key: changed[key][0] if key in changed else value for key, value in now.items()}
        families = changed.get("model.family", (self.model.family, self.model.family))
        for paths, family in ((then, families[0]), (now, families[1])):
            if not any(paths.values()) and family not in (None, EMBEDDED):
                return  # a program's own pipeline: its weights are compared. None: of a version that knew no families
        others = [key for key in now if _differ(then[key], now[key])]
        if others:
            was = " with ".join(path for path in then.values() if path) or "the embedded model"
            again = " ".join(f"{key}={then[key] or 'null'}" for key in others)
            raise ConfigurationError(
                f"this run was of {was}, and {', '.join(f'{key} = {now[key]}' for key in others)} now: give {again} "
                "again, or start a new run directory (exp_manager.explicit_log_dir)"
            )

    def unread_keys(self) -> dict[str, str]:
        in_fp8 = "fp8" in (self.trainer.precision, self.model.rollout_precision)
        reason = "neither trainer.precision nor model.rollout_precision is fp8"
        return super().unread_keys() | ({} if in_fp8 else dict.fromkeys(self.model.fp8.keys().values(), reason))

    def _check_pairs(self) -> None:
        method, section = methods().get(self.model.algorithm), self.model
        if method is None or not self.reads_pairs(method):
            return
        if section.data.train_path is None and recognise(section).architecture != EMBEDDED:
            raise ConfigurationError(
                f"{section.data.given('train_path')} with {section.given('algorithm')}: only the embedded model makes "
                "its own pairs; expected preference shards (nad-parquet-to-shards or nad-folder-to-shards writes them) "
                "or model.preference.pairs=online"
            )

    def _check_precisions(self) -> None:
        kind = self.trainer.lightning_precision
        if self.model.frozen_precision is not None and kind.endswith("-true") and kind != "32-true":
            raise ConfigurationError(
                f"model.frozen_precision = {self.model.frozen_precision} with {self.trainer.given('precision')}, which "
                "converts every weight: leave one of the two out"
            )
        if self.model.rollout_compile and not self.model.rollout_precision:
            raise ConfigurationError(
                f"{self.model.given('rollout_compile')} is of the rollout's copy of the network: expected "
                "model.rollout_precision=same, bf16, fp8 or auto; or null"
            )
        if self.model.keeps_8_bits and self.trainer.precision == "fp8":
            raise ConfigurationError(
                f"{self.model.given('frozen_precision')} with {self.trainer.given('precision')}: weights of 8 bits "
                "with their scales are not multiplied as they are; expected frozen_precision=bf16"
            )
        if self.model.tensor_model_parallel_size > 1 and "fp8" in (
            self.trainer.precision,
            self.model.rollout_precision,
        ):
            raise ConfigurationError(
                f"{self.trainer.given('precision')}, {self.model.given('rollout_precision')} with "
                f"{self.model.given('tensor_model_parallel_size')}: layers that are cut multiply in bfloat16 at least; "
                "expected bf16, or tensor_model_parallel_size=1 (replicas, FSDP2)"
            )


def _differ(then: str | None, now: str | None) -> bool:
    """Whether two names are of other models, as far as can be told: folders are moved, and hub ids downloaded."""
    if then is None or now is None:
        return then != now
    before, after = (Path(name).expanduser() for name in (then, now))
    if before.exists():
        return before.resolve() != after.resolve()
    return is_hub_name(then) and before.name != after.name
