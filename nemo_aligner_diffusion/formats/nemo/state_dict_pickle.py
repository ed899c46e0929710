"""The pickle inside a ``torch.save`` file, read by an interpreter that can make tensors and containers, nothing else.

``torch.load(weights_only=True)`` keeps code from running, but not memory from being taken: it calls ``bytearray(n)``,
``torch.FloatTensor(n)`` and others with whatever ``n`` the file gives, builds tensors that claim more elements than
are stored, and its zip reader looks names up without regard to case, so that it may read another record than was
checked. So this is the one reader of such files: Python's ``pickletools`` takes the pickle apart, and of its opcodes
those that ``torch.save`` emits (protocol 2) are followed, every storage compared with the size of its record and every
tensor with its storage.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import printable

MOST_DIMENSIONS = 16
# Tied weights store a tensor once under several names. All tensors together may have this many times the stored bytes,
# because each becomes one of its own when it is converted to another precision.
MOST_SHARING = 4

_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_ORDERED = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = {*_STORAGES, _ORDERED, _TENSOR, _PARAMETER}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    content: Tensor  # bytes
    dtype: torch.dtype


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict."""


def read_state_dict(pickle: bytes, record_bytes: Mapping[str, int], read: Callable[[str], Tensor]) -> dict[Any, Any]:
    """The dictionary that ``pickle`` says, with its tensors on the CPU.

    Args:
        record_bytes: the keys of storages (``data/<key>`` in the zip) and their sizes.
        read: the bytes of a storage, ``(n,)`` uint8, by its key.

    Raises:
        ValueError: it is malformed, asks for a call that no state dict needs, or has a tensor that is no plain block of
            stored numbers.
    """
    return _Interpreter(record_bytes, read).run(pickle)


class _Interpreter:
    def __init__(self, record_bytes: Mapping[str, int], read: Callable[[str], Tensor]) -> None:
        self._record_bytes, self._read = record_bytes, read
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._stored: dict[str, Tensor] = {}
        self._tensor_bytes = 0

    def run(self, pickle: bytes) -> dict[Any, Any]:
        most = 100 + len(pickle) // 2  # torch.save's take 2.6 bytes and more, for they hold names
        stop = -1
        try:
            for count, (operation, argument, position) in enumerate(pickletools.genops(pickle)):
                if count > most:
                    raise ValueError(f"the pickle of {len(pickle)} bytes has more than {most} operations")
                self._follow(operation.name, argument)
                stop = position or 0
        except (IndexError, KeyError):
            raise ValueError("the pickle takes or recalls something that it has not put there") from None
        if len(self._stack) != 1 or self._marks or stop != len(pickle) - 1:
            raise ValueError("the pickle holds more than one object")
        result = self._stack[0]
        if not isinstance(result, dict):  # before anybody looks into it
            raise ValueError(f"the pickle holds a {type(result).__name__.strip('_')}, not a state dict")
        if self._tensor_bytes > MOST_SHARING * sum(content.nbytes for content in self._stored.values()):
            raise ValueError(f"its tensors would take {self._tensor_bytes} bytes, far more than are stored")
        return result

    def _follow(self, name: str, argument: Any) -> None:
        """One operation; ``argument`` is what stands behind it in the pickle."""
        stack = self._stack
        match name:
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANTS[name])
            case "MARK":
                self._marks.append(stack)
                self._stack = []
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                items = self._from_mark()
                self._stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                reverse = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(reverse)))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self._from_mark()
                self._last(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._from_mark()
                self._fill(self._last(dict), items)
            case "GLOBAL":
                self._global(argument.replace(" ", "."))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "BUILD":
                state = stack.pop()
                # torch.nn.Module.state_dict() hangs the modules' versions on its result, and nothing else.
                if not isinstance(stack[-1], _Ordered) or not isinstance(state, dict) or set(state) - {"_metadata"}:
                    raise ValueError("the pickle sets attributes that torch.save never does")
            case "PROTO":
                if argument != 2:
                    raise ValueError(f"the pickle has protocol {argument}; torch.save writes 2")
            case "STOP":
                pass
            case _:
                raise ValueError(f"the pickle has the operation {name}, which torch.save never writes")

    def _from_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _last(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"the pickle fills a {type(self._stack[-1]).__name__} as if it were a {kind.__name__}")
        return self._stack[-1]

    def _fill(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("the pickle has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Large numbers can be chosen to share one hash, which makes a dictionary of them take for ever.
            if not isinstance(key, str) and not (type(key) is int and abs(key) < 2**31):
                raise ValueError(f"the pickle has a dictionary with a {type(key).__name__} for a key")
            target[key] = value

    def _global(self, name: str) -> None:
        if name.startswith(("torch._utils._rebuild_sparse", "torch._utils._rebuild_q", "torch._utils._rebuild_meta")):
            raise ValueError(
                f"it holds a tensor that is not dense, made by {printable(name, 80)}; save it with .to_dense()"
            )
        if name not in _ALLOWED:
            raise ValueError(f"the pickle asks for {printable(name)!r}: code, not only tensors; none was run")
        self._stack.append(_Global(name))

    def _storage(self, identity: Any) -> _Storage:
        kinds = [type(part) for part in identity] if isinstance(identity, tuple) else []
        if kinds != [str, _Global, str, str, int] or identity[0] != "storage" or identity[1].name not in _STORAGES:
            raise ValueError("the pickle refers to something that is no storage of numbers")
        _, storage, key, _, elements = identity
        dtype = _STORAGES[storage.name]
        size = dtype.itemsize
        if key not in self._record_bytes:
            raise ValueError(f"the pickle refers to the storage '{printable(key, 80)}', which is not there")
        if elements < 0 or elements * size != self._record_bytes[key]:
            raise ValueError(
                f"the pickle gives storage '{printable(key, 80)}' {printable(elements, 40)} elements of {size} bytes; "
                f"its record has {self._record_bytes[key]} bytes"
            )
        if key not in self._stored:
            self._stored[key] = self._read(key)
        return _Storage(self._stored[key], dtype)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("the pickle calls something that is no function")
        if function.name == _ORDERED and arguments == ():
            return _Ordered()
        if function.name == _TENSOR and len(arguments) == 6:
            return self._tensor(*arguments)
        if function.name == _PARAMETER and [type(a) for a in arguments] == [Tensor, bool, _Ordered]:
            if arguments[2]:
                raise ValueError("the pickle holds a parameter with hooks")
            return arguments[0]
        raise ValueError(f"the pickle calls {function.name} in a way that torch.save never does")

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, gradient: Any, hooks: Any) -> Tensor:
        numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
        well_formed = isinstance(storage, _Storage) and isinstance(gradient, bool) and isinstance(hooks, _Ordered)
        if not well_formed or hooks or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("the pickle holds a tensor whose description is malformed")
        if len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
            raise ValueError(f"the pickle holds a tensor of {len(size)} dimensions and {len(stride)} strides")
        elements = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        # An expanded tensor (stride 0) claims more elements than are stored: copying it could fill the memory.
        stored = storage.content.nbytes // storage.dtype.itemsize
        if elements > stored:
            raise ValueError(
                f"it holds a tensor that is not dense, of shape {size} in {stored} elements; save it with .contiguous()"
            )
        if elements and last >= stored:
            raise ValueError(f"the pickle holds a tensor that reaches to element {last} of {stored}")
        self._tensor_bytes += elements * storage.dtype.itemsize
        if not elements:  # whatever its offset
            return torch.empty(size, dtype=storage.dtype)
        return torch.empty(0, dtype=storage.dtype).set_(storage.content.untyped_storage(), offset, size, stride)
