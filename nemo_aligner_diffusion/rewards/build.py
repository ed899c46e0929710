"""From the ``rm`` section of a configuration to a reward.

::

    rm:
      name: clip                    # clip | symmetry | compressibility | incompressibility | composite
      model:                        # clip only
        restore_from_path: null     # a .nemo file; null = the embedded reward
        micro_batch_size: null      # images per forward pass of the reward; null = all at once
        activation_checkpointing: false
        score: null                 # pickscore | hps | clipscore; null = the archive's own
        tokenizer: null             # folder with vocab.json and merges.txt, for archives that only name a tokenizer
      trainer: {precision: 32}      # 32 | 16 | bf16 | 64: what the reward computes in
      quality: 80                   # (in)compressibility: JPEG quality, 1 to 100
      chroma_subsampling: true      # (in)compressibility
      reduction: sum                # (in)compressibility: sum | mean over a picture's values
      parts: null                   # composite: {part: {weight: 1.0, reward: {name: …, as above}}}; `reward` may be
                                    # left out, its keys standing beside `weight`; without a `name`, the part's is taken
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch

from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.rewards.base import Reward

logger = logging.getLogger(__name__)

_JPEG_KEYS = ("quality", "chroma_subsampling", "reduction")
_MODEL_KEYS = ("restore_from_path", "micro_batch_size", "activation_checkpointing", "score", "tokenizer")
# The keys that act, for each reward there is.
REWARDS: dict[str, tuple[str, ...]] = {
    "clip": ("model",),
    "symmetry": (),
    "compressibility": _JPEG_KEYS,
    "incompressibility": _JPEG_KEYS,
    "composite": ("parts",),
}
_KEYS = ("name", "model", "trainer", "parts", *_JPEG_KEYS)
_PRECISIONS = {
    **dict.fromkeys(("32", "32-true", "fp32", "float32"), torch.float32),
    **dict.fromkeys(("16", "16-true", "16-mixed", "fp16", "float16"), torch.float16),
    **dict.fromkeys(("bf16", "bf16-true", "bf16-mixed", "bfloat16"), torch.bfloat16),
    **dict.fromkeys(("64", "64-true", "float64"), torch.float64),
}


def build_reward(
    config: Mapping[str, Any] | Any | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Reward:
    """The reward that ``config`` (the ``rm`` section, a mapping or a ``DictConfig``) describes.

    Args:
        config: see the module's docstring; ``None`` or ``{}`` is the embedded CLIP reward.
        device: where it computes.
        dtype: what its model computes in; by default ``rm.trainer.precision``, or float32.

    Raises:
        ConfigurationError: an unknown reward or key (the nearest known one is named), or an impossible value.
        ArchiveError: the ``.nemo`` file is unusable.
    """
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    reward = _build(_without_nulls(plain, "rm"), "rm", device, dtype)
    return reward.to(device)


def _build(config: dict[str, Any], where: str, device: str | torch.device, dtype: torch.dtype | None) -> Reward:
    _check_keys(config, _KEYS, where)
    name = config.get("name", "clip")
    if name not in REWARDS:
        raise ConfigurationError(f"{where}.name={name!r} is no reward. {_nearest(name, REWARDS)}")
    for key in config:
        if key not in ("name", "trainer", *REWARDS[name]) and _says_something(config[key]):
            logger.warning("%s.%s has no effect here: the reward %r does not use it", where, key, name)
    precision = _without_nulls(config.get("trainer"), f"{where}.trainer").get("precision", 32)
    if dtype is None:
        if str(precision) not in _PRECISIONS:
            raise ConfigurationError(
                f"{where}.trainer.precision={precision!r} is unknown. {_nearest(str(precision), _PRECISIONS)}"
            )
        dtype = _PRECISIONS[str(precision)]
    if name == "clip":
        return _build_clip(_without_nulls(config.get("model"), f"{where}.model"), f"{where}.model", device, dtype)
    if name == "composite":
        return _build_composite(config, where, device, dtype)
    if name == "symmetry":
        from nemo_aligner_diffusion.rewards.symmetry import MirrorSymmetry

        return MirrorSymmetry()
    from nemo_aligner_diffusion.rewards.jpeg import JPEGCompressibility

    settings = {key: config[key] for key in _JPEG_KEYS if key in config}
    return JPEGCompressibility(**settings, incompressible=name == "incompressibility")


def _build_clip(model: dict[str, Any], where: str, device: str | torch.device, dtype: torch.dtype) -> Reward:
    from nemo_aligner_diffusion.rewards.restore import restore_reward

    _check_keys(model, _MODEL_KEYS, where)
    micro_batch_size = model.get("micro_batch_size")
    if micro_batch_size is not None and (not isinstance(micro_batch_size, int) or micro_batch_size < 1):
        raise ConfigurationError(
            f"{where}.micro_batch_size={micro_batch_size!r}; expected at least 1, or null for all."
        )
    return restore_reward(
        model.get("restore_from_path") or embedded_reward_path(),
        device=device,
        dtype=dtype,
        tokenizer=model.get("tokenizer"),
        score=model.get("score"),
        micro_batch_size=micro_batch_size,
        activation_checkpointing=bool(model.get("activation_checkpointing", False)),
    )


def _build_composite(config: dict[str, Any], where: str, device: str | torch.device, dtype: torch.dtype) -> Reward:
    from nemo_aligner_diffusion.rewards.composite import CompositeReward

    parts = _without_nulls(config.get("parts"), f"{where}.parts")
    if not parts:
        raise ConfigurationError(
            f"{where}.name=composite needs {where}.parts, e.g. {{clip: {{weight: 1.0}}, symmetry: {{weight: 20.0}}}}."
        )
    built: dict[str, tuple[float, Reward]] = {}
    for part, section in parts.items():
        here = f"{where}.parts.{part}"
        settings = _without_nulls(section, here)
        weight = settings.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ConfigurationError(f"{here}.weight={weight!r}; expected a number.")
        if "reward" in settings:
            inner = _without_nulls(settings.pop("reward"), f"{here}.reward")
            _check_keys(settings, ("weight", "reward"), here)
            settings = inner
        settings.setdefault("name", part)
        built[part] = (weight, _build(settings, here, device, dtype))
    return CompositeReward(built)


def _without_nulls(section: Any, where: str) -> dict[str, Any]:
    """A copy without null entries: a schema that lists every key must not differ from one that leaves them out."""
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigurationError(f"{where}={section!r}; expected a section with keys.")
    return {str(key): value for key, value in section.items() if value is not None}


def _says_something(value: Any) -> bool:
    """False for null and for sections that hold nothing but null: a schema's blanks are no wish of the user's."""
    return any(map(_says_something, value.values())) if isinstance(value, Mapping) else value is not None


def _check_keys(section: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in section:
        if key not in known:
            raise ConfigurationError(f"{where}.{key} is no key of the reward. {_nearest(key, known)}")


def _nearest(name: object, known: Collection[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return (f"Nearest is {close[0]!r}; k" if close else "K") + f"nown are: {', '.join(known)}."
