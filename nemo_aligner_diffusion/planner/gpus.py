"""What the GPUs can do, from their makers' data sheets (``docs/planner.md``). No torch here: ``--help`` lists them.

All rates are for dense arithmetic (no 2:4 sparsity) with float32 accumulation. Bytes are decimal, as data sheets count
them. Links count one direction: NVLink's published figures add both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest


@dataclass(frozen=True)
class GPU:
    """One GPU as it sits in its usual eight-GPU server.

    Attributes:
        name: as printed.
        flops: peak floating-point operations a second by arithmetic: ``bf16`` (float16 too), ``tf32``, ``fp32``
            (without tensor cores), ``fp64`` (with tensor cores where the GPU has them for it).
        memory_bytes: device memory.
        bandwidth: of device memory, bytes/s.
        link: to the other GPUs of the server, bytes/s, one direction.
        network: to other servers, bytes/s for each GPU, one direction.
        reserved: bytes of the memory that are no tensors': CUDA context, libraries' workspaces, NCCL's buffers.
        is_cpu: this machine's processors, and its memory.
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    bandwidth: float
    link: float
    network: float
    reserved: float = 2e9
    is_cpu: bool = False


def _gpu(name: str, tera: tuple[float, float, float, float], giga: tuple[float, float, float, float]) -> GPU:
    flops = {kind: rate * 1e12 for kind, rate in zip(("bf16", "tf32", "fp32", "fp64"), tera, strict=True)}
    memory, bandwidth, link, network = (number * 1e9 for number in giga)
    return GPU(name, flops, memory, bandwidth, link, network)


GPUS: dict[str, GPU] = {
    #                                    bf16   tf32   fp32  fp64   GB   GB/s  link net
    "a100-40gb": _gpu("A100 SXM 40 GB", (312, 156, 19.5, 19.5), (40, 1555, 300, 25)),
    "a100-80gb": _gpu("A100 SXM 80 GB", (312, 156, 19.5, 19.5), (80, 2039, 300, 25)),
    "h100-80gb": _gpu("H100 SXM 80 GB", (989.4, 494.7, 66.9, 66.9), (80, 3350, 450, 50)),
    "h200": _gpu("H200 SXM 141 GB", (989.4, 494.7, 66.9, 66.9), (141, 4800, 450, 50)),
    "b200": _gpu("B200 180 GB", (2250, 1100, 75, 37), (180, 8000, 900, 50)),
    "l40s": _gpu("L40S 48 GB", (362, 183, 91.6, 1.4), (48, 864, 32, 12.5)),
    "rtx4090": _gpu("RTX 4090 24 GB", (165.2, 82.6, 82.6, 1.3), (24, 1008, 16, 1.25)),
}


def gpu_named(name: str) -> GPU:
    """Raises:
    ConfigurationError: no such GPU; the message lists those there are.
    """
    key = name.lower()
    if key not in GPUS:
        longer = [known for known in GPUS if known.startswith(key)]
        hint = f"; did you mean {longer[0]}?" if longer else closest(key, GPUS, least=0.4)
        raise ConfigurationError(f"--gpu {name!r}: no such GPU{hint}; there are {', '.join(GPUS)}, cpu")
    return GPUS[key]
