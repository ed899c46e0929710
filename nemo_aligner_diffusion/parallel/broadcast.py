"""What processes tell one another outside of training's own messages; above all, loading once per node.

The first process of each node, its *leader*, reads files as if it were alone; the others get the loaded module's
structure (pickled, without its tensors) and then one tensor after the other, each placed on its own device before the
next one comes: beside the leader's copy a node's host memory holds one tensor a process.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import AlignerError
from nemo_aligner_diffusion.runtime.join import collective_timeout
from nemo_aligner_diffusion.runtime.process import this_process

log = logging.getLogger(__name__)

_Module = TypeVar("_Module", bound=nn.Module)
_Value = TypeVar("_Value")


def load_once(
    load: Callable[[], _Module],
    device: str | torch.device = "cpu",
    phase: Callable[[str], AbstractContextManager[Any]] | None = None,
) -> _Module:
    """The module that ``load()`` makes, on ``device``, in every process; ``load`` runs in one process of each node.

    A collective call of all processes. Everything about the module is the leader's, ties and buffers included. A module
    that cannot be pickled (a user's own code) is loaded by every process for itself.

    Args:
        load: reads files and builds a module on the CPU; must do the same in every process.
        device: where the module's tensors go, this process's own.
        phase: ``phase(name)`` surrounds each part of the work, for reports of how long it took.

    Raises:
        AlignerError: loading failed on a node; every process of every node raises the same error. So does any other
            exception, as itself where it can be pickled, else as a ``RuntimeError`` that quotes it.
    """
    phase = phase or (lambda name: nullcontext())
    if rank_and_size()[1] == 1:
        with phase("reading weights"):
            loaded = load()
        with phase("moving to the device"):
            return loaded.to(device)
    node = _node()
    module: _Module | None = None
    tensors: list[Tensor] = []

    def read() -> tuple[bytes, list[tuple[torch.Size, torch.dtype]]] | None:
        nonlocal module, tensors
        module = load()
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        try:
            pickler.dump(module)
        # pickle raises what the objects' own methods raise: PicklingError, TypeError, AttributeError and more
        except Exception as error:
            log.info("every process loads for itself: %s cannot be pickled (%s)", type(module).__name__, error)
            return None
        tensors = pickler.tensors
        return stream.getvalue(), [(tensor.shape, tensor.dtype) for tensor in tensors]

    with phase("reading weights"):  # the others wait for their leader
        outcome = [on_every_process(lambda: read() if node.is_leader else None)]
        dist.broadcast_object_list(outcome, src=node.leader, group=node.group)
        if outcome[0] is None:
            return on_every_process(lambda: module if module is not None else load()).to(device)
    with phase("handing on"):
        if module is not None:
            for tensor in tensors:
                _send(tensor, node, torch.device(device))
            return module.to(device)
        skeleton, described = outcome[0]
        received = [_receive(shape, dtype, node, torch.device(device)) for shape, dtype in described]
        unpacked: _Module = _Unpickler(io.BytesIO(skeleton), received).load()
        _build_one_of_each_class(unpacked)
        return unpacked


def _build_one_of_each_class(module: nn.Module) -> None:
    """Let ``transformers`` know the classes of its models in ``module``, as where they were built from files.

    Which outputs a model can record (``output_hidden_states=True``) is noted by class when one is built, for this
    process alone; a model that was unpickled would give none. One on the meta device takes no memory.
    """
    library: Any = sys.modules.get("transformers.modeling_utils")
    known: set[type] = set()
    for part in module.modules() if library is not None else ():
        if isinstance(part, library.PreTrainedModel) and type(part) not in known:
            with torch.device("meta"):
                built = type(part)(copy.deepcopy(part.config))
            known |= {type(inner) for inner in built.modules()}


def on_every_process(action: Callable[[], _Value], group: Any = None) -> _Value:
    """``action()`` in every process, each with its own result; what fails in one is raised in all.

    Otherwise the others would wait for it in their next collective call until that times out.

    Args:
        group: from :func:`own_group`; ``None``: the one that everybody uses.
    """
    if rank_and_size()[1] == 1:
        return action()
    result: list[_Value] = []
    failure: Exception | None = None
    try:
        result.append(action())
    except Exception as error:
        failure = _portable(error)
    for rank, found in enumerate(gather(failure, group)):
        if found is not None:
            if isinstance(found, AlignerError):
                found.said = rank != dist.get_rank()  # by the process that met it
            raise found
    return result[0]


def gather(value: _Value, group: Any = None) -> list[_Value]:
    """Every process's ``value`` (small, picklable) by rank, in every process; ``group`` as above."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=_node().world if group is None else group)
    return values


def from_first_process(action: Callable[[], _Value]) -> _Value:
    """What ``action()`` gives in the first process (small, picklable), in every process; so is what it raises."""
    rank = rank_and_size()[0]
    first: Any = gather(on_every_process(lambda: action() if rank == 0 else None))[0]
    return first


def first_of_group(value: _Value, group: dist.ProcessGroup) -> _Value:
    """The ``value`` (picklable) of the first rank of ``group``, on all of them."""
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def rank_and_size() -> tuple[int, int]:
    """Of this process among all that are in the process group; ``(0, 1)`` without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_group() -> Any:
    """All processes again, for messages of another thread, which must not meet the others'; ``None``: there is one."""
    if rank_and_size()[1] == 1:
        return None
    return dist.new_group(backend="gloo", timeout=collective_timeout())


@dataclass(frozen=True)
class _Node:
    """The processes of this node. ``group`` carries objects and CPU tensors; ``fast`` is NCCL's, where there is one."""

    leader: int  # global rank
    is_leader: bool
    group: Any
    world: Any
    fast: Any


_known: tuple[Any, _Node] | None = None  # for the process group that was the default one then


def _node() -> _Node:
    """Groups of this node's processes, made at the first call (a collective one) for a default process group."""
    global _known
    default = dist.group.WORLD
    if _known is not None and _known[0] is default:
        return _known[1]
    nccl = "nccl" in str(dist.get_backend_config())
    timeout = collective_timeout()  # the others wait for their leader to read a file
    world = dist.new_group(backend="gloo", timeout=timeout)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, (this_process().node_rank, platform.node()), group=world)
    mine: _Node | None = None
    for name in dict.fromkeys(names):  # every process makes every group, in the same order
        ranks = [rank for rank, other in enumerate(names) if other == name]
        group, fast = world, default if nccl else None
        if len(ranks) < len(names):
            group = dist.new_group(ranks, backend="gloo", timeout=timeout)
            fast = dist.new_group(ranks, backend="nccl", timeout=timeout) if nccl else None
        if dist.get_rank() in ranks:
            mine = _Node(ranks[0], dist.get_rank() == ranks[0], group, world, fast)
    assert mine is not None
    _known = (default, mine)
    return mine


def _portable(error: Exception) -> Exception:
    """``error`` if it can be rebuilt elsewhere with the same message, else one that can."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception as reason:
        log.debug("an exception cannot be pickled: %s", reason)
    known = next((kind for kind in type(error).__mro__ if kind.__module__ == AlignerError.__module__), None)
    return known(str(error)) if known is not None else RuntimeError(f"{type(error).__name__}: {error}")


class _Pickler(pickle.Pickler):
    """Leaves tensors out; ``tensors`` holds them, those that share their memory once."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._objects: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an id belongs to one object as long as that exists
        self._places: dict[Any, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.layout != torch.strided:
            raise pickle.PicklingError(f"a {type(value).__name__} on {value.device} is no plain tensor")
        storage = value.untyped_storage().data_ptr() if value.numel() else id(value)  # empty ones have no memory
        place = storage, value.storage_offset(), value.shape, value.stride(), value.dtype
        if place not in self._places:
            self._places[place] = len(self.tensors)
            self.tensors.append(value)
        self._alive.append(value)
        number = self._objects.setdefault(id(value), len(self._objects))
        return number, self._places[place], isinstance(value, nn.Parameter), value.requires_grad


class _Unpickler(pickle.Unpickler):
    """Puts ``tensors`` where the leader's were. What it reads comes from a process of the same job."""

    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors
        self._objects: dict[int, Tensor] = {}

    def persistent_load(self, identity: Any) -> Tensor:
        number, place, is_parameter, requires_grad = identity
        if number not in self._objects:
            # a view of its own, so that a tied storage does not make two parameters one object
            tensor = self._tensors[place].view(self._tensors[place].shape)
            self._objects[number] = (
                nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)
            )
        return self._objects[number]


def _send(tensor: Tensor, node: _Node, device: torch.device) -> None:
    """Give ``tensor`` to the node's other processes."""
    value = tensor.detach().contiguous()
    if node.fast is not None and device.type == "cuda":
        dist.broadcast(_bytes(value.to(device)), src=node.leader, group=node.fast)
    elif value.numel():
        dist.broadcast(_bytes(value), src=node.leader, group=node.group)


def _receive(shape: torch.Size, dtype: torch.dtype, node: _Node, device: torch.device) -> Tensor:
    """On ``device``: through NCCL at once, else through host memory, which holds this one tensor then."""
    fast = node.fast is not None and device.type == "cuda"
    value = torch.empty(shape, dtype=dtype, device=device if fast else "cpu")
    if fast or value.numel():
        dist.broadcast(_bytes(value), src=node.leader, group=node.fast if fast else node.group)
    return value.to(device)


def _bytes(contiguous: Tensor) -> Tensor:
    """The same memory as bytes: every dtype is handed on alike, bit for bit."""
    return contiguous.reshape(-1).view(torch.uint8)
