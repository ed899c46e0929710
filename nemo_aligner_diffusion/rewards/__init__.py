"""What is maximised: differentiable rewards, one number per picture.

Every reward is a :class:`~nemo_aligner_diffusion.rewards.base.Reward`; :func:`build_reward` makes one from the ``rm``
section of a configuration, :func:`restore_reward` from a ``.nemo`` file. Names are imported on first use, so that
``import nemo_aligner_diffusion.rewards`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_aligner_diffusion.rewards.augmentation import AugmentedReward
    from nemo_aligner_diffusion.rewards.base import Reward
    from nemo_aligner_diffusion.rewards.build import build_reward
    from nemo_aligner_diffusion.rewards.classifier import ClassifierReward
    from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo
    from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
    from nemo_aligner_diffusion.rewards.composite import CompositeReward
    from nemo_aligner_diffusion.rewards.custom import CustomReward
    from nemo_aligner_diffusion.rewards.detection import DetectionReward
    from nemo_aligner_diffusion.rewards.ensemble import EnsembleReward
    from nemo_aligner_diffusion.rewards.feature_symmetry import FeatureSymmetry
    from nemo_aligner_diffusion.rewards.image_reward.archive import convert_image_reward_to_nemo
    from nemo_aligner_diffusion.rewards.image_reward.reward import ImageReward
    from nemo_aligner_diffusion.rewards.jpeg import JPEGCompressibility
    from nemo_aligner_diffusion.rewards.restore import restore_reward
    from nemo_aligner_diffusion.rewards.symmetry import MirrorSymmetry

_HOMES = {
    "Reward": "base",
    "build_reward": "build",
    "CLIPReward": "clip.reward",
    "convert_hf_clip_to_nemo": "clip.archive",
    "restore_reward": "restore",
    "CompositeReward": "composite",
    "AugmentedReward": "augmentation",
    "ClassifierReward": "classifier",
    "CustomReward": "custom",
    "DetectionReward": "detection",
    "EnsembleReward": "ensemble",
    "FeatureSymmetry": "feature_symmetry",
    "ImageReward": "image_reward.reward",
    "convert_image_reward_to_nemo": "image_reward.archive",
    "JPEGCompressibility": "jpeg",
    "MirrorSymmetry": "symmetry",
}

__all__ = [
    "AugmentedReward",
    "CLIPReward",
    "ClassifierReward",
    "CompositeReward",
    "CustomReward",
    "DetectionReward",
    "EnsembleReward",
    "FeatureSymmetry",
    "ImageReward",
    "JPEGCompressibility",
    "MirrorSymmetry",
    "Reward",
    "build_reward",
    "convert_hf_clip_to_nemo",
    "convert_image_reward_to_nemo",
    "restore_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
