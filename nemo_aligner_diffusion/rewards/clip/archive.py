"""CLIP rewards in ``.nemo`` files: restoring one, and packing a Hugging Face ``CLIPModel`` into one.

``model_config.yaml`` of our own archives::

    target: nemo_aligner_diffusion.rewards.clip.CLIPReward
    nemo_version: nemo_aligner_diffusion 1
    name: clip
    clip: {projection_dim: …, text_config: {…}, vision_config: {…}}   # transformers.CLIPConfig, fields: clip_model
    score: pickscore                          # pickscore | hps | clipscore
    preprocessing: {image_size: 224, mean: [r, g, b], std: [r, g, b], interpolation: bicubic, resize: crop}
    prompt_prefix: ""                         # words before every prompt
    tokenizer: {vocab_file: nemo:<hash>_vocab.json, merges_file: nemo:<hash>_merges.txt, max_length: 77}

``model_weights.ckpt`` holds ``CLIPModel.state_dict()`` in any floating dtype. Archives written by NeMo and NeMo-Aligner
(``…MegatronCLIPModel``, ``…MegatronCLIPRewardModel``) are converted on the fly, see
:mod:`~nemo_aligner_diffusion.formats.megatron_clip`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_aligner_diffusion.errors import ArchiveError, RewardError
from nemo_aligner_diffusion.formats.megatron_clip import hf_layout
from nemo_aligner_diffusion.formats.megatron_shards import merged_state
from nemo_aligner_diffusion.formats.nemo import NemoArchive, save_nemo
from nemo_aligner_diffusion.rewards.clip.reward import CLIPReward
from nemo_aligner_diffusion.rewards.clip.tokenizer import load_tokenizer, read_tokenizer_files
from nemo_aligner_diffusion.rewards.restore import SCORES
from nemo_aligner_diffusion.rewards.support.archive import filled, mapping, stored_tensors
from nemo_aligner_diffusion.rewards.support.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import CLIPModel

TARGET = "nemo_aligner_diffusion.rewards.clip.CLIPReward"
# The only fields of a transformers configuration that are ever taken from a file: others could make transformers fetch
# code (attn_implementation, auto_map).
TOP_KEYS = ("projection_dim", "logit_scale_init_value")
_TOWER_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "projection_dim"),
)
TEXT_KEYS = (*_TOWER_KEYS, "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
VISION_KEYS = (*_TOWER_KEYS, "image_size", "patch_size", "num_channels")


def restore_clip(archive: NemoArchive, tokenizer: str | Path | None, score: str | None) -> CLIPReward:
    """A CLIP reward from an archive, ours or NeMo's; raises :class:`ArchiveError` where something doesn't fit.

    ``tokenizer`` and ``score``: see :func:`.restore_reward`.
    """
    from transformers import CLIPConfig, CLIPModel

    config, megatron = archive.config, archive.target != TARGET
    state = merged_state(archive, config) if megatron else archive.state_dict()
    tokens = load_tokenizer(archive, tokenizer)
    if megatron:
        config, state = hf_layout(archive, config, state, _highest_id(tokens) + 1, tokens.eos_token_id)
    clip = mapping(archive, config, "clip")
    sections = {
        "text_config": tower_fields(archive, clip, "text_config", TEXT_KEYS, len(state)),
        "vision_config": tower_fields(archive, clip, "vision_config", VISION_KEYS, len(state)),
        **{key: clip[key] for key in TOP_KEYS if clip.get(key) is not None},
    }
    model = filled(lambda: CLIPModel(CLIPConfig(**sections)), state, archive.path)
    vision: Any = model.config.vision_config
    _check_tokenizer(archive, tokens, model)
    score = score or config.get("score", "pickscore")
    if score not in SCORES:
        raise ArchiveError(f"{archive.path}: its score is {score!r}; known are {', '.join(SCORES)}.")
    prefix = config.get("prompt_prefix") or ""
    if not isinstance(prefix, str):
        raise ArchiveError(f"{archive.path}: its prompt_prefix is {str(prefix)[:100]!r}; expected text.")
    max_length = mapping(archive, config, "tokenizer", optional=True).get("max_length")
    if max_length is not None and (not isinstance(max_length, int) or max_length < 2):
        raise ArchiveError(f"{archive.path}: tokenizer.max_length is {max_length!r}; expected at least 2 tokens.")
    return CLIPReward(
        model,
        tokens,
        score=score,
        prompt_prefix=prefix,
        max_length=max_length,
        preprocessing=read_preprocessing(archive, config, vision.image_size),
    )


def convert_hf_clip_to_nemo(
    model: CLIPModel,
    tokenizer_files: str | Path | Mapping[str, str | Path | bytes],
    path: str | Path,
    *,
    score: str = "pickscore",
    preprocessing: Preprocessing | None = None,
    prompt_prefix: str = "",
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    name: str = "clip",
    extra: Mapping[str, Any] | None = None,
    gzip: bool = False,
) -> Path:
    """Pack a CLIP model and its byte-pair tokenizer into a ``.nemo`` that :func:`.restore_reward` reads.

    Args:
        model: the model; left as it is.
        tokenizer_files: a folder holding ``vocab.json`` and ``merges.txt`` (or ``tokenizer.json``), or the contents or
            paths of the two by these names.
        path: the archive to write.
        score: how embeddings become a reward.
        preprocessing: how the model's pictures were prepared when it was trained; OpenAI's when left out.
        prompt_prefix: words put before every prompt.
        max_length: tokens a prompt may have; the model's number of positions when left out.
        dtype: of the saved weights, e.g. ``torch.float16`` for half the size; ``logit_scale`` keeps its own.
        name: what the reward is called in metrics.
        extra: further configuration entries, e.g. provenance; ignored when restoring.
        gzip: compress the archive.
    """
    if not isinstance(tokenizer_files, Mapping):
        tokenizer_files = read_tokenizer_files(tokenizer_files)
    clip: Any = model.config
    text, vision = clip.text_config, clip.vision_config
    config = {
        **(extra or {}),
        "target": TARGET,
        "name": name,
        "clip": {
            **fields(clip, TOP_KEYS),
            "text_config": fields(text, TEXT_KEYS),
            "vision_config": fields(vision, VISION_KEYS),
        },
        "score": score,
        "preprocessing": (preprocessing or Preprocessing(vision.image_size)).as_config(),
        **({"prompt_prefix": prompt_prefix} if prompt_prefix else {}),
        "tokenizer": {
            "vocab_file": "nemo:vocab.json",
            "merges_file": "nemo:merges.txt",
            "max_length": max_length or text.max_position_embeddings,
        },
    }
    state = {
        key: tensor.to(dtype) if dtype is not None and key != "logit_scale" else tensor
        for key, tensor in stored_tensors(model.state_dict()).items()
    }
    return save_nemo(path, config, state, dict(tokenizer_files), gzip=gzip)


def fields(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of ``keys`` in a configuration object."""
    return {key: getattr(config, key) for key in keys}


def tower_fields(
    archive: NemoArchive, clip: Mapping[str, Any], section: str, keys: tuple[str, ...], tensors: int
) -> dict[str, Any]:
    """The given ``keys`` of the archive's ``clip.<section>``, with as many layers as ``tensors`` allow."""
    given = mapping(archive, clip, section)
    found = {key: given[key] for key in keys if given.get(key) is not None}
    layers = found.get("num_hidden_layers", 12)
    # Before a loop of that many layers is entered: each has 16 tensors of its own.
    if not isinstance(layers, int) or not 0 < layers <= tensors:
        raise ArchiveError(
            f"{archive.path}: clip.{section}.num_hidden_layers is {layers!r}, but there are {tensors} tensors."
        )
    return found


def _highest_id(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values())


def _check_tokenizer(archive: NemoArchive, tokenizer: Any, model: Any) -> None:
    text = model.config.text_config
    highest = _highest_id(tokenizer)
    if highest >= text.vocab_size:
        raise ArchiveError(
            f"{archive.path}: its tokenizer gives ids up to {highest}, its text model has {text.vocab_size} of them. "
            "Tokenizer and weights must come from the same model."
        )
    # transformers pools at eos_token_id, or, where that is 2 (files from before 2023), at the highest id.
    pooled_at = highest if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != pooled_at:
        raise ArchiveError(
            f"{archive.path}: its tokenizer ends a prompt with id {tokenizer.eos_token_id}, its text model pools at "
            f"{pooled_at} (clip.text_config.eos_token_id). Every prompt would be embedded at the wrong place."
        )


def read_preprocessing(archive: NemoArchive, config: Mapping[str, Any], image_size: int) -> Preprocessing:
    """The archive's ``preprocessing``, for a vision model that takes ``image_size``."""
    given = {key: value for key, value in mapping(archive, config, "preprocessing", optional=True).items() if value}
    if given.pop("image_size", image_size) != image_size:
        raise ArchiveError(
            f"{archive.path}: preprocessing.image_size is {config['preprocessing']['image_size']!r}, but the vision "
            f"model takes {image_size}."
        )
    known = {key: given[key] for key in ("mean", "std", "interpolation", "resize") if key in given}
    try:
        return Preprocessing(image_size, **known)
    except RewardError as error:
        raise ArchiveError(f"{archive.path}: {error}") from error
