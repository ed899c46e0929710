"""The configuration of reward training: ``conf/reward_model.yaml``, a user's YAML over it, the command line over that.

Reads keys with the grammar, the kinds and the messages of :mod:`nemo_aligner_diffusion.config.load`; every key is
in ``conf/reward_model.yaml`` with its meaning. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_aligner_diffusion.config.layers import Vocabulary, command_line, file_layer, parse_override
from nemo_aligner_diffusion.config.nemo_names import Alias
from nemo_aligner_diffusion.config.recipes import conf_directory
from nemo_aligner_diffusion.data.settings import ReadingSettings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import unflatten
from nemo_aligner_diffusion.parallel.settings import LayoutSettings
from nemo_aligner_diffusion.runtime.settings import MachineSettings
from nemo_aligner_diffusion.settings import (
    BOOL,
    PATH,
    PATHS,
    Kind,
    Settings,
    choice,
    integer,
    number,
    part,
    setting,
)
from nemo_aligner_diffusion.training.callbacks.settings import NonFiniteSettings
from nemo_aligner_diffusion.training.optimizers import OptimizerSettings
from nemo_aligner_diffusion.training.settings import LoopSettings, ProgramSettings

CONFIG_NAME = "reward_model"
# Other spellings: NeMo-Aligner's examples/mm/clip, and the shorter ones.
ALIASES = {
    "restore_from_path": Alias("model.restore_from_path"),
    "model.data.data_path": Alias("model.data.train.webdataset.local_root_path"),
    "model.data.webdataset.local_root_path": Alias("model.data.train.webdataset.local_root_path"),
}


@dataclass(frozen=True)
class RewardMachineSettings(MachineSettings):
    """The machine, and the precisions in which a reward can be trained."""

    precision: str = setting(
        "32",
        choice("32", "bf16", "16", "32-true", "bf16-mixed", "16-mixed"),
        "32, bf16 (bf16-mixed) or 16 (16-mixed); 16 for one process",
    )


@dataclass(frozen=True)
class EarlyStoppingSettings(Settings):
    """When validation no longer gets better (Lightning's EarlyStopping)."""

    section = "trainer.early_stopping"

    patience: int = setting(5, integer(0), "validations without improvement that end the run; 0: never stop early")
    metric: str = setting(
        "loss", choice("loss", "accuracy"), "loss or accuracy, of the validation; chooses the best weights, too"
    )
    min_delta: float = setting(0.0, number(0), "smallest change that counts as an improvement; >= 0")


@dataclass(frozen=True)
class RewardLoopSettings(LoopSettings):
    """The training loop; its section is the machine's."""

    section = "trainer"

    early_stopping: EarlyStoppingSettings = part(EarlyStoppingSettings)


@dataclass(frozen=True)
class VisionSettings(Settings):
    """What is trained of the picture tower."""

    section = "model.vision"

    freeze: bool = setting(False, BOOL, "leave the tower as it is")
    trainable_layers: int | None = setting(
        None, integer(0, nullable=True), "train its last so many layers and last norm; null: all of it"
    )

    @property
    def trained_layers(self) -> int | None:
        return 0 if self.freeze else self.trainable_layers


@dataclass(frozen=True)
class TextSettings(VisionSettings):
    """What is trained of the prompt tower."""

    section = "model.text"


@dataclass(frozen=True)
class TrainedParts(Settings):
    """What of a CLIP is trained."""

    section = "model"

    projections: bool = setting(True, BOOL, "train the linear maps from both towers into the common space")
    logit_scale: bool = setting(True, BOOL, "train the scale of the scores; kept at or below 100")
    vision: VisionSettings = part(VisionSettings)
    text: TextSettings = part(TextSettings)


@dataclass(frozen=True)
class PairSettings(ReadingSettings):
    """Preference shards."""

    validation_path: str | tuple[str, ...] | None = setting(
        None,
        PATHS,
        "shard, folder, glob, brace range or list; null: no validation, no early stopping",
        key="model.data.validation.webdataset.local_root_path",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_path is None:
            raise ConfigurationError(
                "model.data.train.webdataset.local_root_path is not set; expected preference shards: make them with "
                "parquet_to_shards.py, folder_to_shards.py or make_rule_preferences.py (docs/reward_training.md)"
            )


@dataclass(frozen=True)
class RewardModelSettings(TrainedParts):
    """What is trained, and how."""

    restore_from_path: str | None = setting(None, PATH, "a CLIP reward .nemo to start from; null: the embedded reward")
    from_pretrained: str | None = setting(None, PATH, "instead: a Hugging Face CLIP folder")
    tokenizer: str | None = setting(
        None, PATH, "folder with vocab.json and merges.txt, for a .nemo that only names its tokenizer"
    )
    seed: int = setting(1234, Kind("int", low=0, high=2**63 - 1), "of the order of the pairs")
    micro_batch_size: int = setting(32, integer(1), "pairs a process handles at once")
    global_batch_size: int = setting(
        32, integer(1), "pairs an optimizer step; micro_batch_size × processes × accumulation"
    )
    activation_checkpointing: bool = setting(
        False, BOOL, "recompute transformer layers in the backward pass: less memory, a third more time"
    )
    save_dtype: str = setting("32", choice("32", "16", "bf16"), "precision of the weights in the .nemo: 32, 16 or bf16")
    nan_policy: NonFiniteSettings = part(NonFiniteSettings)
    optim: OptimizerSettings = part(OptimizerSettings)
    data: PairSettings = part(PairSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restore_from_path is not None and self.from_pretrained is not None:
            raise ConfigurationError(
                f"model.restore_from_path = {self.restore_from_path!r} and model.from_pretrained = "
                f"{self.from_pretrained!r} both say where to start; keep one"
            )


@dataclass(frozen=True)
class RewardReportSettings(Settings):
    """The page that sums up a run."""

    section = "report"

    enable: bool = setting(True, BOOL, "write report.html, loss.png and accuracy.png")


@dataclass(frozen=True)
class RewardTrainingSettings(ProgramSettings):
    """A run of reward training."""

    trainer: RewardMachineSettings = part(RewardMachineSettings)
    loop: RewardLoopSettings = part(RewardLoopSettings)
    model: RewardModelSettings = part(RewardModelSettings)
    report: RewardReportSettings = part(RewardReportSettings)

    @property
    def accumulation(self) -> int:
        """Micro-batches an optimizer step on each process; raises ConfigurationError where the sizes do not divide."""
        sizes = {name: getattr(self.model, name) for name in ("micro_batch_size", "global_batch_size")}
        return LayoutSettings(**sizes).accumulation(self.trainer)

    def check(self) -> None:
        _ = self.accumulation
        self.model.optim.sched.factor(self.loop.max_steps)


VOCABULARY = Vocabulary(RewardTrainingSettings.schema(), ALIASES)


def load_reward_config(
    overrides: Sequence[str] = (), config_name: str = CONFIG_NAME, config_dir: str | os.PathLike[str] | None = None
) -> DictConfig:
    """Read, merge and check.

    Args:
        overrides: ``key=value`` as on the command line.
        config_name, config_dir: a YAML of the user's own over the shipped one; without ``config_dir`` there is none.

    Raises:
        ConfigurationError: an unknown key or an impossible value; one clear message, with the nearest key.
    """
    tree = VOCABULARY.over({}, file_layer(conf_directory() / f"{CONFIG_NAME}.yaml"))
    name = config_name.removesuffix(".yaml").removesuffix(".yml")
    if config_dir is not None:
        tree = VOCABULARY.over(tree, file_layer(Path(config_dir).expanduser() / f"{name}.yaml"))
    elif name != CONFIG_NAME:
        raise ConfigurationError(
            f"--config-name {name!r}: reward training has one configuration, {CONFIG_NAME}; for a YAML of your own add "
            "--config-path <its folder>"
        )
    tree = VOCABULARY.over(tree, command_line(map(parse_override, overrides)))
    cfg = OmegaConf.create(unflatten(VOCABULARY.values(tree)))
    RewardTrainingSettings.of(cfg)
    return cfg
