"""transformers' CLIP models built from fields and tensors that come from elsewhere, nothing taken on trust.

A model is made on the meta device, its tensors are compared by name and shape with those at hand, and only then are
these put in place: no random initialisation that could stay unnoticed, no second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

# The only fields of a transformers configuration that are ever taken from a file: others could make transformers fetch
# code (attn_implementation, auto_map).
TOP_KEYS = ("projection_dim", "logit_scale_init_value")
_TOWER_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "projection_dim"),
)
TEXT_KEYS = (*_TOWER_KEYS, "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
VISION_KEYS = (*_TOWER_KEYS, "image_size", "patch_size", "num_channels")

_Model = TypeVar("_Model", bound=nn.Module)


def fields(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of ``keys`` in a configuration object."""
    return {key: getattr(config, key) for key in keys}


def on_meta(build: Callable[[], _Model]) -> _Model:
    """``build()`` with parameters that have shapes and no memory."""
    with torch.device("meta"):
        return build()


def stored_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without position numbers, which some versions of transformers save and others compute."""
    kept = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    if "logit_scale" in kept and kept["logit_scale"].numel() == 1:
        kept["logit_scale"] = kept["logit_scale"].reshape(())  # saved as (1,) by some
    return kept


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put ``state``, whose names and shapes have been checked, into a model from :func:`on_meta`."""
    model.load_state_dict(state, strict=False, assign=True)
    for module in model.modules():  # constants that no state dict holds, still on the meta device
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, Tensor):
            module.position_ids = torch.arange(positions.shape[-1]).expand((1, -1))
