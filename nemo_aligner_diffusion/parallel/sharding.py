"""FSDP2 on models as ``diffusers`` and ``transformers`` made them: which modules are gathered together."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_aligner_diffusion.parallel.placements import is_sharded

# class of a denoiser -> the block whose inside its own forward calls (here for the embedding of the class)
_CALLED_INTO = {"DiTTransformer2DModel": "transformer_blocks.0"}


def shard_denoiser(denoiser: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    """Shard a denoiser in place: each of its blocks (:func:`gathered_blocks`) is gathered on its own, the rest with the
    root.

    Args:
        reshard_after_forward: see :class:`.Layout`; always of a frozen denoiser, which has no backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    frozen = not any(parameter.requires_grad for parameter in denoiser.parameters())
    reshard_after_forward = reshard_after_forward or frozen
    for block in gathered_blocks(denoiser):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
        if reshard_after_forward:
            _leave_as_found(block)
    fully_shard(denoiser, mesh=mesh, reshard_after_forward=reshard_after_forward)
    if frozen:
        _forget_calls(denoiser)


def gathered_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """What of a denoiser is gathered on its own, inner modules before those around them.

    Modules of the classes that the denoiser's own class names as indivisible or repeated; where it names none, the
    members of its outermost module lists. One that is mostly made of others (a UNet's up block) is left to them. FSDP2
    gathers a block when it is called itself: one whose inside the denoiser calls is left to the root.
    """
    names = {name for key in ("_no_split_modules", "_repeated_blocks") for name in getattr(denoiser, key, None) or ()}
    named = [module for module in denoiser.modules() if type(module).__name__ in names and module is not denoiser]
    found: list[nn.Module] = []
    inside: set[nn.Parameter] = set()  # of those found
    left = _CALLED_INTO.get(type(denoiser).__name__)
    blocks = [
        block for block in named or _listed(denoiser, None) if not left or block is not denoiser.get_submodule(left)
    ]
    for block in reversed(blocks):  # modules() has what is inside a module after it
        parameters = list(block.parameters())
        inner = sum(parameter.numel() for parameter in parameters if parameter in inside)
        if parameters and inner <= sum(parameter.numel() for parameter in parameters) / 2:
            found.append(block)
            inside |= set(parameters)
    return found


def shard_frozen(module: nn.Module, mesh: DeviceMesh, leave: str | None = None) -> None:
    """Shard a frozen network in place.

    Its callers use more of it than ``forward`` (a VAE's ``decode``, a reward's towers), and FSDP2 gathers weights when
    ``forward`` is called. So each member of its outermost module lists (the layers of a transformer, the blocks of a
    decoder) is sharded; what is outside of any list stays whole.

    Args:
        leave: children with this in their name stay whole. Every rank must call a sharded module equally often; a
            reward that remembers the embeddings of its prompts does not call its text tower so.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in _listed(module, leave):
        # by default FSDP2 keeps gathered what nothing sharded encloses, for a backward pass that it expects next
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        _leave_as_found(layer)
        _forget_calls(layer)


def _leave_as_found(block: nn.Module) -> None:
    """Let ``block`` be sharded after a call if it was before, whenever it is called.

    FSDP2 keeps what a call *within a backward pass* gathered, until the block's own backward pass comes. Where that
    call recomputes one block, its backward pass comes next; here a whole network call is recomputed, and all of its
    blocks would be gathered at once. A block whose own backward pass is under way is found gathered and stays so.
    """
    found_sharded = False

    def before(*_: Any) -> None:
        nonlocal found_sharded
        found_sharded = is_sharded(next(block.parameters()))

    def after(*_: Any) -> None:
        if found_sharded:
            cast(Any, block).reshard()

    block.register_forward_pre_hook(before, prepend=True)  # before FSDP2's own, which gathers
    block.register_forward_hook(after)


def _listed(module: nn.Module, leave: str | None) -> list[nn.Module]:
    found: list[nn.Module] = []
    for name, child in module.named_children():
        if leave is not None and leave in name:
            continue
        if isinstance(child, nn.ModuleList) and not any(isinstance(member, nn.ModuleList) for member in child):
            found += [member for member in child if any(True for _ in member.parameters())]
        else:
            found += _listed(child, leave)
    return found


def _forget_calls(root: nn.Module) -> None:
    """Let FSDP2 forget a call of ``root`` that has no backward pass.

    It lists every call, and clears the list after a backward pass: of a frozen network there may never be one.
    """

    def after(*_: Any) -> None:
        if not torch.is_grad_enabled():
            cast(Any, root).reset_iter_state()

    if hasattr(root, "reset_iter_state"):  # not in older PyTorch: the list grows there, by some kB a micro-batch
        root.register_forward_hook(after)
