"""Which layers of a model are cut over a tensor-parallel group, and how: one plan per family, applied from outside.

A plan reads an unmodified model and names, block by block, the layers that hold a part of their outputs (*columns*),
those that hold a part of their inputs (*rows*) and what lies between. Everything it does not name stays whole on every
rank. In a UNet of ``diffusers``:

- attention (self and cross): ``to_q``, ``to_k``, ``to_v`` by heads, ``to_out.0`` over its inputs;
- feed-forward: ``net.0.proj`` (both halves of a gated one alike), ``net.2`` over its inputs;
- residual block: ``conv1`` and ``time_emb_proj`` over their outputs, ``norm2`` over its groups, ``conv2`` over its
  inputs.

In CLIP of ``transformers`` (a reward): attention by heads, ``fc1`` over its outputs, ``fc2`` over its inputs. Diffusion
transformers and text encoders are cut by tables of names (``parallel/tensor/tables.py``).

LoRA is put on the whole model before, by PEFT, and is cut here inside PEFT's own wrappers: before a column layer A is
whole and B is cut, before a row layer A is cut and B is whole (docs/decisions/002-lora-before-cutting.md).

Of the published configurations the plan cuts, by number of parameters: SD 1.5 88.0 %, SD 2.1 88.1 %, SDXL 97.3 %; of
the embedded model 86.4 %. What stays whole are mostly resampling convolutions, shortcuts and the projections around
transformers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.parallel.tensor.blocks import Block, base_layer, refuse
from nemo_aligner_diffusion.parallel.tensor.tables import TABLES, blocks_of, table_of

if TYPE_CHECKING:  # the rest of this module needs torch only through the models that it is given
    from torch import nn
    from torch.distributed import ProcessGroup

KEY = "model.tensor_model_parallel_size"


def check_tensor_parallel(model: nn.Module, size: int, key: str = KEY) -> list[Block]:
    """Every part of ``model`` that is cut over ``size`` ranks.

    Args:
        model: whole, on any device.
        key: the configuration key that gave ``size``, for the message.

    Raises:
        ConfigurationError: no plan for the class; a part that cannot be cut, or does not divide (the message lists the
            sizes that would work); megatron-core is not installed.
    """
    if not has_plan(model):
        known = ", ".join([*TENSOR_PLANS, *TABLES])
        raise ConfigurationError(
            f"{key}: there is no tensor-parallel plan for {type(model).__name__}; there is for {known} and for what "
            "has a _tp_plan in diffusers; set the key to 1, or add a table to TABLES "
            "(nemo_aligner_diffusion/parallel/tensor/tables.py)"
        )
    from nemo_aligner_diffusion.parallel.tensor.lora import check_layer  # and with it megatron-core's layers

    try:
        blocks = _blocks(model)
        for block in blocks:
            for layer in (*block.columns, *block.rows):
                check_layer(model.get_submodule(f"{block.path}.{layer}"), f"{block.path}.{layer}")
    except ConfigurationError as error:
        raise ConfigurationError(f"{key}: {error}; set the key to 1") from None
    _check_divides(model, blocks, size, key)
    return blocks


def has_plan(model: nn.Module) -> bool:
    """Whether a model of this class can be cut."""
    return type(model).__name__ in TENSOR_PLANS or table_of(model) is not None


def outermost_with_plan(part: nn.Module) -> list[nn.Module]:
    """``part`` itself, or what in it can be cut."""
    if has_plan(part):
        return [part]
    return [found for child in part.children() for found in outermost_with_plan(child)]


def _blocks(model: nn.Module) -> list[Block]:
    rules = TENSOR_PLANS.get(type(model).__name__)
    if rules is None:
        return blocks_of(model, table_of(model) or {})
    kinds = ((path, module, rules.get(type(module).__name__)) for path, module in model.named_modules())
    return [rule(path, module) for path, module, rule in kinds if rule is not None]


def apply_tensor_parallel(denoiser: nn.Module, group: ProcessGroup, key: str = KEY) -> None:
    """Replace layers of ``denoiser`` by this rank's part of them, in place; names of parameters stay.

    The weights (and LoRA adapters) must be whole, and the same on every rank of ``group``. A group of one rank works.

    Raises:
        ConfigurationError: no plan for the class, or a part of the model cannot be cut.
        ValueError: the model is cut already.
    """
    from nemo_aligner_diffusion.parallel.placements import CUTS, PARTIAL

    if any(hasattr(module, CUTS) for module in denoiser.modules()):
        raise ValueError(f"this {type(denoiser).__name__} is cut over a tensor-parallel group already")
    size = group.size()
    blocks = check_tensor_parallel(denoiser, size, key)  # all of them before anything is changed
    from nemo_aligner_diffusion.parallel.tensor import layers as tensor_layers
    from nemo_aligner_diffusion.parallel.tensor.lora import cut_layer_inputs, cut_layer_outputs

    for block in blocks:
        owner = denoiser.get_submodule(block.path)
        shared = bool(block.shared_inputs)
        for name, parts in block.columns.items():
            _replace(owner, name, partial(cut_layer_outputs, group=group, blocks=parts, shared_input=shared))
        for name, parts in block.rows.items():
            _replace(owner, name, partial(cut_layer_inputs, group=group, blocks=parts))
        for name in block.norms:
            _replace(owner, name, partial(tensor_layers.cut_group_norm, group=group))
        for name, dim in block.dropouts.items():
            _replace(owner, name, partial(tensor_layers.cut_dropout, group=group, dim=dim))
        for name in block.counts:
            setattr(owner, name, getattr(owner, name) // size)
        for name in block.partial:
            setattr(owner.get_submodule(name), PARTIAL, True)
        if shared:
            tensor_layers.share_input(owner, block.shared_inputs, group)


def _check_divides(model: nn.Module, blocks: list[Block], size: int, key: str) -> None:
    wrong: dict[str, dict[int, str]] = defaultdict(dict)  # what -> number -> where it is met first
    for block in blocks:
        for what, number in block.divides.items():
            if number % size:
                wrong[what].setdefault(number, block.path)
    if not wrong:
        return
    common = math.gcd(*(number for block in blocks for number in block.divides.values()))
    sizes = [candidate for candidate in range(1, common + 1) if common % candidate == 0]
    parts = [
        f"{what}: {', '.join(map(str, sorted(numbers)))} (first in {next(iter(numbers.values()))})"
        for what, numbers in wrong.items()
    ]
    raise ConfigurationError(
        f"{key} is {size}, but this {type(model).__name__} cannot be cut into {size} parts; what does not divide: "
        f"{'; '.join(parts)}. Sizes that work: {', '.join(map(str, sizes))}"
    )


def _replace(owner: nn.Module, name: str, cut: Callable[[Any], nn.Module]) -> None:
    parent, _, child = name.rpartition(".")
    holder = owner.get_submodule(parent)
    setattr(holder, child, cut(getattr(holder, child)))


def _dropout(module: Any) -> bool:
    return float(getattr(module, "p", 0.0)) > 0.0


def _attention(path: str, attention: Any) -> Block:
    """``diffusers``' Attention. Its norms lie before the projections, which give them the full gradient."""
    processors = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
    reasons = {
        "added key and value projections (add_k_proj)": attention.add_k_proj is not None,
        "query and key norms, whose weights all heads share": attention.norm_q is not None,
        "fused projections; call unfuse_qkv_projections() before": attention.fused_projections,
        "fewer key than query heads": attention.inner_kv_dim != attention.inner_dim,
        f"the processor {type(attention.processor).__name__}": type(attention.processor).__name__ not in processors,
    }
    refuse(path, reasons)
    # norms and a residual read the input too; behind a shared copy their gradients would be counted once a rank
    norms = (attention.group_norm, attention.spatial_norm, attention.norm_cross)
    alone = all(norm is None for norm in norms) and not attention.residual_connection
    return Block(
        path,
        divides={"attention heads": attention.heads},
        columns={"to_q": 1, "to_k": 1, "to_v": 1},
        rows={"to_out.0": 1},
        counts=("heads", "inner_dim", "inner_kv_dim", "sliceable_head_dim"),
        shared_inputs=("hidden_states", "encoder_hidden_states") if alone else (),
    )


def _feed_forward(path: str, feed_forward: Any) -> Block:
    kind = type(feed_forward.net[0]).__name__
    halves = {"GEGLU": 2, "SwiGLU": 2, "GELU": 1, "ApproximateGELU": 1, "LinearActivation": 1}
    refuse(path, {f"the activation {kind}": kind not in halves})
    return Block(
        path,
        divides={"feed-forward features": base_layer(feed_forward.net[2]).in_features},
        columns={"net.0.proj": halves[kind]},
        rows={"net.2": 1},
        dropouts={"net.1": -1} if _dropout(feed_forward.net[1]) else {},
    )


def _residual_block(path: str, block: Any) -> Block:
    columns = {"conv1": 1}
    if block.time_emb_proj is not None:
        # scale and shift are two halves of one projection
        columns["time_emb_proj"] = 2 if block.time_embedding_norm == "scale_shift" else 1
    return Block(
        path,
        divides={
            "group-norm groups": block.norm2.num_groups,
            "channels of residual blocks": block.norm2.num_channels,
        },
        columns=columns,
        rows={"conv2": 1},
        norms=("norm2",),
        dropouts={"dropout": 1} if _dropout(block.dropout) else {},
    )


def _clip_attention(path: str, attention: Any) -> Block:
    return Block(
        path,
        divides={"attention heads": attention.num_heads},
        columns={"q_proj": 1, "k_proj": 1, "v_proj": 1},
        rows={"out_proj": 1},
        counts=("num_heads",),
        shared_inputs=("hidden_states",),
    )


def _clip_feed_forward(path: str, feed_forward: Any) -> Block:
    features = base_layer(feed_forward.fc1).out_features
    return Block(path, divides={"feed-forward features": features}, columns={"fc1": 1}, rows={"fc2": 1})


# class of a model -> class of a module in it -> what of it is cut
TENSOR_PLANS: dict[str, Mapping[str, Callable[[str, Any], Block]]] = {
    "UNet2DConditionModel": {"Attention": _attention, "FeedForward": _feed_forward, "ResnetBlock2D": _residual_block},
    "CLIPModel": {"CLIPAttention": _clip_attention, "CLIPMLP": _clip_feed_forward},
}
