"""ImageReward in ``.nemo`` files: packing the published ``ImageReward.pt`` into one, and restoring it.

``model_config.yaml``::

    target: nemo_aligner_diffusion.rewards.image_reward.ImageReward
    nemo_version: nemo_aligner_diffusion 1
    name: image_reward
    vision: {hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 24, num_attention_heads: 16, …}
    text: {vocab_size: 30524, hidden_size: 768, …}      # fields VISION_KEYS and TEXT_KEYS of image_reward.py
    head: [1024, 128, 64, 16]                           # widths of the MLP's hidden layers
    score: {mean: 0.16717362830052426, std: 1.0333394966054072}
    tokenizer: {vocab_file: nemo:<hash>_vocab.txt, max_length: 35}

``model_weights.ckpt`` holds tensors of any floating dtype under the names that ``ImageReward.pt`` gives them
(``blip.visual_encoder.blocks.N.…``, ``blip.text_encoder.encoder.layer.N.…``, ``mlp.layers.N.…``), less what scoring
never uses (``blip.vision_proj``, ``blip.text_proj``).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import ArchiveError, CheckpointError
from nemo_aligner_diffusion.formats.checkpoints import read_tensors
from nemo_aligner_diffusion.formats.nemo import NemoArchive, save_nemo
from nemo_aligner_diffusion.rewards.clip.network import fill, on_meta
from nemo_aligner_diffusion.rewards.image_reward.reward import (
    HEAD_PLACES,
    MAX_LENGTH,
    PUBLISHED_MEAN,
    PUBLISHED_STD,
    TEXT_KEYS,
    VISION_KEYS,
    ImageReward,
    ImageRewardNetwork,
)
from nemo_aligner_diffusion.rewards.image_reward.tokenizer import (
    VOCABULARY_FILE,
    load_tokenizer,
    read_vocabulary,
    tokenizer_from_bytes,
)
from nemo_aligner_diffusion.rewards.restore import RestoreOptions
from nemo_aligner_diffusion.rewards.support.archive_checks import check_fit, mapping

logger = logging.getLogger(__name__)

TARGET = "nemo_aligner_diffusion.rewards.image_reward.ImageReward"
_LARGEST = 1 << 20  # no size in a configuration is larger
_MOST_LAYERS = 128
_HEAD_WIDTH = 64  # channels per attention head in both of BLIP's encoders
# In ImageReward.pt, but of no use for a score: projections of BLIP's pretraining, and constants.
_UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")

# Of transformers' vision tower -> of the checkpoint. Text encoder and head have the same names in both.
_VISION_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "post_layernorm": "norm",
}
_VISION_LAYER_NAMES = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VISION_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


def restore_image_reward(archive: NemoArchive, options: RestoreOptions) -> ImageReward:
    """An ImageReward from an archive of our own; raises :class:`ArchiveError` where something doesn't fit."""
    config = archive.config
    state = archive.state_dict()
    vision = _sizes(archive, mapping(archive, config, "vision"), "vision", VISION_KEYS)
    text = _sizes(archive, mapping(archive, config, "text"), "text", TEXT_KEYS)
    head = config.get("head")
    if not isinstance(head, list) or len(head) != len(HEAD_PLACES) - 1 or not all(map(_is_size, head)):
        raise _misfit(archive, "head", head, f"{len(HEAD_PLACES) - 1} widths, each 1 to {_LARGEST}")
    if vision["image_size"] % vision["patch_size"]:
        raise _misfit(archive, "vision.image_size", vision["image_size"], f"a multiple of {vision['patch_size']}")
    mean, std = _score_scale(archive, mapping(archive, config, "score"))
    most = text["max_position_embeddings"]
    max_length = mapping(archive, config, "tokenizer", optional=True).get("max_length", min(MAX_LENGTH, most))
    if not _is_size(max_length) or not 2 <= max_length <= most:
        raise _misfit(archive, "tokenizer.max_length", max_length, f"2 to {most} tokens")
    try:
        network = on_meta(lambda: ImageRewardNetwork(vision, text, head))
    # transformers and torch raise their own errors, and plain ones, for sizes they cannot build a model from.
    except Exception as error:
        raise ArchiveError(
            f"{archive.path}: its configuration describes no ImageReward that can be built "
            f"({type(error).__name__}: {str(error)[:300]}). Save the archive again from a working model."
        ) from error
    names = {checkpoint_name(key): key for key in network.state_dict()}
    expected = network.state_dict()
    check_fit(archive, state, {name: expected[key] for name, key in names.items()})
    fill(network, {key: state[name] for name, key in names.items()})
    tokenizer = load_tokenizer(archive, text["vocab_size"], options.tokenizer)
    if options.score is not None:
        logger.warning("rm.model.score=%r has no effect here: ImageReward has one score only", options.score)
    return ImageReward(
        network,
        tokenizer,
        mean=mean,
        std=std,
        max_length=max_length,
        micro_batch_size=options.micro_batch_size,
        activation_checkpointing=options.activation_checkpointing,
    )


def convert_image_reward_to_nemo(
    checkpoint: str | Path,
    tokenizer_folder: str | Path,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    mean: float = PUBLISHED_MEAN,
    std: float = PUBLISHED_STD,
    max_length: int | None = None,
    name: str = "image_reward",
    extra: Mapping[str, Any] | None = None,
    gzip: bool = False,
) -> Path:
    """Pack ``ImageReward.pt`` and its tokenizer into a ``.nemo`` that :func:`.restore_reward` reads.

    The architecture is read off the tensors' shapes; only the numbers of attention heads cannot be.

    Args:
        checkpoint: ``ImageReward.pt`` (https://huggingface.co/THUDM/ImageReward), or one of its layout, trained anew or
            saved as ``.safetensors``; loaded without running any code.
        tokenizer_folder: holds the ``vocab.txt`` of ``bert-base-uncased``.
        path: the archive to write.
        dtype: of the saved weights, e.g. ``torch.float16`` for half the size; as they are when left out.
        vision_heads, text_heads: attention heads; one for each 64 channels when left out, as in every published BLIP.
        mean, std: what standardises the score. The published ones belong to ``ImageReward.pt`` only: give 0 and 1 for
            a model of your own.
        max_length: tokens a prompt may have; 35 as published, or as many as the text encoder reads, when left out.
        name: what the reward is called in metrics.
        extra: further configuration entries, e.g. provenance; ignored when restoring.
        gzip: compress the archive.

    Raises:
        RewardError: ``std`` or ``max_length`` is impossible.
        CheckpointError: the checkpoint is unreadable or not of this layout.
        ArchiveError: the tokenizer doesn't fit, or the archive cannot be written.
    """
    source = Path(checkpoint)
    tensors = read_tensors(source)
    if all(key.startswith("module.") for key in tensors):  # saved from DistributedDataParallel
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not _UNUSED.fullmatch(key)}
    vision, text, head = architecture(source, tensors, vision_heads, text_heads)
    network = on_meta(lambda: ImageRewardNetwork(vision, text, head))
    expected = {checkpoint_name(key): tensor for key, tensor in network.state_dict().items()}
    _check_checkpoint(source, tensors, expected)
    vocabulary = read_vocabulary(tokenizer_folder)
    tokenizer = tokenizer_from_bytes(vocabulary, text["vocab_size"], str(tokenizer_folder))
    max_length = max_length if max_length is not None else min(MAX_LENGTH, text["max_position_embeddings"])
    ImageReward(network, tokenizer, mean=mean, std=std, max_length=max_length)  # refuses what restoring would refuse
    config = {
        **(extra or {}),
        "target": TARGET,
        "name": name,
        "vision": vision,
        "text": text,
        "head": head,
        "score": {"mean": float(mean), "std": float(std)},
        "tokenizer": {"vocab_file": f"nemo:{VOCABULARY_FILE}", "max_length": max_length},
    }
    state = {key: tensors[key].to(dtype) if dtype is not None else tensors[key] for key in expected}
    return save_nemo(path, config, state, {VOCABULARY_FILE: vocabulary}, gzip=gzip)


def checkpoint_name(key: str) -> str:
    """What ``ImageReward.pt`` calls the tensor ``key`` of :class:`ImageRewardNetwork`."""
    part, _, inner = key.partition(".")
    if part != "vision":
        return f"{'blip.text_encoder' if part == 'text' else 'mlp.layers'}.{inner}"
    if inner in _VISION_NAMES:
        return f"blip.visual_encoder.{_VISION_NAMES[inner]}"
    module, _, kind = inner.rpartition(".")
    layer = _VISION_LAYER.fullmatch(module)
    place = f"blocks.{layer[1]}.{_VISION_LAYER_NAMES[layer[2]]}" if layer else _VISION_NAMES[module]
    return f"blip.visual_encoder.{place}.{kind}"


def architecture(
    source: Path, tensors: Mapping[str, Tensor], vision_heads: int | None = None, text_heads: int | None = None
) -> tuple[dict[str, int], dict[str, int], list[int]]:
    """Arguments of :class:`ImageRewardNetwork` from the shapes of ``tensors``, named as in ``ImageReward.pt``.

    ``source`` is named in errors; heads are one for each 64 channels unless given.
    """

    def shape(name: str, dimensions: int) -> Sequence[int]:
        if name not in tensors or tensors[name].ndim != dimensions:
            found = f"has {tuple(tensors[name].shape)} for" if name in tensors else "lacks"
            raise CheckpointError(
                f"{source}: {found} the tensor {name}, so it is no checkpoint of ImageReward.pt's layout. "
                "Get ImageReward.pt from https://huggingface.co/THUDM/ImageReward."
            )
        return tensors[name].shape

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in tensors)

    width, _, patch, _ = shape("blip.visual_encoder.patch_embed.proj.weight", 4)
    places = shape("blip.visual_encoder.pos_embed", 3)[1] - 1
    side = math.isqrt(max(places, 0))
    if side < 1 or side * side != places:
        raise CheckpointError(
            f"{source}: its vision tower has {places} patch positions, which make no square picture. "
            "Only BLIP's plain vision transformer can be converted."
        )
    vision = {
        "hidden_size": width,
        "intermediate_size": shape("blip.visual_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count(r"blip\.visual_encoder\.blocks\.\d+\.norm1\.weight"),
        "num_attention_heads": _heads(source, "vision_heads", width, vision_heads),
        "image_size": side * patch,
        "patch_size": patch,
    }
    rows, text_width = shape("blip.text_encoder.embeddings.word_embeddings.weight", 2)
    text = {
        "vocab_size": rows,
        "hidden_size": text_width,
        "intermediate_size": shape("blip.text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "num_hidden_layers": count(r"blip\.text_encoder\.encoder\.layer\.\d+\.intermediate\.dense\.weight"),
        "num_attention_heads": _heads(source, "text_heads", text_width, text_heads),
        "max_position_embeddings": shape("blip.text_encoder.embeddings.position_embeddings.weight", 2)[0],
    }
    head = [shape(f"mlp.layers.{place}.weight", 2)[0] for place in HEAD_PLACES[:-1]]
    return vision, text, head


def _heads(source: Path, option: str, width: int, heads: int | None) -> int:
    heads = heads if heads is not None else width // _HEAD_WIDTH
    if heads < 1 or width % heads:
        raise CheckpointError(f"{source}: {width} channels make no {heads} attention heads; give {option}.")
    return heads


def _check_checkpoint(source: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} has no place" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, expected floating point {tuple(place.shape)}"
        for name, place in expected.items()
        if name in tensors and (tensors[name].shape != place.shape or not tensors[name].is_floating_point())
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{source}: {len(problems)} tensors do not fit ImageReward's layout: {'; '.join(problems[:5])}{more}. "
            "Get ImageReward.pt from https://huggingface.co/THUDM/ImageReward."
        )


def _sizes(archive: NemoArchive, section: Mapping[str, Any], where: str, keys: Sequence[str]) -> dict[str, int]:
    """The fields ``keys`` of ``section``, every one a size that a network can have."""
    sizes: dict[str, int] = {}
    for key in keys:
        value: Any = section.get(key)
        most = _MOST_LAYERS if key == "num_hidden_layers" else _LARGEST  # layers take time even without memory
        if not _is_size(value) or value > most:
            raise _misfit(archive, f"{where}.{key}", value, f"a whole number from 1 to {most}")
        sizes[key] = value
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads:
        raise _misfit(archive, f"{where}.num_attention_heads", heads, f"a divisor of hidden_size {width}")
    return sizes


def _score_scale(archive: NemoArchive, section: Mapping[str, Any]) -> tuple[float, float]:
    values = {}
    for key in ("mean", "std"):
        value: Any = section.get(key)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
        if not number or (key == "std" and value <= 0):
            raise _misfit(archive, f"score.{key}", value, "a number" + (" above 0" if key == "std" else ""))
        values[key] = float(value)
    return values["mean"], values["std"]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


def _misfit(archive: NemoArchive, where: str, value: Any, expected: str) -> ArchiveError:
    return ArchiveError(f"{archive.path}: its {where} is {repr(value)[:100]}; expected {expected}.")
