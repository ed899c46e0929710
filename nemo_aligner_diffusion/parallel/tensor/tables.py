"""Plans in the libraries' own form, a table of names and styles, and what must be cut besides for a table to hold.

``diffusers`` has such a table on some classes (``_tp_plan``: FLUX.1, FLUX.2, Qwen-Image), ``transformers`` makes one for
each model. The tables for other classes are here. ``*`` is any one part of a name; a name that no module has is passed
over (SD 3.5's second attention, a last block without a text stream). Styles:

- ``colwise``: over its outputs (an embedding: over its features); ``rowwise``: over its inputs;
- ``PackedColwiseParallel``, ``PackedRowwiseParallel`` of ``diffusers``: the same for outputs or inputs that are several
  blocks one after the other, each of which is cut; FLUX.2's query, key, value, gate and value of the feed-forward are
  one layer, FLUX.1's single blocks end in one layer for attention and feed-forward.

From names and styles alone follow: which layers make one cut part (a row layer and the columns in the innermost module
around both), what must divide, how many heads a rank has, and that a norm of queries or keys over one head is whole on
every rank and its weight's gradient a sum. A norm over all heads would need the others' heads: refused.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.tensor.blocks import Block, Shares, base_layer, refuse

# transformers' styles that need no cut here: word embeddings, the head of a language model, norms of one head
_WHOLE = ("embedding_rowwise", "colwise_gather_output", "replicated_with_grad_allreduce")
# attributes of an attention or feed-forward module that count what is cut
_COUNTS = ("heads", "inner_dim", "inner_kv_dim", "sliceable_head_dim", "mlp_hidden_dim", "num_heads", "n_heads",
           "num_key_value_heads")  # fmt: skip
# of diffusers' attention classes without a default processor of their own
_PROCESSORS = ("JointAttnProcessor2_0", "QwenDoubleStreamAttnProcessor2_0", "ZSingleStreamAttnProcessor")

# class of a model -> its table
TABLES: dict[str, Mapping[str, Any]] = {
    "SD3Transformer2DModel": {
        "transformer_blocks.*.attn.to_q": "colwise",
        "transformer_blocks.*.attn.to_k": "colwise",
        "transformer_blocks.*.attn.to_v": "colwise",
        "transformer_blocks.*.attn.add_q_proj": "colwise",
        "transformer_blocks.*.attn.add_k_proj": "colwise",
        "transformer_blocks.*.attn.add_v_proj": "colwise",
        "transformer_blocks.*.attn.to_out.0": "rowwise",
        "transformer_blocks.*.attn.to_add_out": "rowwise",
        "transformer_blocks.*.attn2.to_q": "colwise",
        "transformer_blocks.*.attn2.to_k": "colwise",
        "transformer_blocks.*.attn2.to_v": "colwise",
        "transformer_blocks.*.attn2.to_out.0": "rowwise",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
        "transformer_blocks.*.ff_context.net.0.proj": "colwise",
        "transformer_blocks.*.ff_context.net.2": "rowwise",
    },
    "ZImageTransformer2DModel": {  # the first name: layers, noise_refiner, context_refiner, siglip_refiner
        "*.*.attention.to_q": "colwise",
        "*.*.attention.to_k": "colwise",
        "*.*.attention.to_v": "colwise",
        "*.*.attention.to_out.0": "rowwise",
        "*.*.feed_forward.w1": "colwise",
        "*.*.feed_forward.w3": "colwise",
        "*.*.feed_forward.w2": "rowwise",
    },
    "T5EncoderModel": {
        "encoder.block.*.layer.0.SelfAttention.q": "colwise",
        "encoder.block.*.layer.0.SelfAttention.k": "colwise",
        "encoder.block.*.layer.0.SelfAttention.v": "colwise",
        "encoder.block.*.layer.0.SelfAttention.relative_attention_bias": "colwise",  # a feature is a head
        "encoder.block.*.layer.0.SelfAttention.o": "rowwise",
        "encoder.block.*.layer.1.DenseReluDense.wi": "colwise",
        "encoder.block.*.layer.1.DenseReluDense.wi_0": "colwise",
        "encoder.block.*.layer.1.DenseReluDense.wi_1": "colwise",
        "encoder.block.*.layer.1.DenseReluDense.wo": "rowwise",
    },
}


def table_of(model: Any) -> Mapping[str, Any] | None:
    """The table for a model of ``diffusers`` or ``transformers``; ``None``: there is none."""
    return TABLES.get(type(model).__name__) or getattr(model, "_tp_plan", None) or None


def blocks_of(model: Any, table: Mapping[str, Any]) -> list[Block]:
    """Every part of ``model`` that ``table`` cuts.

    Raises:
        ConfigurationError: a style that is not known, or a part that cannot be cut.
    """
    styles = _styles(model, table)
    rows = [name for name, style in styles.items() if _is_row(style)]
    columns = [name for name in styles if name not in set(rows)]
    around = {parent for name in columns for parent in _parents(name)}
    ends: dict[str, list[str]] = defaultdict(list)  # innermost module around a row layer and columns -> its row layers
    for name in rows:
        holder = next((p for p in _parents(name) if p in around and _has_forward(model, p)), "")
        ends[holder].append(name)
    parts: dict[str, list[str]] = {}  # a module that is one Block -> its columns
    ended = set()
    for name in columns:
        owner = next((parent for parent in _parents(name) if parent in ends), "")
        refuse(name, {"no layer after it is cut over its inputs": not owner})
        ended.add(owner)
        parent = _parents(name)[0]  # in a block with one last layer for both, attention is a part of its own
        parts.setdefault(parent if _head_dim(model.get_submodule(parent)) else owner, []).append(name)
    for owner, names in ends.items():
        refuse(names[0], {"no layer before it is cut over its outputs": owner not in ended})
        parts.setdefault(owner, [])
    return [_block(model, part, names, ends.get(part, []), styles) for part, names in parts.items()]


def _styles(model: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    """By the names of the layers that there are."""
    patterns = [(re.compile(re.escape(key).replace(r"\*", r"[^.]+")), style) for key, style in table.items()]
    found = {}
    for name, _ in model.named_modules():
        for pattern, style in patterns:
            if pattern.fullmatch(name) and style not in _WHOLE:
                found[name] = style
    return found


def _is_row(style: Any) -> bool:
    kinds = {"rowwise": True, "PackedRowwiseParallel": True, "colwise": False, "PackedColwiseParallel": False}
    kind = style if isinstance(style, str) else type(style).__name__
    if kind not in kinds:
        raise ConfigurationError(f"its tensor-parallel table has the style {kind}; known are {', '.join(kinds)}")
    return kinds[kind]


def _parents(name: str) -> list[str]:
    """Of a module's name, the innermost first, without the model itself."""
    words = name.split(".")
    return [".".join(words[:length]) for length in range(len(words) - 1, 0, -1)]


def _has_forward(model: Any, path: str) -> bool:
    from torch import nn

    return not isinstance(model.get_submodule(path), (nn.ModuleList, nn.ModuleDict, nn.Sequential))


def _head_dim(module: Any) -> int | None:
    """Features of a head; ``None``: not an attention layer."""
    for name in ("head_dim", "key_value_proj_dim"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    heads, inner = getattr(module, "heads", None), getattr(module, "inner_dim", None)
    return inner // heads if isinstance(heads, int) and isinstance(inner, int) else None


def _shares(layer: Any, style: Any) -> Shares:
    """The blocks of a packed layer, in lowest terms."""
    if isinstance(style, str):
        return 1
    layer, kind = base_layer(layer), "row" if _is_row(style) else "col"
    blocks = style.blocks or getattr(layer, f"_tp_packed_{kind}_blocks")  # the same rule as diffusers'
    return tuple(block // math.gcd(*blocks) for block in blocks)


def _block(model: Any, path: str, columns: list[str], rows: list[str], styles: Mapping[str, Any]) -> Block:
    module = model.get_submodule(path)
    head_dim = _head_dim(module) if columns else None
    divides: dict[str, int] = {}
    for name in columns:
        layer, shares = base_layer(model.get_submodule(name)), _shares(model.get_submodule(name), styles[name])
        width = layer.embedding_dim if hasattr(layer, "embedding_dim") else layer.out_features
        if head_dim is None or shares != 1:
            divides["feed-forward features"] = width // (1 if shares == 1 else sum(shares))  # type: ignore[arg-type]
            if head_dim is not None:
                divides["attention heads"] = module.heads
        elif not hasattr(layer, "embedding_dim"):  # fewer heads of keys and values than of queries
            known = divides.setdefault("attention heads", width // head_dim)
            if width // head_dim != known:
                divides["key and value heads"] = width // head_dim

    def relative(names: list[str]) -> dict[str, Shares]:
        return {name[len(path) + 1 :]: _shares(model.get_submodule(name), styles[name]) for name in names}

    return Block(
        path,
        divides=divides,
        columns=relative(columns),
        rows=relative(rows),
        counts=tuple(name for name in _COUNTS if columns and isinstance(getattr(module, name, None), int)),
        shared_inputs=_shared_inputs(module, path, columns, head_dim is not None),
        partial=() if head_dim is None else _norms(module, path, [*columns, *rows], head_dim),
    )


def _shared_inputs(module: Any, path: str, columns: list[str], is_attention: bool) -> tuple[str, ...]:
    """What several columns read: an attention layer's states, a gated feed-forward's only argument."""
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if is_attention:
        return tuple(itertools.takewhile(("hidden_states", "encoder_hidden_states").__contains__, arguments))
    alone = len(arguments) == 1 and all(_parents(name)[0] == path for name in columns)
    return (arguments[0],) if alone and len(columns) > 1 else ()


def _norms(attention: Any, path: str, cut: list[str], head_dim: int) -> tuple[str, ...]:
    """The norms of queries and keys, each over one head; other parts that are not cut are refused."""
    processor = getattr(attention, "processor", None)
    own = getattr(type(attention), "_default_processor_cls", None)
    unknown = processor is not None and type(processor) is not own and type(processor).__name__ not in _PROCESSORS
    inside = {name[len(path) + 1 :].partition(".")[0] for name in cut}
    norms, others = [], []
    for name, child in attention.named_children():
        shapes = {tuple(parameter.shape) for parameter in child.parameters()}
        if name not in inside and shapes:
            (norms if shapes == {(head_dim,)} else others).append(name)
    fused = bool(getattr(attention, "fused_projections", False))
    refuse(path, {
        "fused projections; call unfuse_qkv_projections() before": fused,
        f"the processor {type(processor).__name__}": unknown and not fused,
        f"{', '.join(others)}, which would read what other ranks hold": bool(others) and not fused,
        "a residual connection": bool(getattr(attention, "residual_connection", False)),
    })  # fmt: skip
    return tuple(norms)
