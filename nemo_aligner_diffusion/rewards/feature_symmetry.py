"""Mirror symmetry as a vision network sees it: what is alike may differ in its pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.base import Reward
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
from nemo_aligner_diffusion.rewards.micro_batches import in_micro_batches, own_precision
from nemo_aligner_diffusion.rewards.preprocessing import preprocess

DISTANCES = ("cosine", "l2")


class FeatureSymmetry(Reward):
    """Minus the mean distance between the features of a picture's fields and those of its mirror image; at most 0.

    The features are the last hidden states of a CLIP vision tower at each patch, so that the left ear is compared with
    the mirrored right one, in place. (The network's one embedding of the whole picture would not do: it is trained to
    be nearly the same for a picture and its mirror image, symmetric or not.) The picture is cropped to a square.

    Args:
        clip: gives the vision tower, its preprocessing, micro-batching and checkpointing; frozen.
        distance: ``cosine``: 1 − cosine, 0 … 2; ``l2``: squared difference, mean over the channels.
    """

    name = "feature_symmetry"

    def __init__(self, clip: Reward, distance: str = "cosine") -> None:
        super().__init__()
        if not isinstance(clip, CLIPReward):
            raise RewardError(
                f"Feature symmetry needs the vision tower of a CLIP reward; {type(clip).__name__} has none it can use."
            )
        if distance not in DISTANCES:
            raise RewardError(f"Feature symmetry's distance is {distance!r}; known are {', '.join(DISTANCES)}.")
        self.clip = clip
        self.distance = distance
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        clip = self.clip
        with own_precision(clip.device.type):
            pixels = preprocess(
                images.to(clip.device), clip.image_size, clip.mean, clip.std, clip.interpolation, clip.resize
            )
            return in_micro_batches(
                self._score_pixels,
                pixels,
                micro_batch_size=clip.micro_batch_size,
                activation_checkpointing=clip.activation_checkpointing,
            )

    def _score_pixels(self, pixels: Tensor) -> Tensor:
        both = torch.cat([pixels, pixels.flip(-1)]).to(self.clip.dtype)
        hidden = self.clip.model.vision_model(pixel_values=both).last_hidden_state[:, 1:]  # without the class token
        picture, mirrored = (hidden if hidden.dtype == torch.float64 else hidden.float()).chunk(2)
        if self.distance == "cosine":
            return functional.cosine_similarity(picture, mirrored, dim=-1).mean(dim=1) - 1
        return -(picture - mirrored).square().mean(dim=(1, 2))
