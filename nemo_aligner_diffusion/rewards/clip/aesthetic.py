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
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemo_aligner_diffusion.errors import ArchiveError, CheckpointError, RewardError
from nemo_aligner_diffusion.formats.nemo import NemoArchive, save_nemo
from nemo_aligner_diffusion.rewards.base import Reward, wide
from nemo_aligner_diffusion.rewards.clip.archive import read_preprocessing, tower_fields
from nemo_aligner_diffusion.rewards.clip.network import VISION_KEYS, fields, fill, on_meta, stored_tensors
from nemo_aligner_diffusion.rewards.restore import RestoreOptions
from nemo_aligner_diffusion.rewards.support.archive_checks import check_fit, mapping
from nemo_aligner_diffusion.rewards.support.micro_batches import in_micro_batches, own_precision
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

logger = logging.getLogger(__name__)

TARGET = "nemo_aligner_diffusion.rewards.aesthetic.AestheticReward"
ACTIVATIONS = ("identity", "relu")
_MOST_LAYERS, _LARGEST_WIDTH = 32, 1 << 16
# Places of the linear layers in the published heads' nn.Sequential: dropout stands between those of the first, ReLU and
# dropout between those of the second.
_PUBLISHED: dict[tuple[int, ...], str] = {(0, 2, 4, 6, 7): "identity", (0, 3, 6, 9, 11): "relu"}
_HEAD_KEY = re.compile(r"(?:layers\.)?(\d+)\.(weight|bias)|(weight|bias)")


class AestheticReward(Reward):
    """A frozen CLIP vision tower with a rating head.

    Args:
        model: gives the image embedding; frozen in place.
        head: linear layers, the first as wide as the embedding, the last giving one number.
        activation: between them, ``identity`` or ``relu``.
        preprocessing, micro_batch_size, activation_checkpointing: as for :class:`.CLIPReward`.
    """

    name = "aesthetic"

    def __init__(
        self,
        model: CLIPVisionModelWithProjection,
        head: Iterable[nn.Module],
        *,
        activation: str = "identity",
        preprocessing: Preprocessing | None = None,
        micro_batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise RewardError(f"An aesthetic head's activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
        config: Any = model.config
        self.model = model
        self.head = nn.ModuleList(head)
        self.activation = activation
        self.preprocessing = preprocessing or Preprocessing(config.image_size)
        self.micro_batch_size = micro_batch_size
        self.activation_checkpointing = activation_checkpointing
        self.freeze()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        weight = self.model.visual_projection.weight
        with own_precision(weight.device.type):
            return in_micro_batches(
                self._rate_pixels,
                self.preprocessing(images.to(weight.device)),
                micro_batch_size=self.micro_batch_size,
                activation_checkpointing=self.activation_checkpointing,
            )

    def _rate_pixels(self, pixels: Tensor) -> Tensor:
        weight = self.model.visual_projection.weight
        pooled = self.model.vision_model(pixel_values=pixels.to(weight.dtype)).pooler_output
        embeddings = self.model.visual_projection(pooled)
        # The norm in at least float32; the rest follows the head, which is in the model's dtype.
        return self.rate(functional.normalize(wide(embeddings), dim=-1).to(weight.dtype))

    def rate(self, embeddings: Tensor) -> Tensor:
        """Ratings ``(B,)`` of image embeddings ``(B, D)`` of length 1."""
        for number, layer in enumerate(self.head):
            if number and self.activation == "relu":
                embeddings = functional.relu(embeddings)
            embeddings = layer(embeddings)
        return embeddings.squeeze(-1)


def restore_aesthetic(archive: NemoArchive, options: RestoreOptions) -> AestheticReward:
    """An aesthetic reward from an archive; raises :class:`ArchiveError` where something doesn't fit."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = archive.config
    state = stored_tensors(archive.state_dict())
    vision = tower_fields(archive, mapping(archive, config, "clip"), "vision_config", VISION_KEYS, len(state))
    section = mapping(archive, config, "head")
    widths, activation = section.get("widths"), section.get("activation", "identity")
    if not isinstance(widths, list) or not 2 <= len(widths) <= _MOST_LAYERS or not all(map(_is_width, widths)):
        raise ArchiveError(
            f"{archive.path}: head.widths is {str(widths)[:200]}; expected the sizes between its layers, from the "
            "embedding's to 1, such as [768, 1024, 128, 64, 16, 1]."
        )
    if widths[-1] != 1 or widths[0] != vision.get("projection_dim"):
        raise ArchiveError(
            f"{archive.path}: its head goes from {widths[0]} to {widths[-1]} numbers, its CLIP's embeddings have "
            f"{vision.get('projection_dim')!r} (clip.vision_config.projection_dim) and a rating is 1."
        )
    if activation not in ACTIVATIONS:
        raise ArchiveError(
            f"{archive.path}: head.activation is {str(activation)[:100]!r}; known are {', '.join(ACTIVATIONS)}."
        )
    try:
        model = on_meta(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)))
    # transformers raises its own validation errors, and plain ones, for field values it cannot build a model from.
    except Exception as error:
        raise ArchiveError(
            f"{archive.path}: its configuration describes no CLIP vision model that can be built "
            f"({type(error).__name__}: {str(error)[:300]}). Save the archive again from a working model."
        ) from error
    head = on_meta(lambda: nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths)))
    expected = {**stored_tensors(model.state_dict()), **{f"head.{k}": v for k, v in head.state_dict().items()}}
    check_fit(archive, state, expected)
    state = {key: value.float() for key, value in state.items()}  # one dtype throughout, whatever each was saved in
    fill(model, {key: value for key, value in state.items() if not key.startswith("head.")})
    fill(head, {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")})
    if options.score is not None or options.tokenizer is not None:
        logger.warning("rm.model.score and rm.model.tokenizer have no effect: an aesthetic reward reads no prompt")
    return AestheticReward(
        model,
        head,
        activation=activation,
        micro_batch_size=options.micro_batch_size,
        activation_checkpointing=options.activation_checkpointing,
        preprocessing=read_preprocessing(archive, config, fields(model.config, VISION_KEYS)["image_size"]),
    )


def convert_aesthetic_to_nemo(
    head: Mapping[str, Tensor],
    model: CLIPVisionModelWithProjection,
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
        model: left as it is.
        path: the archive to write.
        activation: between the head's layers; known from the places of the layers in the published heads.
        preprocessing: how pictures are prepared for ``model``; OpenAI's when left out.
        dtype: of the saved weights; as they are when left out.
        name: what the reward is called in metrics.
        extra: further configuration entries, e.g. provenance; ignored when restoring.
        gzip: compress the archive.

    Raises:
        CheckpointError: the tensors are no chain of linear layers that starts as wide as ``model``'s embeddings.
    """
    layers, known_activation = _head_layers(head)
    activation = activation or known_activation
    if activation is None:
        raise CheckpointError(
            "The head's layers stand where neither published head has them, so what lies between them is unknown. "
            f"Give --head-activation, one of {', '.join(ACTIVATIONS)}."
        )
    config: Any = model.config
    widths = [layers[0][0].shape[1], *(weight.shape[0] for weight, _ in layers)]
    if widths[0] != config.projection_dim:
        raise CheckpointError(
            f"The head takes embeddings of {widths[0]} numbers, the CLIP gives {config.projection_dim}. Give the CLIP "
            "that the head was trained on: OpenAI's ViT-L/14 (openai/clip-vit-large-patch14) for the published ones."
        )
    state = dict(stored_tensors(model.state_dict()))
    for number, (weight, bias) in enumerate(layers):
        state |= {f"head.{number}.weight": weight, f"head.{number}.bias": bias}
    return save_nemo(
        path,
        {
            **(extra or {}),
            "target": TARGET,
            "name": name,
            "clip": {"vision_config": fields(config, VISION_KEYS)},
            "head": {"widths": widths, "activation": activation},
            "preprocessing": (preprocessing or Preprocessing(config.image_size)).as_config(),
        },
        {key: tensor if dtype is None else tensor.to(dtype) for key, tensor in state.items()},
        gzip=gzip,
    )


def _head_layers(head: Mapping[str, Tensor]) -> tuple[list[tuple[Tensor, Tensor]], str | None]:
    """The head's ``(weight, bias)`` in order, and its activation where it is laid out as a published one."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in head.items():
        match = _HEAD_KEY.fullmatch(key)
        if match is None or not tensor.is_floating_point():
            raise CheckpointError(
                f"{key[:200]} {tuple(tensor.shape)} {tensor.dtype} has no place in an aesthetic head; expected "
                "layers.N.weight and layers.N.bias, as in sac+logos+ava1-l14-linearMSE.pth."
            )
        found.setdefault(int(match[1] or 0), {})[match[2] or match[3]] = tensor
    places = tuple(sorted(found))
    layers = [(found[place].get("weight"), found[place].get("bias")) for place in places]
    width: int | None = None
    complete: list[tuple[Tensor, Tensor]] = []
    for place, (weight, bias) in zip(places, layers, strict=True):
        fits = weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]
        if weight is None or bias is None or not fits or (width is not None and weight.shape[1] != width):
            shapes = {key: tuple(tensor.shape) for key, tensor in found[place].items()}
            raise CheckpointError(f"The head's layer {place} is {shapes}; expected a weight (out, {width}) and a bias.")
        width = weight.shape[0]
        complete.append((weight, bias))
    if width != 1:
        raise CheckpointError(f"The head ends in {width} numbers; expected layers that end in one, the rating.")
    return complete, "identity" if len(places) == 1 else _PUBLISHED.get(places)


def _is_width(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_WIDTH
