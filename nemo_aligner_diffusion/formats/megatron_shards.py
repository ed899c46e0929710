"""CLIP models that NeMo saved from several tensor-parallel ranks, put together again.

What Megatron's layers do to each tensor (megatron.core.tensor_parallel): a column-parallel linear keeps a block of rows
and of the bias on each rank, a row-parallel one a block of columns and the whole bias, the vocabulary's embedding a
block of rows; everything else is on every rank. ``query_key_value`` holds, per rank, the rows of that rank's heads:
by head where the configuration says ``megatron_legacy: false``, else first all of its q rows, then k, then v.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import ArchiveError, printable
from nemo_aligner_diffusion.formats.nemo import NemoArchive
from nemo_aligner_diffusion.formats.nemo.common import WEIGHTS_NAME

_BY_ROWS = re.compile(r".*(\.mlp\.dense_h_to_4h\.(weight|bias)|\.word_embeddings\.weight)")
_BY_COLUMNS = re.compile(r".*(\.self_attention\.dense|\.mlp\.dense_4h_to_h)\.weight")
_QKV = re.compile(r".*\.self_attention\.query_key_value\.(weight|bias)")


def merged_state(archive: NemoArchive, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a NeMo CLIP archive, those of several tensor-parallel ranks merged.

    Raises:
        ArchiveError: the ranks don't belong together: names or shapes differ, or a tensor that every rank should hold.
    """
    shards = archive.shards()
    stated = config.get("tensor_model_parallel_size")
    in_rank_folders = WEIGHTS_NAME not in archive.members
    if in_rank_folders and isinstance(stated, int) and stated not in (1, len(shards)):
        raise ArchiveError(
            f"{archive.path}: it holds {len(shards)} of the tensor-parallel ranks, and its model_config.yaml says "
            f"tensor_model_parallel_size: {stated}. Save the archive again with all ranks."
        )
    if len(shards) == 1:
        return shards[0]
    for rank, shard in enumerate(shards):
        if different := sorted(set(shard) ^ set(shards[0])):
            raise ArchiveError(
                f"{archive.path}: ranks 0 and {rank} hold different tensors, e.g. {printable(different[0])}. Only "
                "tensor-parallel shards of one model can be merged."
            )
    legacy = {name: _is_legacy(config, name) for name in ("text", "vision")}
    return {name: _merge(archive, name, [shard[name] for shard in shards], legacy) for name in shards[0]}


def _merge(archive: NemoArchive, name: str, parts: list[Tensor], legacy: Mapping[str, bool]) -> Tensor:
    first = parts[0]
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ArchiveError(f"{archive.path}: {printable(name)} has shapes {shapes} on its ranks; expected equal ones.")
    if _QKV.fullmatch(name) and first.ndim and len(first) % 3 == 0:
        if not legacy["vision" if "vision_encoder." in name else "text"]:
            return torch.cat(parts)
        blocks = [torch.chunk(part, 3) for part in parts]
        return torch.cat([block[letter] for letter in range(3) for block in blocks])
    if _BY_ROWS.fullmatch(name) and first.ndim:
        return torch.cat(parts)
    if _BY_COLUMNS.fullmatch(name) and first.ndim == 2:
        return torch.cat(parts, dim=1)
    for rank, part in enumerate(parts):
        if not torch.equal(part, first):
            raise ArchiveError(
                f"{archive.path}: {printable(name)} differs between tensor-parallel ranks 0 and {rank}, and should "
                "be the same on all. Merge the ranks with the program that wrote them, and save the archive again."
            )
    return first


def _is_legacy(config: Mapping[str, Any], tower: str) -> bool:
    section = config.get(tower)
    return bool(section.get("megatron_legacy", True)) if isinstance(section, Mapping) else True
