"""Process groups of any size in one process, in which nothing is sent: to count what a layout would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nemo_aligner_diffusion.parallel.layout import Layout


@contextmanager
def simulated_mesh(layout: Layout) -> Iterator[Any]:
    """The device mesh that rank 0 of ``layout`` would have, on PyTorch's ``fake`` backend; gone on leaving.

    Collectives on it return at once with whatever their outputs held. One process has one default group, so this is
    not for a process that trains.

    Raises:
        RuntimeError: this process is in a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("a layout cannot be simulated in a process that is in a process group already")
    dist.init_process_group("fake", rank=0, world_size=layout.world_size)
    try:
        yield init_device_mesh("cpu", (layout.data, layout.tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))
    finally:
        dist.destroy_process_group()


def group_names(mesh: Any) -> dict[str, str]:
    """Process group of a layout's mesh, by its name for PyTorch -> ``data`` or ``tensor``."""
    return {mesh[f"{name}_parallel"].get_group().group_name: name for name in ("data", "tensor")}


def group_of(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Name of the process group that a collective operator is called with.

    Args:
        operator: as a dispatch mode sees it: c10d's own, which take the group in a box (FSDP2's and ``all_reduce``'s
            with torch 2.13), or a functional one, which takes its name.
    """
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
    if "process_group" in given:
        return str(dist.ProcessGroup.unbox(given["process_group"]).group_name)
    return str(given["group_name"])
