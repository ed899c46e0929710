"""From the ``rm`` section of a configuration to a reward."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from nemo_aligner_diffusion.rewards import registry
from nemo_aligner_diffusion.rewards.base import Reward

logger = logging.getLogger(__name__)


def build_reward(
    config: Mapping[str, Any] | Any | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Reward:
    """The reward that ``config`` describes.

    ``rm.name=custom`` imports and runs the Python code that ``rm.import_path`` names: give only a configuration that
    the user wrote, and see :func:`import_paths` for one that came from elsewhere.

    Args:
        config: the ``rm`` section, a mapping or a ``DictConfig``: its keys are in the files of ``conf/rm``; ``None`` or
            ``{}`` is the embedded CLIP reward.
        device: where it computes.
        dtype: what its model computes in; by default ``rm.trainer.precision``, or float32.

    Raises:
        ConfigurationError: an unknown reward or key (the nearest known one is named), or an impossible value.
        RewardError: a model or a custom reward cannot be used.
        ArchiveError: the ``.nemo`` file is unusable.
    """
    settings, unread = registry.read_reward(_plain(config))
    for key in unread:
        logger.warning("%s has no effect here: the reward %r does not use it", key, settings.name)
    return settings.build(device, dtype)


def import_paths(config: Any) -> Iterator[tuple[str, str]]:
    """``(key, value)`` of every import path in an ``rm`` section: code that building it would run."""
    return registry.import_paths(_plain(config))


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
