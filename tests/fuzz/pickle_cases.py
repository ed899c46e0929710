"""Pickles in the weights: code, torch's own constructors, tensors that claim too much, and streams of opcodes."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections import Counter, OrderedDict
from typing import Any

import torch

from tests.fuzz.cases import category
from tests.fuzz.seeds import WEIGHTS, Seed, seeds, torch_file

GOOD = b"\x80\x02}q\x00."  # an empty state dict
# Shell and Python that leave a file behind in the current directory, should anything run them.
SHELL, PYTHON = "touch canary", "open('canary', 'w').close()"


class Call:
    """Pickles as a call of ``function`` with ``arguments``, as ``__reduce__`` lets any object do."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.result = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.result


class Storage:
    """Pickles as torch's reference to a storage, with whatever identity."""

    def __init__(self, *identity: Any) -> None:
        self.identity = identity


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the C one asks for persistent ids the same way
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, Storage) else None


def pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, 2).dump(value)
    return stream.getvalue()


def zip_of(data_pickle: bytes, records: dict[str, bytes] | None = None, prefix: str = "archive") -> bytes:
    """A file as ``torch.save`` lays it out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        target.writestr(f"{prefix}/data.pkl", data_pickle)
        target.writestr(f"{prefix}/byteorder", "little")
        for key, content in (records or {}).items():
            target.writestr(f"{prefix}/data/{key}", content)
        target.writestr(f"{prefix}/version", "3\n")
    return stream.getvalue()


def carrier(drawn: random.Random) -> Seed:
    """An archive whose configuration is in order, with the weights at the top or under ``mp_rank_00``."""
    return seeds()[drawn.choice(("clip", "clip", "clip_gzipped", "megatron", "megatron_rank"))]


def tensor_call(numel: int, offset: int, size: Any, stride: Any, **other: Any) -> Call:
    identity = (
        "storage",
        other.get("kind", torch.FloatStorage),
        other.get("key", "0"),
        other.get("place", "cpu"),
        numel,
    )
    return Call(
        other.get("rebuild", torch._utils._rebuild_tensor_v2),
        Storage(*identity),
        offset,
        size,
        stride,
        False,
        other.get("hooks", OrderedDict()),
    )


def _raw_global(module: str, name: str, arguments: bytes, call: bytes = b"R") -> bytes:
    return b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + call + b"."


def _code(drawn: random.Random) -> bytes:
    """A pickle that would run something."""
    command = b"X" + struct.pack("<I", len(SHELL)) + SHELL.encode()
    python = b"X" + struct.pack("<I", len(PYTHON)) + PYTHON.encode()
    raw = [
        _raw_global("os", "system", command + b"\x85"),
        _raw_global("posix", "system", command + b"\x85"),
        _raw_global("nt", "system", command + b"\x85"),
        _raw_global("builtins", "eval", python + b"\x85"),
        _raw_global("builtins", "exec", python + b"\x85"),
        _raw_global("__builtin__", "eval", python + b"\x85"),
        _raw_global("subprocess", "getoutput", command + b"\x85"),
        _raw_global("torch.serialization", "os.system", command + b"\x85"),
        _raw_global("torch", "os.system", command + b"\x85"),
        _raw_global("torch._utils", "_rebuild_tensor_v2.__globals__", b")"),
        _raw_global("torch.hub", "load", command + b"\x85"),
        _raw_global("torch", "load", command + b"\x85"),
        _raw_global("torch.utils.cpp_extension", "load", command + command + b"\x86"),
        _raw_global("torch.distributed.rpc.internal", "_run_function", command + b"\x85"),
        _raw_global("torch._inductor.codecache", "compile_file", command + b"\x85"),
        _raw_global("torch.jit.unsupported_tensor_ops", "execWrapper", python + b"}}\x87"),
        _raw_global("numpy.testing._private.utils", "runstring", python + b"}\x86"),
        _raw_global("importlib", "import_module", b"X\x06\0\0\0canary\x85"),
        _raw_global("functools", "partial", command + b"\x85"),
        _raw_global("operator", "methodcaller", command + b"\x85"),
        _raw_global("pickle", "loads", command + b"\x85"),
        _raw_global("runpy", "run_path", command + b"\x85"),
        _raw_global("collections", "OrderedDict.update", command + b"\x85"),
        _raw_global("nemo_aligner_diffusion.rewards.restore", "restore_reward", command + b"\x85"),
        _raw_global("os\nsystem", "x", command + b"\x85"),
        _raw_global("", "", b")"),
        b"\x80\x02(" + command + b"ios\nsystem\n.",  # INST
        b"\x80\x02(cos\nsystem\n" + command + b"o.",  # OBJ
        _raw_global("subprocess", "Popen", command + b"\x85", b"\x81"),  # NEWOBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93" + command + b"\x85R.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01)R.",  # EXT1
        b"(S'touch canary'\nios\nsystem\n.",  # protocol 0
        b"cos\nsystem\n(S'touch canary'\ntR.",
    ]
    if drawn.random() < 0.7:
        return drawn.choice(raw)
    payload = Call(drawn.choice((eval, exec)), PYTHON)
    holders: list[Any] = [
        {"a": payload},
        {"state_dict": {"a": torch.nn.Parameter, "b": payload}},
        [payload],
        {"layer._extra_state": payload},
        OrderedDict(a=payload),
        Storage(payload),
        Storage("storage", payload, "0", "cpu", 4),
        Storage("storage", torch.FloatStorage, payload, "cpu", 4),
        Call(OrderedDict, state={"__class__": payload}),
        tensor_call(4, 0, (4,), (1,), hooks=OrderedDict({0: payload})),
        Call(torch._utils._rebuild_parameter, payload, False, OrderedDict()),
        Call(payload.result[0], PYTHON, state=payload),
    ]
    return pickled(drawn.choice(holders))


@category("pickle", hostile=True, weight=60)
def pickles_that_execute(drawn: random.Random) -> bytes:
    """Code in ``data.pkl``, at the top and under ``mp_rank_00``; or in a bare pickle in the weights' place."""
    seed, code = carrier(drawn), _code(drawn)
    if drawn.random() < 0.2:
        return seed.with_content(WEIGHTS, code).pack()
    if drawn.random() < 0.2:  # in the old format: a magic number, a protocol, system information, then the object
        start = pickled(0x1950A86A20F9469CFC6C) + pickled(1001) + pickled({"little_endian": True})
        return seed.with_content(WEIGHTS, drawn.choice((start + code, code + start))).pack()
    return seed.with_content(WEIGHTS, zip_of(code, {"0": bytes(16)})).pack()


@category("pickle", hostile=True, weight=40)
def torch_constructors(drawn: random.Random) -> bytes:
    """Names that ``weights_only`` lets through, called so that they take memory or time, or set attributes."""
    n = drawn.choice((1 << 28, 1 << 31, 1 << 34, 1 << 40))
    storage = Storage("storage", torch.FloatStorage, "0", "cpu", 4)
    values: list[Any] = [
        Call(bytearray, n),
        Call(torch.FloatTensor, n),
        Call(torch.Tensor, n),
        Call(torch.Tensor, n >> 16, 1 << 16),
        Call(torch.nn.Parameter, Call(torch.Tensor, n)),
        Call(torch.storage.UntypedStorage, n),
        Call(torch.storage.TypedStorage, n),
        Call(torch.Size, (n,)),
        Call(torch.device, "cuda:9"),
        Call(set, "abc"),
        Call(complex, 1, 2),
        Call(Counter, "abc" * 100),
        Call(OrderedDict, [("a", 1)]),
        Call(OrderedDict, state={"items": 1, "__class__": 2}),
        Call(torch._utils._rebuild_tensor_v2, storage, 0, (n,), (0,), False, OrderedDict(), {"x": 1}),
        Call(
            torch._utils._rebuild_sparse_tensor,
            torch.sparse_coo,
            (tensor_call(4, 0, (1, 4), (4, 1)), tensor_call(4, 0, (4,), (1,)), (n,)),
        ),
        Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (n,), (1,), False),
        Call(
            torch._utils._rebuild_qtensor,
            storage,
            0,
            (n,),
            (0,),
            (torch.per_tensor_affine, 1.0, 0),
            False,
            OrderedDict(),
        ),
        Call(
            torch._utils._rebuild_wrapper_subclass,
            torch.Tensor,
            torch.float32,
            (n,),
            (1,),
            0,
            torch.strided,
            "cpu",
            False,
        ),
        Call(
            torch._tensor._rebuild_from_type_v2,
            torch._utils._rebuild_tensor_v2,
            torch.Tensor,
            (storage, 0, (4,), (1,), False, OrderedDict()),
            {"data": 1},
        ),
        Call(
            torch._utils._rebuild_parameter_with_state, tensor_call(4, 0, (4,), (1,)), False, OrderedDict(), {"grad": 1}
        ),
    ]
    value = drawn.choice(values)
    whole = drawn.choice(({"a": value}, {"state_dict": {"a": value}}, value, {"x._extra_state": value}))
    return carrier(drawn).with_content(WEIGHTS, zip_of(pickled(whole), {"0": bytes(16)})).pack()


@category("pickle", hostile=True, weight=40)
def tensors_that_claim_too_much(drawn: random.Random) -> bytes:
    """Sizes, strides and offsets that reach beyond the storage, overflow, or have the wrong type; storages likewise."""
    big = drawn.choice((5, 1 << 20, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 130))
    odd: Any = drawn.choice((-1, -big, big, None, 1.5, "4", True, (4,), [4], ()))
    kinds = [
        torch.FloatStorage,
        torch.HalfStorage,
        torch.BoolStorage,
        torch.ComplexDoubleStorage,
        torch.Tensor,
        OrderedDict,
        "x",
        None,
    ]
    value = drawn.choice(
        (
            tensor_call(big, 0, (4,), (1,)),
            tensor_call(4, big, (4,), (1,)),
            tensor_call(4, 0, (big,), (1,)),
            tensor_call(4, 0, (big,), (0,)),
            tensor_call(4, 0, (4,), (big,)),
            tensor_call(4, 0, (big, big), (0, 0)),
            tensor_call(4, 0, (2,) * 40, (0,) * 40),
            tensor_call(4, 0, (1,) * 5000, (1,) * 5000),
            tensor_call(odd, 0, (4,), (1,)) if odd != 4 else tensor_call(5, 0, (4,), (1,)),
            tensor_call(4, odd, (4,), (1,)),
            tensor_call(4, 0, (odd,), (1,)),
            tensor_call(4, 0, odd, (1,)),
            tensor_call(4, 0, (4,), odd),
            tensor_call(4, 0, (4,), (1, 1)),
            tensor_call(4, 0, (4,), (1,), kind=drawn.choice(kinds[1:])),
            tensor_call(
                4, 0, (4,), (1,), key=drawn.choice(("1", "../0", "", "0\0", "data.pkl", "../version", 0, None))
            ),
            tensor_call(4, 0, (4,), (1,), place=drawn.choice((None, 3, b"cpu"))),
            tensor_call(4, 0, (4,), (1,), hooks=drawn.choice((None, {}, [1], OrderedDict({0: 1})))),
            tensor_call(4, 0, (4,), (1,), rebuild=torch._utils._rebuild_tensor),
        )
    )
    whole = {f"t{number}": value for number in range(drawn.choice((1, 1, 2000)))}
    return carrier(drawn).with_content(WEIGHTS, zip_of(pickled(whole), {"0": bytes(16)})).pack()


@category("pickle", hostile=True, weight=4)
def one_storage_many_tensors(drawn: random.Random) -> bytes:
    """Every tensor is the same few bytes: small to store, large to hold once each is converted by itself."""
    block = bytes(2 * 4096)
    value = {
        f"t{number}": tensor_call(4096, 0, (64, 64), (64, 1), kind=torch.HalfStorage)
        for number in range(drawn.choice((100, 2000)))
    }
    return carrier(drawn).with_content(WEIGHTS, zip_of(pickled(value), {"0": block})).pack()


@category("pickle", hostile=True, weight=20)
def pickle_bombs(drawn: random.Random) -> bytes:
    """Small pickles that grow, or go on: doubling lists, deep nests, keys of one hash, long numbers, memo places."""
    n = drawn.choice((1000, 50_000, 200_000))
    key = (2**61 - 1).to_bytes(8, "little")
    texts = [
        b"\x80\x02]q\x00" + b"(h\x00h\x00h\x00e" * n + b".",
        b"\x80\x02" + b"]" * n + b"a" * (n - 1) + b".",
        b"\x80\x02" + b")" + b"\x85" * n + b".",
        b"\x80\x02" + b"(" * n + b"t" * n + b".",
        b"\x80\x02}("
        + b"".join(
            b"\x8a\x0c" + (int.from_bytes(key, "little") * i).to_bytes(12, "little") + b"N"
            for i in range(1, min(n, 50_000))
        )
        + b"u.",
        b"\x80\x02}("
        + b"".join(b"\x8a\xff" + bytes(250) + struct.pack("<I", i) + b"\x01N" for i in range(min(n, 3000)))
        + b"u.",
        b"\x80\x02" + b"N" * (5 * n) + b".",
        b"\x80\x02](" + b"N" * (5 * n) + b"e.",
        b"\x80\x02}r\xff\xff\xff\x7f.N",
        b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", i * 7919) for i in range(n)) + b".N",
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02c" + b"x" * n + b"\n.",
        b"\x80\x02ccollections\nOrderedDict\n" + b")R" * 1 + b"}X\x09\0\0\0_metadata}sb" * n + b".N",
        b"\x80\x02" + b"ccollections\nOrderedDict\n)R0" * n + b"}.",
        b"\x80\x02c_codecs\nencode\nX" + struct.pack("<I", n) + b"\xc3\xa9" * (n // 2) + b"X\x04\0\0\0idna\x86R.",
        GOOD[:-1] + b"X" + struct.pack("<I", n) + b"k" * n + b"Ns.",
        b"\x80\x02" + b"X\x01\0\0\0a" * n + b".",
        b"\x80\x02cbuiltins\nset\n](" + b"K\x01" * n + b"e\x85R.",
    ]
    records = {str(number): b"" for number in range(drawn.choice((0, 0, 500)))}
    return carrier(drawn).with_content(WEIGHTS, zip_of(drawn.choice(texts), records)).pack()


@category("pickle", hostile=False, weight=60)
def opcode_streams(drawn: random.Random) -> bytes:
    """The real pickle with bytes changed, cut or repeated, in a zip whose checksums are right; or random opcodes."""
    seed = carrier(drawn)
    with zipfile.ZipFile(io.BytesIO(seed.content(WEIGHTS))) as source:
        records = {name: source.read(name) for name in source.namelist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    content = bytearray(records[name])
    opcodes = b"\x80N\x88\x89JKM\x8aGX(})]t\x85\x86\x87aesuqrhjcQRb.02i\x81\x93o\x82IVS\x8c\x94\x95"
    way = drawn.randrange(4)
    if way == 0:
        for _ in range(drawn.choice((1, 1, 3, 30))):
            content[drawn.randrange(len(content))] = drawn.choice((drawn.randrange(256), drawn.choice(opcodes)))
    elif way == 1:
        at = drawn.randrange(len(content))
        content[at : at + drawn.choice((1, 10, 100))] = b""
    elif way == 2:
        at, size = drawn.randrange(len(content)), drawn.choice((1, 10, 500))
        content[at:at] = content[at : at + size]
    else:
        content = bytearray(
            b"\x80\x02" + bytes(drawn.choice(opcodes) for _ in range(drawn.choice((5, 50, 500)))) + b"."
        )
    records[name] = bytes(content)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for record, data in records.items():
            target.writestr(record, data)
    return seed.with_content(WEIGHTS, stream.getvalue()).pack()


@category("pickle", hostile=True, weight=20)
def other_objects(drawn: random.Random) -> bytes:
    """What ``torch.save`` may well hold, but no state dict does."""
    values: list[Any] = [
        [1, 2],
        3,
        "text",
        None,
        torch.zeros(3),
        {"a": 3},
        {"a": None},
        {1: torch.zeros(1)},
        {(1, 2): torch.zeros(1)},
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": torch.zeros(1).expand(10**9)},
        {"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.quint8)},
        {"a": torch.zeros(2, device="meta")},
        {"state_dict": {"state_dict": {}}},
        {"state_dict": [torch.zeros(1)]},
        {"a": torch.nn.Linear(1, 1)},
        {"optimizer": {"state": {0: torch.zeros(1)}}},
        {"a": {"b": torch.zeros(1)}},
        {},
        {"a": torch.zeros(2, dtype=torch.complex64)},
    ]
    return carrier(drawn).with_content(WEIGHTS, torch_file(drawn.choice(values))).pack()
