"""A run's state from the processes that hold it to one folder, and back under any layout.

Whole tensors are put together from their pieces (:mod:`nemo_aligner_diffusion.parallel.placements`), each for one
process that writes it. Every process maps the files and copies its own piece of each tensor for the layout that reads.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO
from safetensors import safe_open
from torch import Tensor, nn

from nemo_aligner_diffusion.errors import CheckpointError, OutputError, first_line
from nemo_aligner_diffusion.parallel.broadcast import gather, on_every_process, own_group, rank_and_size
from nemo_aligner_diffusion.parallel.placements import Placement, is_sharded, placements
from nemo_aligner_diffusion.runtime.files import write_atomic
from nemo_aligner_diffusion.training.checkpoints.files import (
    FORMAT,
    STATE,
    Record,
    hidden_name,
    publish,
    read_state,
    record_of,
    remove,
    table_of,
    write_manifest,
    write_tensors,
)
from nemo_aligner_diffusion.training.checkpoints.tree import Leaf, put_together, take_apart

log = logging.getLogger(__name__)

BYTES_A_WRITER = 32 * 2**20  # below this a further file costs more than it saves


class FolderCheckpointIO(CheckpointIO):
    """Lightning's plugin; every process calls both methods, at the same moments and with equal trees.

    Args:
        module: whose parameters tell what is laid out how.
        async_save: return from a save as soon as everything is copied to host memory, and write in the background.
        bytes_a_writer: a process writes at least so many bytes before a further one takes part.
    """

    def __init__(self, module: nn.Module, async_save: bool = False, bytes_a_writer: int = BYTES_A_WRITER) -> None:
        self.module = module
        self.async_save = async_save
        self.bytes_a_writer = bytes_a_writer
        self.rank, self.size = rank_and_size()
        self.group = own_group()  # so that a save in the background never meets the training's messages
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a save was begun whose outcome has not been looked at; equal on all processes."""
        return self._thread is not None

    @property
    def is_written(self) -> bool:
        """Whether this process's part of it is over, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Until the save in the background is complete.

        Args:
            seconds: at most so long; a save that takes longer is left behind.

        Raises:
            OutputError: it failed, on this or another process.
        """
        if self._thread is None:
            return
        self._thread.join(seconds)
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` as the folder ``path``.

        Raises:
            OutputError: the disk is full or not writable; nothing of this checkpoint remains, earlier ones are whole.
            CheckpointError: the state holds what no checkpoint can.
        """
        self.wait()
        path = Path(path)
        held = dict(self.module.named_parameters(remove_duplicate=False))
        layout = placements(self.module)
        in_pieces = {name for name in held if layout[name].cut is not None or is_sharded(held[name])}
        tree, leaves = take_apart(checkpoint, held, in_pieces)
        mine = dict(self._whole_tensors(leaves, held, layout))
        if not self.async_save:
            self._write(path, tree, mine)
            return
        self._thread = threading.Thread(
            target=self._write_behind, args=(path, tree, mine), name=f"saving {path.name}", daemon=True
        )
        self._thread.start()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """What was saved, with this process's piece of every tensor.

        Raises:
            CheckpointError: it cannot be read; every process raises it.
        """

        def read() -> dict[str, Any]:
            try:
                return self._read(Path(path))
            except Exception as error:  # whatever disks and damage make of files, JSON and headers
                raise CheckpointError(f"the checkpoint {path} cannot be read{self._by}: {first_line(error)}") from error

        return on_every_process(read, self.group)

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))

    def _whole_tensors(
        self, leaves: Mapping[str, Leaf], held: Mapping[str, Tensor], layout: Mapping[str, Placement]
    ) -> Iterator[tuple[str, Tensor]]:
        """Copies of those that this process writes, on the CPU; every process helps to put each together."""
        sizes = {name: value.numel() * value.element_size() for name, (value, _) in leaves.items()}
        writers = share_out(sizes, self.size, self.bytes_a_writer)
        for name, (part, like) in leaves.items():
            value = part.detach()
            if like is not None:
                parameter = held[like]
                if not is_sharded(value) and value.device != parameter.device and layout[like].cut is not None:
                    value = value.to(parameter.device)  # averages kept in host memory: pieces meet where messages do
                value = layout[like].full(value)
            if writers[name] == self.rank:
                yield name, value.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def _write(self, path: Path, tree: Any, mine: dict[str, Tensor]) -> None:
        started = time.perf_counter()
        temporary = hidden_name(path)

        def prepare() -> None:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
                temporary.mkdir(parents=True)

        def write_share() -> tuple[dict[str, Any], dict[str, Record]]:
            file = temporary / f"tensors-{self.rank:05d}.safetensors"
            if not mine:
                return {}, {}
            record = write_tensors(file, mine)
            return table_of(file), {file.name: record}

        def finish() -> None:
            if self.rank == 0:
                tensors = {name: entry for entries, _ in shares for name, entry in entries.items()}
                records = {name: record for _, files in shares for name, record in files.items()}
                state = {"format": FORMAT, "tree": tree, "tensors": dict(sorted(tensors.items()))}
                write_atomic(temporary / STATE, json.dumps(state) + "\n")
                write_manifest(temporary, {**records, STATE: record_of(temporary / STATE)})
                publish(temporary, path)

        try:
            self._together(path, prepare)
            shares = gather(self._together(path, write_share), self.group)
            self._together(path, finish)
        except OutputError:
            if self.rank == 0:  # all processes are through with it
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.rank == 0:
            log.info("saved %s in %.1f s", path, time.perf_counter() - started)

    def _write_behind(self, path: Path, tree: Any, mine: dict[str, Tensor]) -> None:
        try:
            self._write(path, tree, mine)
        except BaseException as error:  # whoever waits raises it
            self._failure = error

    def _together(self, path: Path, work: Callable[[], Any]) -> Any:
        """What ``work`` gives here, once it has ended on all processes; a failure on one is raised on all."""

        def told() -> Any:
            try:
                return work()
            except Exception as error:
                raise OutputError(
                    f"the checkpoint {path} could not be written{self._by}: {first_line(error)}. Is the disk full? "
                    "Earlier checkpoints are intact; make room and continue with exp_manager.resume_if_exists=True."
                ) from error

        return on_every_process(told, self.group)

    def _read(self, path: Path) -> dict[str, Any]:
        held = dict(self.module.named_parameters(remove_duplicate=False))
        layout = placements(self.module)
        state = read_state(path)
        with contextlib.ExitStack() as files:
            opened = cache(lambda name: files.enter_context(safe_open(path / name, framework="pt")))

            def tensor(name: str, like: str | None) -> Tensor:
                whole: Tensor = opened(state["tensors"][name]["file"]).get_tensor(name)  # mapped from the file
                return whole.clone() if like not in held else _piece(whole, held[like], layout[like])

            tree: dict[str, Any] = put_together(state["tree"], tensor)
        return tree

    @property
    def _by(self) -> str:
        return f" by process {self.rank} of {self.size}" if self.size > 1 else ""


def share_out(sizes: Mapping[str, int], processes: int, least: int) -> dict[str, int]:
    """Which process sees to which tensor: about equally many bytes each, the same answer everywhere.

    Args:
        sizes: bytes by name.
        processes: how many there are; those that take part are spread evenly over them, so over nodes too.
        least: bytes that a process should have before a further one takes part.
    """
    taking_part = max(1, min(processes, sum(sizes.values()) // max(least, 1)))
    loads = [(0, number * processes // taking_part) for number in range(taking_part)]
    result: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = heapq.heappop(loads)
        result[name] = rank
        heapq.heappush(loads, (load + sizes[name], rank))
    return result


def _piece(whole: Tensor, parameter: Tensor, placement: Placement) -> Tensor:
    # an average may be more precise than the parameter: its layout counts, not its dtype
    like = parameter.detach()
    if like.dtype != whole.dtype:
        like = torch.empty_like(like, dtype=whole.dtype)
    if placement.cut is None and not is_sharded(like):
        if whole.shape != like.shape:
            raise CheckpointError(f"a tensor of shape {tuple(whole.shape)} does not fit one of {tuple(like.shape)}")
        return torch.empty_like(like, device="cpu").copy_(whole)  # in the parameter's memory format
    return placement.local(whole, like)
