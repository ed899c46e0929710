"""LAION's aesthetic predictor: how much people would like a picture, whatever its prompt.

The image embedding of a CLIP (OpenAI's ViT-L/14 for the published heads), brought to length 1, goes through a small
multi-layer perceptron whose output is a rating of about 1 to 10 (Schuhmann, 2022,
https://github.com/christophschuhmann/improved-aesthetic-predictor). The head with ``linearMSE`` in its name has no
activations between its layers, the one with ``reluMSE`` has ReLU; dropout acts in training only and is left out.

``model_config.yaml`` of the archives::

    target: nemo_aligner_diffusion.rewards.aesthetic.AestheticReward
    nemo_version: nemo_aligner_diffusion 1
    name: aesthetic
    clip: {vision_config: {…, projection_dim: 768}}    # transformers.CLIPVisionConfig, fields: clip_model
    head: {widths: [768, 1024, 128, 64, 16, 1], activation: identity}          # or relu
    preprocessing: {image_size: 224, mean: [r, g, b], std: [r, g, b], interpolation: bicubic, resize: crop}

``model_weights.ckpt`` holds the vision tower and its projection under transformers' names (``vision_model.…``,
``visual_projection.weight``), and the head as ``head.N.weight`` and ``head.N.bias``, ``N`` counting layers from 0.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemo_aligner_diffusion.errors import ArchiveError, CheckpointError, RewardError
from nemo_aligner_diffusion.formats.nemo import NemoArchive, save_nemo
from nemo_aligner_diffusion.rewards.base import ModelReward, unit_length
from nemo_aligner_diffusion.rewards.clip.archive import VISION_KEYS, fields, read_preprocessing, tower_fields
from nemo_aligner_diffusion.rewards.support.archive import filled, mapping, stored_tensors
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPVisionModelWithProjection

TARGET = "nemo_aligner_diffusion.rewards.aesthetic.AestheticReward"
ACTIVATIONS = ("identity", "relu")
# Places of the linear layers in the published heads' nn.Sequential: dropout stands between those of the first, ReLU and
# dropout between those of the second.
_PUBLISHED: dict[tuple[int, ...], str] = {(0, 2, 4, 6, 7): "identity", (0, 3, 6, 9, 11): "relu"}
_HEAD_KEY = re.compile(r"(?:layers\.)?(\d+)\.(weight|bias)|(weight|bias)")


class AestheticReward(ModelReward):
    """A frozen CLIP vision tower with a rating head.

    Args:
        model: gives the image embedding; frozen in place.
        head: linear layers, the first as wide as the embedding, the last giving one number.
        activation: between them, ``identity`` or ``relu``.
        preprocessing: of pictures; OpenAI's for the model's size when left out.
    """

    name = "aesthetic"

    def __init__(
        self,
        model: CLIPVisionModelWithProjection,
        head: Iterable[nn.Module],
        *,
        activation: str = "identity",
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__(model)
        if activation not in ACTIVATIONS:
            raise RewardError(f"An aesthetic head's activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
        self.head = nn.ModuleList(head)
        self.activation = activation
        self.preprocessing = preprocessing or Preprocessing(self.model.config.image_size)
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.in_micro_batches(self._rate_pixels, self.preprocessing(images.to(self.device)))

    def _rate_pixels(self, pixels: Tensor) -> Tensor:
        pooled = self.model.vision_model(pixel_values=pixels.to(self.dtype)).pooler_output
        # The norm in at least float32; the rest follows the head, which is in the model's dtype.
        return self.rate(unit_length(self.model.visual_projection(pooled)).to(self.dtype))

    def rate(self, embeddings: Tensor) -> Tensor:
        """Ratings ``(B,)`` of image embeddings ``(B, D)`` of length 1."""
        for number, layer in enumerate(self.head):
            if number and self.activation == "relu":
                embeddings = functional.relu(embeddings)
            embeddings = layer(embeddings)
        return embeddings.squeeze(-1)


def restore_aesthetic(archive: NemoArchive, *ignored: object) -> AestheticReward:
    """An aesthetic reward from an archive; raises :class:`ArchiveError` where something doesn't fit."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = archive.config
    state = stored_tensors(archive.state_dict())
    vision = tower_fields(archive, mapping(archive, config, "clip"), "vision_config", VISION_KEYS, len(state))
    layers = {key: value for key, value in state.items() if key.startswith("head.")}
    tower = {key: value for key, value in state.items() if key not in layers}
    section = mapping(archive, config, "head")
    widths, activation = section.get("widths"), section.get("activation", "identity")
    found = _widths(layers)
    if widths != found or found[-1] != 1 or found[0] != vision.get("projection_dim"):
        raise ArchiveError(
            f"{archive.path}: head.widths is {str(widths)[:200]}, its weights are of {found}; expected both "
            f"to go from {vision.get('projection_dim')!r}, its CLIP's projection_dim, to 1, the rating."
        )
    if activation not in ACTIVATIONS:
        raise ArchiveError(
            f"{archive.path}: head.activation is {str(activation)[:100]!r}; known are {', '.join(ACTIVATIONS)}."
        )
    model = filled(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)), tower, archive.path)
    head = filled(
        lambda: nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(found)),
        layers,
        archive.path,
        stored_name=lambda key: f"head.{key}",
    )
    image_size: Any = model.config.image_size
    preprocessing = read_preprocessing(archive, config, image_size)
    return AestheticReward(model, head, activation=activation, preprocessing=preprocessing)


def convert_aesthetic_to_nemo(
    head: Mapping[str, Tensor],
    model: CLIPModel | CLIPVisionModelWithProjection,
    path: str | Path,
    *,
    activation: str | None = None,
    preprocessing: Preprocessing | None = None,
    dtype: torch.dtype | None = None,
    name: str = "aesthetic",
    extra: Mapping[str, Any] | None = None,
    gzip: bool = False,
) -> Path:
    """Pack a rating head and the CLIP vision tower that it rates embeddings of into a ``.nemo``.

    Args:
        head: tensors of a published ``.pth``: ``layers.N.weight`` and ``layers.N.bias`` in order of ``N``, or the
            ``weight`` and ``bias`` of a single layer.
        model: a CLIP, or its vision tower; left as it is.
        activation: between the head's layers; known from the places of the layers in the published heads.
        path, preprocessing, dtype, name, extra, gzip: see :func:`.convert_hf_clip_to_nemo`.

    Raises:
        CheckpointError: the tensors are no linear layers that start as wide as ``model``'s embeddings.
    """
    layers, places = _head_layers(head)
    activation = activation or _PUBLISHED.get(places) or ("identity" if len(places) == 1 else None)
    if activation is None:
        raise CheckpointError(
            "The head's layers stand where neither published head has them, so what lies between them is unknown. "
            f"Give --head-activation, one of {', '.join(ACTIVATIONS)}."
        )
    widths = _widths(layers)
    embedding: int = model.visual_projection.out_features
    if widths[0] != embedding:
        raise CheckpointError(
            f"The head takes embeddings of {widths[0]} numbers, the CLIP gives {embedding}. Give the CLIP "
            "that the head was trained on: OpenAI's ViT-L/14 (openai/clip-vit-large-patch14) for the published ones."
        )
    tower = ("vision_model.", "visual_projection.")
    state = {key: value for key, value in stored_tensors(model.state_dict()).items() if key.startswith(tower)}
    state |= layers
    vision: Any = model.vision_model.config
    return save_nemo(
        path,
        {
            **(extra or {}),
            "target": TARGET,
            "name": name,
            "clip": {"vision_config": {**fields(vision, VISION_KEYS), "projection_dim": embedding}},
            "head": {"widths": widths, "activation": activation},
            "preprocessing": (preprocessing or Preprocessing(vision.image_size)).as_config(),
        },
        {key: tensor if dtype is None else tensor.to(dtype) for key, tensor in state.items()},
        gzip=gzip,
    )


def _head_layers(head: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """The head's tensors as an archive names them, and the places that its layers have in the published file."""
    found: dict[tuple[int, str], Tensor] = {}
    for key, tensor in head.items():
        match = _HEAD_KEY.fullmatch(key)
        kind = match[2] or match[3] if match else ""
        if match is None or not tensor.is_floating_point() or tensor.ndim != (2 if kind == "weight" else 1):
            raise CheckpointError(
                f"{key[:200]} {tuple(tensor.shape)} {tensor.dtype} has no place in an aesthetic head; expected "
                "layers.N.weight and layers.N.bias, as in sac+logos+ava1-l14-linearMSE.pth."
            )
        found[int(match[1] or 0), kind] = tensor
    places = tuple(sorted({place for place, _ in found}))
    if lacking := [place for place in places if (place, "weight") not in found or (place, "bias") not in found]:
        raise CheckpointError(f"The head's layer {lacking[0]} lacks its weight or its bias.")
    if not places:
        raise CheckpointError("The head holds no tensors; expected layers.N.weight and layers.N.bias.")
    return {f"head.{places.index(place)}.{kind}": tensor for (place, kind), tensor in found.items()}, places


def _widths(layers: Mapping[str, Tensor]) -> list[int]:
    """The sizes between a head's layers, from the embedding's to the rating's."""
    weights = [layers.get(f"head.{number}.weight") for number in range(len(layers) // 2)]
    shapes = [tuple(weight.shape) for weight in weights if weight is not None and weight.ndim == 2]
    return [shapes[0][1], *(shape[0] for shape in shapes)] if shapes else [0]
