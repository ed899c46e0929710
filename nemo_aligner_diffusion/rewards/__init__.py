"""What is maximised: differentiable rewards, one number per picture.

Every reward is a :class:`~nemo_aligner_diffusion.rewards.base.Reward`. One is made of its settings,
``Classifier(from_pretrained="google/vit-base-patch16-224", target_class="goldfish").build()``; :func:`build_reward`
makes one from the ``rm`` section of a configuration, :func:`restore_reward` from a ``.nemo`` file. Names are imported
on first use, so that ``import nemo_aligner_diffusion.rewards`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_aligner_diffusion.rewards.base import Reward
    from nemo_aligner_diffusion.rewards.build import build_reward
    from nemo_aligner_diffusion.rewards.classifier import Classifier
    from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo
    from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
    from nemo_aligner_diffusion.rewards.composite import Composite
    from nemo_aligner_diffusion.rewards.custom import Custom
    from nemo_aligner_diffusion.rewards.detection import Detection
    from nemo_aligner_diffusion.rewards.ensemble import Ensemble
    from nemo_aligner_diffusion.rewards.feature_symmetry import FeatureSymmetry
    from nemo_aligner_diffusion.rewards.image_reward.archive import convert_image_reward_to_nemo
    from nemo_aligner_diffusion.rewards.image_reward.reward import ImageReward
    from nemo_aligner_diffusion.rewards.jpeg import Compressibility, Incompressibility
    from nemo_aligner_diffusion.rewards.parts import Part, Shaping
    from nemo_aligner_diffusion.rewards.restore import restore_reward
    from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing
    from nemo_aligner_diffusion.rewards.symmetry import Symmetry

_HOMES = {
    "CLIPReward": "clip.reward",
    "Classifier": "classifier",
    "Composite": "composite",
    "Compressibility": "jpeg",
    "Custom": "custom",
    "Detection": "detection",
    "Ensemble": "ensemble",
    "FeatureSymmetry": "feature_symmetry",
    "ImageReward": "image_reward.reward",
    "Incompressibility": "jpeg",
    "Part": "parts",
    "Preprocessing": "support.preprocessing",
    "Reward": "base",
    "Shaping": "parts",
    "Symmetry": "symmetry",
    "build_reward": "build",
    "convert_hf_clip_to_nemo": "clip.archive",
    "convert_image_reward_to_nemo": "image_reward.archive",
    "restore_reward": "restore",
}

__all__ = [
    "CLIPReward",
    "Classifier",
    "Composite",
    "Compressibility",
    "Custom",
    "Detection",
    "Ensemble",
    "FeatureSymmetry",
    "ImageReward",
    "Incompressibility",
    "Part",
    "Preprocessing",
    "Reward",
    "Shaping",
    "Symmetry",
    "build_reward",
    "convert_hf_clip_to_nemo",
    "convert_image_reward_to_nemo",
    "restore_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
