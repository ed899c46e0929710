"""ImageReward in ``.nemo`` files: packing the published ``ImageReward.pt`` into one, and restoring it.

``model_config.yaml``::

    target: nemo_aligner_diffusion.rewards.image_reward.ImageReward
    nemo_version: nemo_aligner_diffusion 1
    name: image_reward
    vision: {hidden_size: 1024, intermediate_size: 4096, num_hidden_layers: 24, num_attention_heads: 16, …}
    text: {vocab_size: 30524, hidden_size: 768, …}      # fields of transformers' BlipVisionConfig, BlipTextConfig
    head: [1024, 128, 64, 16]                           # widths of the MLP's hidden layers
    score: {mean: 0.16717362830052426, std: 1.0333394966054072}
    tokenizer: {vocab_file: nemo:<hash>_vocab.txt, max_length: 35}

``model_weights.ckpt`` holds tensors of any floating dtype under the names that ``ImageReward.pt`` gives them
(``blip.visual_encoder.blocks.N.…``, ``blip.text_encoder.encoder.layer.N.…``, ``mlp.layers.N.…``), less what scoring
never uses (``blip.vision_proj``, ``blip.text_proj``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import ArchiveError, CheckpointError, RewardError, first_line
from nemo_aligner_diffusion.formats.checkpoints import read_tensors
from nemo_aligner_diffusion.formats.nemo import NemoArchive, save_nemo
from nemo_aligner_diffusion.keys import flatten
from nemo_aligner_diffusion.rewards.image_reward.reward import (
    HEAD_PLACES,
    MAX_LENGTH,
    PUBLISHED_MEAN,
    PUBLISHED_STD,
    ImageReward,
    ImageRewardNetwork,
)
from nemo_aligner_diffusion.rewards.image_reward.tokenizer import (
    VOCABULARY_FILE,
    load_tokenizer,
    read_vocabulary,
    tokenizer_from_bytes,
)
from nemo_aligner_diffusion.rewards.support.archive import filled, mapping

TARGET = "nemo_aligner_diffusion.rewards.image_reward.ImageReward"
_MOST_LAYERS = 128  # layers take time even without memory
_HEAD_WIDTH = 64  # channels per attention head in both of BLIP's encoders
_REMEDY = "Get ImageReward.pt from https://huggingface.co/THUDM/ImageReward."
# In ImageReward.pt, but of no use for a score: projections of BLIP's pretraining.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")
# Parts of the names of transformers' BLIP and what the checkpoint says instead, the first that fit.
_PREFIXES = {
    "vision.embeddings.class_embedding": "blip.visual_encoder.cls_token",
    "vision.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
    "vision.embeddings.patch_embedding": "blip.visual_encoder.patch_embed.proj",
    "vision.post_layernorm": "blip.visual_encoder.norm",
    "vision.encoder.layers.": "blip.visual_encoder.blocks.",
    "text.": "blip.text_encoder.",
    "head.": "mlp.layers.",
}
_WITHIN_VISION = {".layer_norm": ".norm", ".self_attn.qkv": ".attn.qkv", ".self_attn.projection": ".attn.proj"}


def restore_image_reward(archive: NemoArchive, tokenizer: str | Path | None, *ignored: object) -> ImageReward:
    """An ImageReward from an archive of our own; raises :class:`ArchiveError` where something doesn't fit."""
    config, state = archive.config, archive.state_dict()
    heads = [mapping(archive, config, section).get("num_attention_heads") for section in ("vision", "text")]
    try:
        found = architecture(archive.path, state, *heads)
    except CheckpointError as error:
        raise ArchiveError(str(error)) from error
    stated = flatten({section: config.get(section) for section in found})
    for key, size in flatten(found).items():
        if stated.get(key) != size:
            raise ArchiveError(
                f"{archive.path}: its {key} is {str(stated.get(key))[:100]!r}, and its weights are of {size!r}. "
                "Weights and configuration must come from the same model."
            )
    network = filled(lambda: ImageRewardNetwork(**found), state, archive.path, stored_name=checkpoint_name)
    vocabulary = load_tokenizer(archive, found["text"]["vocab_size"], tokenizer)
    score = mapping(archive, config, "score")
    most = found["text"]["max_position_embeddings"]
    max_length = mapping(archive, config, "tokenizer", optional=True).get("max_length", min(MAX_LENGTH, most))
    try:
        mean, std = float(score["mean"]), float(score["std"])
        return ImageReward(network, vocabulary, mean=mean, std=std, max_length=max_length)
    except (RewardError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArchiveError(
            f"{archive.path}: its score.mean, score.std and tokenizer.max_length cannot be used: {first_line(error)}"
        ) from error


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
        vision_heads, text_heads: attention heads; one for each 64 channels when left out, as in every published BLIP.
        mean, std: what standardises the score. The published ones belong to ``ImageReward.pt`` only: give 0 and 1 for
            a model of your own.
        max_length: tokens a prompt may have; 35 as published, or as many as the text encoder reads, when left out.
        path, dtype, name, extra, gzip: see :func:`.convert_hf_clip_to_nemo`.

    Raises:
        RewardError: ``std`` or ``max_length`` is impossible.
        CheckpointError: the checkpoint is unreadable or not of this layout.
        ArchiveError: the tokenizer doesn't fit, or the archive cannot be written.
    """
    source = Path(checkpoint)
    tensors = read_tensors(source)
    if all(key.startswith("module.") for key in tensors):  # saved from DistributedDataParallel
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(_UNUSED)}
    found = architecture(source, tensors, vision_heads, text_heads)
    network = filled(lambda: ImageRewardNetwork(**found), tensors, source, CheckpointError, _REMEDY, checkpoint_name)
    vocabulary = read_vocabulary(tokenizer_folder)
    tokenizer = tokenizer_from_bytes(vocabulary, found["text"]["vocab_size"], str(tokenizer_folder))
    max_length = max_length if max_length is not None else min(MAX_LENGTH, found["text"]["max_position_embeddings"])
    ImageReward(network, tokenizer, mean=mean, std=std, max_length=max_length)  # refuses what restoring would refuse
    config = {
        **(extra or {}),
        "target": TARGET,
        "name": name,
        **found,
        "score": {"mean": float(mean), "std": float(std)},
        "tokenizer": {"vocab_file": f"nemo:{VOCABULARY_FILE}", "max_length": max_length},
    }
    state = {checkpoint_name(key): tensor.to(dtype or tensor.dtype) for key, tensor in network.state_dict().items()}
    return save_nemo(path, config, state, {VOCABULARY_FILE: vocabulary}, gzip=gzip)


def checkpoint_name(key: str) -> str:
    """What ``ImageReward.pt`` calls the tensor ``key`` of :class:`ImageRewardNetwork`."""
    prefix = next(prefix for prefix in _PREFIXES if key.startswith(prefix))
    name = _PREFIXES[prefix] + key.removeprefix(prefix)
    if prefix.startswith("vision."):
        for ours, theirs in _WITHIN_VISION.items():
            name = name.replace(ours, theirs)
    return name


def architecture(
    source: object, tensors: Mapping[str, Tensor], vision_heads: Any = None, text_heads: Any = None
) -> dict[str, Any]:
    """Arguments of :class:`ImageRewardNetwork` from the shapes of ``tensors``, named as in ``ImageReward.pt``.

    ``source`` is named in errors; heads are one for each 64 channels unless given.

    Raises:
        CheckpointError: the tensors are not of this layout, or the heads impossible.
    """

    def shape(name: str, dimensions: int) -> Sequence[int]:
        if name not in tensors or tensors[name].ndim != dimensions:
            found = f"has {tuple(tensors[name].shape)} for" if name in tensors else "lacks"
            raise CheckpointError(
                f"{source}: {found} the tensor {name}, so it is no checkpoint of ImageReward.pt's layout. {_REMEDY}"
            )
        return tensors[name].shape

    def layers(pattern: str) -> int:
        number = sum(re.fullmatch(pattern, name) is not None for name in tensors)
        if number > _MOST_LAYERS:
            raise CheckpointError(f"{source}: its tensors are of {number} layers; expected at most {_MOST_LAYERS}.")
        return number

    def heads(option: str, width: int, given: Any) -> int:
        number = given if given is not None else width // _HEAD_WIDTH
        if not isinstance(number, int) or isinstance(number, bool) or number < 1 or width % number:
            raise CheckpointError(f"{source}: {width} channels make no {number!r} attention heads ({option}).")
        return number

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
        "num_hidden_layers": layers(r"blip\.visual_encoder\.blocks\.\d+\.norm1\.weight"),
        "num_attention_heads": heads("vision_heads", width, vision_heads),
        "image_size": side * patch,
        "patch_size": patch,
    }
    rows, text_width = shape("blip.text_encoder.embeddings.word_embeddings.weight", 2)
    text = {
        "vocab_size": rows,
        "hidden_size": text_width,
        "intermediate_size": shape("blip.text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "num_hidden_layers": layers(r"blip\.text_encoder\.encoder\.layer\.\d+\.intermediate\.dense\.weight"),
        "num_attention_heads": heads("text_heads", text_width, text_heads),
        "max_position_embeddings": shape("blip.text_encoder.embeddings.position_embeddings.weight", 2)[0],
    }
    head = [shape(f"mlp.layers.{place}.weight", 2)[0] for place in HEAD_PLACES[:-1]]
    return {"vision": vision, "text": text, "head": head}
