"""What memory is free, and weights that it does not hold: refused before they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny.stable_diffusion import save_tiny_pipeline

from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.errors import AlignerError
from nemo_aligner_diffusion.runtime import memory
from nemo_aligner_diffusion.runtime.memory import free_memory
from nemo_aligner_diffusion.runtime.watch import explained

GB = 10**9


def system(root: Path, group: str, **limits: tuple[int, int, int]) -> Path:
    """A file system that says 8 GB (and 1 of swap) are free; each group: its limit, what it holds, of that of files."""
    files = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {8 * GB // 1024} kB\nSwapFree: {GB // 1024} kB\n",
             "proc/self/cgroup": f"1:cpu:/other\n0::{group}\n", "sys/fs/cgroup/memory.max": "max\n"}  # fmt: skip
    for name, (most, held, of_files) in limits.items():
        folder = f"sys/fs/cgroup/{name.replace('__', '/')}"
        files |= {f"{folder}/memory.max": f"{most}\n", f"{folder}/memory.current": f"{held}\n",
                  f"{folder}/memory.stat": f"anon {held - of_files}\nfile {of_files}\n"}  # fmt: skip
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_machine_and_every_group_around_the_process_set_limits(tmp_path: Path) -> None:
    assert free_memory(system(tmp_path / "a", "/")) == pytest.approx(9 * GB, abs=2048)
    job = {"job": (5 * GB, 4 * GB, 3 * GB), "job__step": (9 * GB, 4 * GB, 3 * GB)}
    assert free_memory(system(tmp_path / "b", "/job/step", **job)) == 4 * GB
    assert free_memory(system(tmp_path / "c", "/other", **job)) == pytest.approx(9 * GB, abs=2048)
    assert free_memory(tmp_path / "nothing") is None
    assert (free_memory() or 10**9) > 10**8  # of this machine


def test_weights_that_memory_does_not_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_pipeline(tmp_path / "pipe", channels=(64, 96))
    unet = load_model(folder).denoiser
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    unet.half().save_pretrained(folder / "unet")
    size = 2 * unet.get_memory_footprint()  # in float32
    monkeypatch.setattr(memory, "free_memory", lambda: size - 1)
    for given in ((folder,), (folder, tmp_path / "unet.safetensors")):
        with pytest.raises(AlignerError, match=r"unet.*float32\): takes .* GB of memory, and .* GB are free here; "):
            load_model(*given)
    assert load_model(folder, dtype=torch.float16).denoiser.dtype == torch.float16  # mapped, not copied
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    load_model(folder)


def test_running_out_of_memory_is_told_in_a_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52)
    said = str(explained(caught.value, None))
    assert said.startswith("memory does not suffice: ")
    assert "tried to allocate" in said
    assert "nad-plan, given the words of this command" in said
    assert isinstance(explained(torch.OutOfMemoryError("CUDA out of memory. Tried to"), None), AlignerError)
    other = RuntimeError("shapes differ")
    assert explained(other, None) is other
