"""The configuration of reward training: ``conf/reward_model.yaml``, a user's YAML over it, the command line over that.

Reads keys with the grammar, the kinds and the messages of :mod:`nemo_aligner_diffusion.config.load`; every key is
in ``conf/reward_model.yaml`` with its meaning. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_aligner_diffusion.config import schema
from nemo_aligner_diffusion.config.checks import check_precision, world_size
from nemo_aligner_diffusion.config.layers import closest, flatten, parse_override, unflatten
from nemo_aligner_diffusion.config.load import conf_directory
from nemo_aligner_diffusion.config.schema import BOOL, PATH, TEXT, Kind, choice, integer, number
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.formats.yaml_reader import read_yaml

CONFIG_NAME = "reward_model"
# Other spellings: NeMo-Aligner's examples/mm/clip, and the shorter ones.
ALIASES = {
    "restore_from_path": "model.restore_from_path",
    "model.data.data_path": "model.data.train.webdataset.local_root_path",
    "model.data.webdataset.local_root_path": "model.data.train.webdataset.local_root_path",
}
# What means the same as in the diffusion runs.
_SHARED = (
    "exp_manager.",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.log_every_n_steps",
    "model.seed",
    "model.micro_batch_size",
    "model.global_batch_size",
    "model.activation_checkpointing",
    "model.nan_policy.",
    "model.optim.",
    "model.data.",
    "report.enable",
)
_NOT_SHARED = (
    "exp_manager.ema.",
    "exp_manager.checkpoint_callback_params.save_top_k",  # every checkpoint holds the weights of the best validation
    "model.data.validation.prompts",
    "model.data.validation.max_prompts",
    "model.data.validation.seeds",
)
KEYS: dict[str, Kind] = {
    "name": TEXT,
    **{key: kind for key, kind in schema.KEYS.items() if key.startswith(_SHARED) and not key.startswith(_NOT_SHARED)},
    "trainer.precision": choice("32", "bf16", "16", "32-true", "bf16-mixed", "16-mixed"),
    "trainer.max_steps": integer(1),
    "trainer.max_epochs": integer(1, nullable=True),
    "trainer.val_check_interval": integer(0),
    "trainer.limit_val_batches": number(0),
    "trainer.save_interval": integer(0),
    "trainer.gradient_clip_val": number(0, nullable=True),
    "trainer.early_stopping.patience": integer(0),
    "trainer.early_stopping.metric": choice("loss", "accuracy"),
    "trainer.early_stopping.min_delta": number(0),
    "model.restore_from_path": PATH,
    "model.from_pretrained": PATH,
    "model.tokenizer": PATH,
    "model.vision.freeze": BOOL,
    "model.vision.trainable_layers": integer(0, nullable=True),
    "model.text.freeze": BOOL,
    "model.text.trainable_layers": integer(0, nullable=True),
    "model.projections": BOOL,
    "model.logit_scale": BOOL,
    "model.save_dtype": choice("32", "16", "bf16"),
}


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
    leaves = _read(conf_directory() / f"{CONFIG_NAME}.yaml")
    name = config_name.removesuffix(".yaml").removesuffix(".yml")
    if config_dir is not None:
        file = Path(config_dir).expanduser() / f"{name}.yaml"
        leaves = _over(leaves, _read(file), str(file))
    elif name != CONFIG_NAME:
        raise ConfigurationError(
            f"--config-name {name!r}: reward training has one configuration, {CONFIG_NAME}; for a YAML of your own add "
            "--config-path <its folder>"
        )
    given: dict[str, Any] = {}
    for text in overrides:
        item = parse_override(text)
        if item.delete:
            raise ConfigurationError(f"~{item.key}: a setting cannot be deleted; set it, for example {item.key}=null")
        given.update(flatten({item.key: item.value}, dotted=True))
    leaves = _resolved(_over(leaves, given, "command line"))
    cfg = OmegaConf.create(unflatten({key: _kind(key).read(key, value) for key, value in leaves.items()}))
    _check(cfg)
    return cfg


def accumulation(cfg: DictConfig) -> int:
    """Micro-batches an optimizer step on each process.

    Raises:
        ConfigurationError: the sizes do not divide; names a size that would fit.
    """
    ranks = world_size(cfg)
    step, whole = cfg.model.micro_batch_size * ranks, cfg.model.global_batch_size
    if whole % step:
        raise ConfigurationError(
            f"model.global_batch_size = {whole} is no multiple of micro_batch_size × processes = "
            f"{cfg.model.micro_batch_size} × {ranks} = {step}; {max(whole // step, 1) * step} would fit"
        )
    return int(whole // step)


def documented_keys() -> list[tuple[str, str, str]]:
    """(dotted key, default, meaning) of each key, in the order of the file."""
    result, sections = [], list[str]()
    for line in (conf_directory() / f"{CONFIG_NAME}.yaml").read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"(?P<indent> *)(?P<key>\w+):(?P<value>.*?) # (?P<comment>.*)", line)
        if match:
            sections[len(match["indent"]) // 2 :] = [match["key"]]
            if match["value"].strip():
                result.append((".".join(sections), match["value"].strip(), match["comment"].strip()))
    return result


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigurationError(
            f"{file} does not exist; expected a YAML file with the keys of conf/{CONFIG_NAME}.yaml"
        )
    try:
        container = read_yaml(file)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigurationError(f"{file} {error}") from error
    if not isinstance(container, dict):
        raise ConfigurationError(f"{file}: expected keys and values, found {type(container).__name__}")
    return flatten({str(key): value for key, value in container.items()})


def _over(leaves: Mapping[str, Any], given: Mapping[str, Any], origin: str) -> dict[str, Any]:
    result = dict(leaves)
    for key, value in given.items():
        target = ALIASES.get(key, key)
        if target != key and given.get(target, value) != value:
            raise ConfigurationError(
                f"{key} = {value!r} and {target} = {given[target]!r} are two spellings of one setting that disagree "
                f"({origin}): keep one"
            )
        if _find_kind(target) is None:
            inside = [known for known in KEYS if known.startswith(f"{target}.")]
            if inside and value in (None, {}):
                continue
            if inside:
                raise ConfigurationError(f"{key} = {value!r}: {key} is a section; its keys are {', '.join(inside)}")
            source = "" if origin == "command line" else f" in {origin}"
            raise ConfigurationError(
                f"unknown key {key!r}{source}{closest(key, [*KEYS, *ALIASES]) or '; --help lists the keys'}"
            )
        other = schema.EITHER_OR.get(target)
        if value is not None and other in result and other not in given:
            result[other] = None
        result[target] = value
    return result


def _find_kind(key: str) -> Kind | None:
    if key in KEYS:
        return KEYS[key]
    return schema.ANY if key.startswith("exp_manager.wandb_logger_kwargs.") else None


def _kind(key: str) -> Kind:
    kind = _find_kind(key)
    assert kind is not None, key
    return kind


def _resolved(leaves: Mapping[str, Any]) -> dict[str, Any]:
    try:
        container = OmegaConf.to_container(OmegaConf.create(unflatten(leaves)), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"the configuration cannot be resolved: {str(error).splitlines()[0]}") from error
    assert isinstance(container, dict)
    return flatten({str(key): value for key, value in container.items()})


def _check(cfg: DictConfig) -> None:
    accumulation(cfg)
    check_precision(cfg)
    if cfg.model.restore_from_path is not None and cfg.model.from_pretrained is not None:
        raise ConfigurationError(
            f"model.restore_from_path = {cfg.model.restore_from_path!r} and model.from_pretrained = "
            f"{cfg.model.from_pretrained!r} both say where to start; keep one"
        )
    if cfg.model.data.train.webdataset.local_root_path is None:
        raise ConfigurationError(
            "model.data.train.webdataset.local_root_path is not set; expected preference shards: make them with "
            "parquet_to_shards.py, folder_to_shards.py or make_rule_preferences.py (docs/reward_training.md)"
        )
    limit = cfg.exp_manager.max_time_per_run
    if limit is not None and not schema.MAX_TIME.fullmatch(limit):
        raise ConfigurationError(
            f"exp_manager.max_time_per_run = {limit!r}: expected days:hours:minutes:seconds such as 00:03:45:00, or "
            "null"
        )
