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
    from nemo_aligner_diffusion.rewards.base import Reward as Reward
    from nemo_aligner_diffusion.rewards.classifier import Classifier as Classifier
    from nemo_aligner_diffusion.rewards.clip.archive import convert_hf_clip_to_nemo as convert_hf_clip_to_nemo
    from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward as CLIPReward
    from nemo_aligner_diffusion.rewards.composite import Composite as Composite
    from nemo_aligner_diffusion.rewards.custom import Custom as Custom
    from nemo_aligner_diffusion.rewards.detection import Detection as Detection
    from nemo_aligner_diffusion.rewards.ensemble import Ensemble as Ensemble
    from nemo_aligner_diffusion.rewards.feature_symmetry import FeatureSymmetry as FeatureSymmetry
    from nemo_aligner_diffusion.rewards.image_reward.archive import (
        convert_image_reward_to_nemo as convert_image_reward_to_nemo,
    )
    from nemo_aligner_diffusion.rewards.image_reward.reward import ImageReward as ImageReward
    from nemo_aligner_diffusion.rewards.jpeg import Compressibility as Compressibility
    from nemo_aligner_diffusion.rewards.jpeg import Incompressibility as Incompressibility
    from nemo_aligner_diffusion.rewards.jpeg import JPEGSize as JPEGSize
    from nemo_aligner_diffusion.rewards.parts import Part as Part
    from nemo_aligner_diffusion.rewards.parts import Shaping as Shaping
    from nemo_aligner_diffusion.rewards.registry import build_reward as build_reward
    from nemo_aligner_diffusion.rewards.restore import restore_reward as restore_reward
    from nemo_aligner_diffusion.rewards.rules import Colourfulness as Colourfulness
    from nemo_aligner_diffusion.rewards.rules import Symmetry as Symmetry
    from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing as Preprocessing

_HOMES = {
    "base": ("Reward",),
    "classifier": ("Classifier",),
    "clip.archive": ("convert_hf_clip_to_nemo",),
    "clip.reward": ("CLIPReward",),
    "composite": ("Composite",),
    "custom": ("Custom",),
    "detection": ("Detection",),
    "ensemble": ("Ensemble",),
    "feature_symmetry": ("FeatureSymmetry",),
    "image_reward.archive": ("convert_image_reward_to_nemo",),
    "image_reward.reward": ("ImageReward",),
    "jpeg": ("Compressibility", "Incompressibility", "JPEGSize"),
    "parts": ("Part", "Shaping"),
    "registry": ("build_reward",),
    "restore": ("restore_reward",),
    "support.preprocessing": ("Preprocessing",),
    "rules": ("Colourfulness", "Symmetry"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
