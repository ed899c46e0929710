"""The pickle inside a ``torch.save`` file, read by an interpreter that can make tensors and containers, nothing else.

``torch.load(weights_only=True)`` keeps code from running, but not memory from being taken: it calls ``bytearray(n)``,
``torch.FloatTensor(n)`` and others with whatever ``n`` the file gives, builds tensors that claim more elements than
are stored, and its zip reader looks names up without regard to case, so that it may read another record than was
checked. So this is the one reader of such files: the two dozen opcodes that ``torch.save`` emits (protocol 2), every
storage compared with the size of its record and every tensor with its storage. Opcodes: Python's ``pickletools``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_aligner_diffusion.errors import printable

MOST_DIMENSIONS = 16
MOST_DIGITS_OF_A_NUMBER = 16  # bytes of a LONG1; sizes have 8
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


class ForbiddenGlobalError(ValueError):
    """The pickle names a function or class that no state dict needs; ``args[0]`` is its dotted name."""


class NotDenseError(ValueError):
    """A tensor is sparse, quantised, or claims more elements than are stored; ``args[0]`` says which."""


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
        ForbiddenGlobalError: it asks for something to be called that no state dict needs.
        NotDenseError: a tensor is no plain block of numbers.
        ValueError: it is malformed, or no pickle of tensors and plain containers.
    """
    return _Interpreter(pickle, record_bytes, read).run()


class _Interpreter:
    def __init__(self, pickle: bytes, record_bytes: Mapping[str, int], read: Callable[[str], Tensor]) -> None:
        self._pickle, self._position = pickle, 0
        self._record_bytes, self._read = record_bytes, read
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._stored: dict[str, Tensor] = {}
        self._tensor_bytes = 0

    def run(self) -> dict[Any, Any]:
        operations = {code: getattr(self, f"_{name}") for code, name in _OPERATIONS.items()}
        try:
            while (code := self._byte()) != ord("."):
                operation: Callable[[], None] | None = operations.get(code)
                if operation is None:
                    raise ValueError(f"the pickle has the opcode {bytes([code])!r}, which torch.save never writes")
                operation()
        except IndexError:
            if self._position >= len(self._pickle):
                raise ValueError("the pickle ends in the middle") from None
            raise ValueError("the pickle takes more from its stack than it has put there") from None
        except KeyError:
            raise ValueError("the pickle recalls something that it has not stored") from None
        except struct.error:
            raise ValueError("the pickle ends in the middle") from None
        if len(self._stack) != 1 or self._marks or self._position != len(self._pickle):
            raise ValueError("the pickle holds more than one object")
        if not isinstance(self._stack[0], dict):  # before anybody looks into it
            raise ValueError(f"the pickle holds a {type(self._stack[0]).__name__.strip('_')}, not a state dict")
        if self._tensor_bytes > MOST_SHARING * sum(content.nbytes for content in self._stored.values()):
            raise NotDenseError(f"its tensors would take {self._tensor_bytes} bytes, far more than are stored")
        result: dict[Any, Any] = self._stack[0]
        return result

    # Reading

    def _take(self, count: int) -> bytes:
        taken = self._pickle[self._position : self._position + count]
        if len(taken) != count:
            raise ValueError("the pickle ends in the middle")
        self._position += count
        return taken

    def _byte(self) -> int:
        value = self._pickle[self._position]  # once an opcode: no slice, no further call
        self._position += 1
        return value

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        end = self._pickle.find(b"\n", self._position, self._position + 1024)
        if end < 0:
            raise ValueError("the pickle has a name of more than 1024 characters")
        return self._take(end + 1 - self._position)[:-1].decode("utf-8", "replace")

    def _from_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    # Plain values

    def _proto(self) -> None:
        if (version := self._byte()) != 2:
            raise ValueError(f"the pickle has protocol {version}; torch.save writes 2")

    def _none(self) -> None:
        self._stack.append(None)

    def _true(self) -> None:
        self._stack.append(True)

    def _false(self) -> None:
        self._stack.append(False)

    def _int4(self) -> None:
        self._stack.append(self._number("<i"))

    def _int1(self) -> None:
        self._stack.append(self._byte())

    def _int2(self) -> None:
        self._stack.append(self._number("<H"))

    def _long1(self) -> None:
        if (count := self._byte()) > MOST_DIGITS_OF_A_NUMBER:
            raise ValueError(f"the pickle has a number of {count} bytes")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _float(self) -> None:
        self._stack.append(self._number(">d"))

    def _unicode(self) -> None:
        self._stack.append(self._take(self._number("<I")).decode("utf-8", "surrogatepass"))

    # Containers

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _empty_dict(self) -> None:
        self._stack.append({})

    def _empty_list(self) -> None:
        self._stack.append([])

    def _empty_tuple(self) -> None:
        self._stack.append(())

    def _tuple(self) -> None:
        items = tuple(self._from_mark())
        self._stack.append(items)

    def _tuple1(self) -> None:
        self._stack[-1:] = [(self._stack[-1],)]

    def _tuple2(self) -> None:
        self._stack[-2:] = [(self._stack[-2], self._stack[-1])]

    def _tuple3(self) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _append(self) -> None:
        item = self._stack.pop()
        self._expect(list).append(item)

    def _appends(self) -> None:
        items = self._from_mark()
        self._expect(list).extend(items)

    def _setitem(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set(self._expect(dict), key, value)

    def _setitems(self) -> None:
        items = self._from_mark()
        if len(items) % 2:
            raise ValueError("the pickle has a key without a value")
        target = self._expect(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(target, key, value)

    def _set(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        # Large numbers can be chosen to share one hash, which makes a dictionary of them take for ever.
        if not isinstance(key, str) and not (type(key) is int and abs(key) < 2**31):
            raise ValueError(f"the pickle has a dictionary with a {type(key).__name__} for a key")
        target[key] = value

    def _expect(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"the pickle fills a {type(self._stack[-1]).__name__} as if it were a {kind.__name__}")
        return self._stack[-1]

    # Memo

    def _put1(self) -> None:
        self._memo[self._byte()] = self._stack[-1]

    def _put4(self) -> None:
        self._memo[self._number("<I")] = self._stack[-1]

    def _get1(self) -> None:
        self._stack.append(self._memo[self._byte()])

    def _get4(self) -> None:
        self._stack.append(self._memo[self._number("<I")])

    # Tensors

    def _global(self) -> None:
        name = f"{self._line()}.{self._line()}"
        if name.startswith(("torch._utils._rebuild_sparse", "torch._utils._rebuild_q", "torch._utils._rebuild_meta")):
            raise NotDenseError(f"it holds a tensor made by {printable(name, 80)}")
        if name not in _ALLOWED:
            raise ForbiddenGlobalError(name)
        self._stack.append(_Global(name))

    def _persistent(self) -> None:
        identity = self._stack.pop()
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
                f"the pickle gives storage '{printable(key, 80)}' {elements} elements of {size} bytes; "
                f"its record has {self._record_bytes[key]} bytes"
            )
        if key not in self._stored:
            self._stored[key] = self._read(key)
        self._stack.append(_Storage(self._stored[key], dtype))

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("the pickle calls something that is no function")
        if function.name == _ORDERED and arguments == ():
            self._stack.append(_Ordered())
        elif function.name == _TENSOR and len(arguments) == 6:
            self._stack.append(self._tensor(*arguments))
        elif function.name == _PARAMETER and [type(a) for a in arguments] == [Tensor, bool, _Ordered]:
            if arguments[2]:
                raise ValueError("the pickle holds a parameter with hooks")
            self._stack.append(arguments[0])
        else:
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
            raise NotDenseError(f"it holds a tensor of shape {size} in a storage of {stored} elements")
        if elements and last >= stored:
            raise ValueError(f"the pickle holds a tensor that reaches to element {last} of {stored}")
        self._tensor_bytes += elements * storage.dtype.itemsize
        if not elements:  # whatever its offset
            return torch.empty(size, dtype=storage.dtype)
        return torch.empty(0, dtype=storage.dtype).set_(storage.content.untyped_storage(), offset, size, stride)

    def _build(self) -> None:
        state = self._stack.pop()
        # torch.nn.Module.state_dict() hangs the modules' versions on its result, and nothing else.
        if not isinstance(self._stack[-1], _Ordered) or not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise ValueError("the pickle sets attributes that torch.save never does")


# From the opcode to the method's name.
_OPERATIONS = {
    code[0]: name
    for code, name in {
        b"\x80": "proto",
        b"N": "none",
        b"\x88": "true",
        b"\x89": "false",
        b"J": "int4",
        b"K": "int1",
        b"M": "int2",
        b"\x8a": "long1",
        b"G": "float",
        b"X": "unicode",
        b"(": "mark",
        b"}": "empty_dict",
        b"]": "empty_list",
        b")": "empty_tuple",
        b"t": "tuple",
        b"\x85": "tuple1",
        b"\x86": "tuple2",
        b"\x87": "tuple3",
        b"a": "append",
        b"e": "appends",
        b"s": "setitem",
        b"u": "setitems",
        b"q": "put1",
        b"r": "put4",
        b"h": "get1",
        b"j": "get4",
        b"c": "global",
        b"Q": "persistent",
        b"R": "reduce",
        b"b": "build",
    }.items()
}
