"""From the ``rm`` section of a configuration to a reward.

::

    rm:
      name: clip                    # one of REWARDS, below
      model:                        # clip, feature_symmetry, classifier, detection
        restore_from_path: null     # clip, feature_symmetry: a .nemo file; null = the embedded reward
        from_pretrained: null       # classifier, detection: a transformers folder or hub id
        micro_batch_size: null      # images per forward pass of the reward; null = all at once
        activation_checkpointing: false
        score: null                 # clip: pickscore | hps | clipscore; null = the archive's own
        tokenizer: null             # folder with vocab.json and merges.txt, for archives that only name a tokenizer
      trainer: {precision: 32}      # 32 | 16 | bf16 | 64: what the reward computes in
      augment: {…}                  # any reward: see augmentation.Augmentation
      quality: 50                   # (in)compressibility: JPEG quality, 1 to 100
      chroma_subsampling: true      # (in)compressibility
      reduction: sum                # (in)compressibility: sum | mean over a picture's values
      distance: cosine              # feature_symmetry: cosine | l2
      target_class: null            # classifier: index or label
      views: 1                      # classifier: 1 to 10
      query: null                   # detection: what to look for; null = each prompt
      remove: false                 # detection: reward its absence
      temperature: 0.1              # detection: of the maximum over boxes
      import_path: null             # custom: package.module:name
      kwargs: {}                    # custom
      parts: null                   # composite, ensemble: {part: {weight: 1.0, normalize: …, clip: …, clip_mode: …,
                                    # reward: {name: …, as above}}}; `reward` may be left out, its keys standing beside
                                    # `weight`; without a `name`, the part's is taken
      aggregate: mean_minus_std     # ensemble: mean | min | mean_minus_std
      std_weight: 1.0               # ensemble
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from nemo_aligner_diffusion.errors import ConfigurationError, RewardError
from nemo_aligner_diffusion.rewards import build_kinds as kinds
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.build_sections import Section, check_keys, nearest, says_something, without_nulls

logger = logging.getLogger(__name__)

# For each reward there is: how it is made, and the keys that act beside `name`, `trainer` and `augment`.
_KINDS: dict[str, tuple[Callable[[Section], Reward], tuple[str, ...]]] = {
    "clip": (kinds.clip, ("model",)),
    "symmetry": (kinds.symmetry, ()),
    "feature_symmetry": (kinds.feature_symmetry, ("model", "distance")),
    "compressibility": (kinds.compressibility, kinds.JPEG_KEYS),
    "incompressibility": (kinds.incompressibility, kinds.JPEG_KEYS),
    "classifier": (kinds.classifier, ("model", "target_class", "views")),
    "detection": (kinds.detection, ("model", "query", "remove", "temperature")),
    "custom": (kinds.custom, ("import_path", "kwargs")),
    "composite": (kinds.composite, ("parts",)),
    "ensemble": (kinds.ensemble, ("parts", "aggregate", "std_weight")),
}
REWARDS: dict[str, tuple[str, ...]] = {name: keys for name, (_, keys) in _KINDS.items()}
MODEL_KEYS = tuple(dict.fromkeys((*kinds.RESTORED_KEYS, *kinds.PRETRAINED_KEYS)))
AUGMENT_KEYS = ("crop_scale", "flip_probability", "colour_jitter", "dropout", "noise_std", "views")
_COMMON = ("name", "trainer", "augment")
_KEYS = tuple(dict.fromkeys((*_COMMON, *(key for keys in REWARDS.values() for key in keys))))
# trainer.precision -> what a reward computes in
PRECISIONS = {
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

    ``rm.name=custom`` imports and runs the Python code that ``rm.import_path`` names: give only a configuration that
    the user wrote, and see :func:`import_paths` for one that came from elsewhere.

    Args:
        config: see the module's docstring; ``None`` or ``{}`` is the embedded CLIP reward.
        device: where it computes.
        dtype: what its model computes in; by default ``rm.trainer.precision``, or float32.

    Raises:
        ConfigurationError: an unknown reward or key (the nearest known one is named), or an impossible value.
        RewardError: a model or a custom reward cannot be used.
        ArchiveError: the ``.nemo`` file is unusable.
    """
    return _build(without_nulls(_plain(config), "rm"), "rm", device, dtype).to(device)


def import_paths(config: Any, where: str = "rm") -> Iterator[tuple[str, str]]:
    """``(key, value)`` of every import path in an ``rm`` section: code that building it would run."""
    config = _plain(config)
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == "import_path" and value is not None:
                yield f"{where}.{key}", str(value)
            else:
                yield from import_paths(value, f"{where}.{key}")


def _build(config: dict[str, Any], where: str, device: str | torch.device, dtype: torch.dtype | None) -> Reward:
    check_keys(config, _KEYS, where)
    name = config.get("name", "clip")
    if name not in REWARDS:
        raise ConfigurationError(f"{where}.name={name!r} is no reward. {nearest(name, REWARDS)}")
    for key in config:
        if key not in (*_COMMON, *REWARDS[name]) and says_something(config[key]):
            logger.warning("%s.%s has no effect here: the reward %r does not use it", where, key, name)
    precision = without_nulls(config.get("trainer"), f"{where}.trainer").get("precision", 32)
    if dtype is None:
        if str(precision) not in PRECISIONS:
            raise ConfigurationError(
                f"{where}.trainer.precision={precision!r} is unknown. {nearest(str(precision), PRECISIONS)}"
            )
        dtype = PRECISIONS[str(precision)]
    settled = dtype  # the parts compute in it, too
    section = Section(
        {**config, "name": name}, where, device, dtype, lambda below, place: _build(below, place, device, settled)
    )
    return augmented(_KINDS[name][0](section), without_nulls(config.get("augment"), f"{where}.augment"), where)


def augmented(reward: Reward, settings: dict[str, Any], where: str) -> Reward:
    """``reward`` as the section ``augment`` at ``where`` has it: itself, if nothing is switched on."""
    from nemo_aligner_diffusion.rewards.augmentation import Augmentation, AugmentedReward

    check_keys(settings, AUGMENT_KEYS, f"{where}.augment")
    for key, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"{where}.augment.{key}={value!r}; expected a number.")
    try:
        augmentation = Augmentation.from_mapping(settings)
    except RewardError as error:
        raise ConfigurationError(f"{where}.{error}") from error
    return AugmentedReward(reward, augmentation, where) if augmentation.perturbs else reward


def _plain(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
