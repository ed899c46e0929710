"""What the GPUs can do, from their makers' data sheets. No torch here: ``--help`` lists them.

All rates are for dense arithmetic (no 2:4 sparsity) with float32 accumulation. Bytes are decimal, as data sheets count
them; ``docs/planner.md`` names the sheets. Links count one direction: NVLink's published figures add both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.keys import closest

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class GPU:
    """One GPU as it sits in its usual eight-GPU server.

    Attributes:
        name: as printed.
        flops: peak floating-point operations a second by arithmetic: ``bf16`` (float16 too), ``tf32``, ``fp32``
            (without tensor cores), ``fp8`` (0: none), ``fp64`` (with tensor cores where the GPU has them for it).
        memory_bytes: device memory.
        bandwidth: of device memory, bytes/s.
        link: to the other GPUs of the server, bytes/s, one direction.
        network: to other servers, bytes/s for each GPU, one direction.
        source: where the figures come from.
    """

    name: str
    flops: Mapping[str, float]
    memory_bytes: float
    bandwidth: float
    link: float
    network: float
    source: str


def _gpu(
    name: str, bf16: float, tf32: float, fp32: float, fp8: float, fp64: float, memory: float, bandwidth: float,
    link: float, network: float, source: str,
) -> GPU:  # fmt: skip
    flops = {"bf16": bf16, "tf32": tf32, "fp32": fp32, "fp8": fp8, "fp64": fp64}
    return GPU(
        name,
        {kind: rate * TERA for kind, rate in flops.items()},
        memory * GIGA,
        bandwidth * GIGA,
        link * GIGA,
        network * GIGA,
        source,
    )


GPUS: dict[str, GPU] = {
    #                                   bf16   tf32  fp32   fp8    fp64  GB  GB/s  link net
    "a100-40gb": _gpu("A100 SXM 40 GB", 312, 156, 19.5, 0, 19.5, 40, 1555, 300, 25, "A100 sheet; DGX A100"),
    "a100-80gb": _gpu("A100 SXM 80 GB", 312, 156, 19.5, 0, 19.5, 80, 2039, 300, 25, "A100 sheet; DGX A100"),
    "h100-80gb": _gpu("H100 SXM 80 GB", 989.4, 494.7, 66.9, 1978.9, 66.9, 80, 3350, 450, 50, "H100 sheet; DGX H100"),
    "h200": _gpu("H200 SXM 141 GB", 989.4, 494.7, 66.9, 1978.9, 66.9, 141, 4800, 450, 50, "H200 sheet; DGX H200"),
    "b200": _gpu("B200 180 GB", 2250, 1100, 75, 4500, 37, 180, 8000, 900, 50, "DGX B200 data sheet, per GPU"),
    "l40s": _gpu("L40S 48 GB", 362, 183, 91.6, 733, 1.4, 48, 864, 32, 12.5, "L40S data sheet; PCIe 4, no NVLink"),
    "rtx4090": _gpu("RTX 4090 24 GB", 165.2, 82.6, 82.6, 330.3, 1.3, 24, 1008, 16, 1.25,
                    "Ada GPU architecture paper; PCIe 4 without peer-to-peer, 10 Gb/s network"),
}  # fmt: skip


def gpu_named(name: str) -> GPU:
    """Raises:
    ConfigurationError: no such GPU; the message lists those there are.
    """
    key = name.lower()
    if key not in GPUS:
        longer = [known for known in GPUS if known.startswith(key)]
        hint = f"; did you mean {longer[0]}?" if longer else closest(key, GPUS, least=0.4)
        raise ConfigurationError(f"--gpu {name!r}: no such GPU{hint}; there are {', '.join(GPUS)}")
    return GPUS[key]
