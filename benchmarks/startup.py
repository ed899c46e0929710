"""Host memory and file traffic of loading a model in the processes of one machine: once per node, or each for itself.

A random Stable Diffusion model of 550 MB is written into a temporary folder, its UNet as a ``.ckpt`` as NeMo gives one
out, and loaded by 1, 2 and 4 processes in three ways:

- ``as before``: each builds the network with random weights, reads the whole file, and copies one into the other;
- ``each for itself``: each builds it without memory and maps the file;
- ``once per node``: ``load_once``, which training uses: one process does this, the others receive tensors.

Memory is each process's largest resident set while loading, as the kernel keeps it, less what it had before, summed
over the processes. Pages of a mapped file count for each process that has touched them, though they can be given up at
any time. The weights then stay on the host, or leave it for devices with memory of their own: torch's ``meta`` device
stands in for GPUs, since only the host's memory is of interest. Opened says how many weight files the processes opened
together, as the kernel tells it (inotify; each process has hard links of its own to the files).

    python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import multiprocessing
import os
import shutil
import struct
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

PATHS = ("as before", "each for itself", "once per node")
DEVICES = {"cpu": "weights stay on the host", "meta": "weights go to a device"}


def write_model(folder: Path, width: int) -> int:
    """A pipeline folder and ``unet.ckpt`` beside it, random; the bytes of all weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from nemo_aligner_diffusion.embedded_assets import embedded_model_path

    tokenizer = CLIPTokenizer.from_pretrained(embedded_model_path() / "tokenizer")
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=512, num_attention_heads=8, num_hidden_layers=12)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=512,
            attention_head_dim=8,
        ),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(64, 128, 256, 256),
            latent_channels=4,
        ),
        "text_encoder": CLIPTextModel(text),
    }
    StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    torch.save({"state_dict": parts["unet"].state_dict()}, folder / "unet.ckpt")
    for file in (folder / "unet").glob("*.safetensors"):  # the UNet's weights come from the .ckpt
        file.unlink()
    weights = [*folder.rglob("*.safetensors"), folder / "unet.ckpt"]
    for file in weights:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    return sum(file.stat().st_size for file in weights)


def work(rank: int, size: int, folder: str, path: str, device: str, connection: Any) -> None:
    """One process: import, say so, load when told, say so, end when told."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    from nemo_aligner_diffusion.diffusion import loading
    from nemo_aligner_diffusion.diffusion.files import parts
    from nemo_aligner_diffusion.embedded_assets import embedded_model_path
    from nemo_aligner_diffusion.parallel import broadcast

    class AsBefore:
        """Random weights first, then those of the file, read whole."""

        @staticmethod
        def empty_module(build: Any, dtype: torch.dtype) -> Any:
            return build().to(dtype)

        @staticmethod
        def load_component(module: Any, component: str, source: Any) -> None:
            module.load_state_dict(torch.load(source, map_location="cpu", weights_only=True)["state_dict"])

    if path == "as before":
        parts.empty_module = AsBefore.empty_module  # type: ignore[assignment]
        parts.load_component = AsBefore.load_component  # type: ignore[assignment]

    def load() -> Any:
        own = Path(folder) / str(rank)
        model = loading.load_model(own, denoiser_path=own / "unet.ckpt")
        for tensor in model.state_dict().values():  # as a copy to a device does: mapped pages come into memory
            tensor.sum()
        return model

    # what the first load imports must not count
    loading.load_model(embedded_model_path())
    if size > 1:
        store = dist.FileStore(f"{folder}/store-{path}-{device}-{size}", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
        broadcast.gather(None)
    connection.send(os.getpid())
    connection.recv()
    forget_largest()
    started, before = time.perf_counter(), resident_bytes()
    model = broadcast.load_once(load, device) if path == "once per node" else load().to(device)
    connection.send((time.perf_counter() - started, resident_bytes() - before))
    connection.recv()
    del model
    if size > 1:
        dist.destroy_process_group()
    os._exit(0)


def resident_bytes() -> int:
    """The largest resident set of this process since the last :func:`forget_largest`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def forget_largest() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


class Opened:
    """Which files below a folder are opened, by any process. Linux's inotify(7)."""

    _IN_OPEN, _IN_NONBLOCK = 0x20, 0o4000

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(self._IN_NONBLOCK)
        self._watched = {}
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            self._watched[libc.inotify_add_watch(self._descriptor, os.fsencode(place), self._IN_OPEN)] = place

    def take(self) -> set[Path]:
        """Files opened since the last call."""
        found = set()
        with contextlib.suppress(BlockingIOError):
            while events := os.read(self._descriptor, 1 << 16):
                place = 0
                while place < len(events):
                    watch, _, _, length = struct.unpack_from("iIII", events, place)
                    name = events[place + 16 : place + 16 + length].rstrip(b"\0")
                    found.add(self._watched[watch] / os.fsdecode(name))
                    place += 16 + length
        return found


def receive(end: Any) -> Any:
    """What the process at the other end sends, within five minutes."""
    if not end.poll(300):
        raise TimeoutError("a process did not answer")
    return end.recv()  # EOFError: it failed, and has said why


def measure(size: int, folder: str, path: str, device: str) -> tuple[int, int, float]:
    """Memory in bytes, opened weight files and the slowest process's seconds."""
    context = multiprocessing.get_context("spawn")
    ends = []
    for rank in range(size):
        here, there = context.Pipe()
        context.Process(target=work, args=(rank, size, folder, path, device, there), daemon=True).start()
        there.close()
        ends.append(here)
    for end in ends:
        receive(end)
    opened = Opened(Path(folder))
    for end in ends:
        end.send("load")
    answers = [receive(end) for end in ends]
    weights = [file for file in opened.take() if file.suffix in (".safetensors", ".ckpt")]
    for end in ends:
        end.send("end")
    return sum(memory for _, memory in answers), len(weights), max(seconds for seconds, _ in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--width", type=int, default=96, help="the UNet's channels, a multiple of 32; 96: 550 MB in all"
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        total = write_model(Path(folder) / "0", arguments.width)
        for rank in range(1, max(arguments.processes)):
            shutil.copytree(Path(folder) / "0", Path(folder) / str(rank), copy_function=os.link)
        print(
            f"model: {total / 1e6:.0f} MB of weights in 3 files; host memory in copies of it, weight files opened, time"
        )
        for device in arguments.devices:
            print(f"{DEVICES[device]}\n{'processes':>10}" + "".join(f"{path:>28}" for path in PATHS))
            for size in arguments.processes:
                cells = []
                for path in PATHS:
                    memory, opened, seconds = measure(size, folder, path, device)
                    cells.append(f"{memory / total:5.2f} {opened:4} opened {seconds:5.1f} s")
                print(f"{size:>10}" + "".join(f"{cell:>28}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
