"""Checks of the ``rm`` section that need more than one key, before anything is loaded."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.rewards.parts import PartedSettings
from nemo_aligner_diffusion.rewards.registry import read_reward


def check_reward(cfg: DictConfig) -> None:
    """Raises :class:`ConfigurationError` for a reward that lacks a key, or has one that cannot act."""
    settings, _ = read_reward(OmegaConf.to_container(cfg.rm))
    measured = list(settings.measured()) if isinstance(settings, PartedSettings) else []
    loops = [section for section in cfg.trainer.values() if isinstance(section, DictConfig)]
    if measured and any(loop.val_check_interval == 0 for loop in loops):
        raise ConfigurationError(
            f"{measured[0]}.normalize = base measures the base model's validation pictures, but val_check_interval = 0 "
            "says that there are none: expected val_check_interval >= 1, or numbers such as "
            f"{measured[0]}.normalize={{mean:20,std:1.5}}"
        )
