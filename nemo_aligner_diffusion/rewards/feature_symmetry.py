"""Mirror symmetry as a vision network sees it: what is alike may differ in its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import RewardError
from nemo_aligner_diffusion.rewards.restore import RestoredSettings
from nemo_aligner_diffusion.settings import choice, setting

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nemo_aligner_diffusion.rewards.base import Reward


@dataclass(frozen=True, kw_only=True)
class FeatureSymmetry(RestoredSettings):
    """Minus the mean distance between the features of a picture's fields and those of its mirror image; at most 0.

    The features are the last hidden states of a CLIP vision tower at each patch, so that the left ear is compared with
    the mirrored right one, in place. (The network's one embedding of the whole picture would not do: it is trained to
    be nearly the same for a picture and its mirror image, symmetric or not.) The picture is cropped to a square.
    """

    name = "feature_symmetry"

    distance: str = setting(
        "cosine", choice("cosine", "l2"), "between features: cosine (1 − cosine) or l2 (squared difference)"
    )

    def describe(self) -> str:
        return "symmetry in a CLIP's features"

    def make(self, where: str, device: str | torch.device, dtype: torch.dtype) -> Reward:
        from nemo_aligner_diffusion.rewards.base import NetworkReward
        from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward

        clip = self.restore(device, dtype)
        if not isinstance(clip, CLIPReward):
            raise RewardError(
                f"{where}.name = {self.name} needs the vision tower of a CLIP reward; {self.restore_from_path} holds "
                f"{clip.name}, which has none it can use."
            )
        return NetworkReward(self, clip.model, clip.preprocessing)

    def score(self, network: Any, images: Tensor, *rows: Tensor) -> Tensor:
        import torch
        from torch.nn import functional

        from nemo_aligner_diffusion.rewards.base import wide

        pixels = network.pixels(images)
        both = torch.cat([pixels, pixels.flip(-1)])
        hidden = network.model.vision_model(pixel_values=both).last_hidden_state[:, 1:]  # without the class token
        picture, mirrored = wide(hidden).chunk(2)
        if self.distance == "cosine":
            return functional.cosine_similarity(picture, mirrored, dim=-1).mean(dim=1) - 1
        return -(picture - mirrored).square().mean(dim=(1, 2))  # over the channels, too
