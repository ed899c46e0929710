"""What a checkpoint is on disk: safe to read, whole or not there, and written in the background without being lost."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny.training import Toy, fit

from nemo_aligner_diffusion.errors import CheckpointError, OutputError
from nemo_aligner_diffusion.training.callbacks.ema import EMACallback
from nemo_aligner_diffusion.training.callbacks.settings import EMASettings
from nemo_aligner_diffusion.training.checkpoints.files import record_of, verify, write_manifest, write_tensors
from nemo_aligner_diffusion.training.checkpoints.io import FolderCheckpointIO, share_out
from nemo_aligner_diffusion.training.checkpoints.resume import find_resume_point
from nemo_aligner_diffusion.training.checkpoints.tree import put_together, take_apart


def test_a_state_comes_back_as_it_was() -> None:
    parameters = {"net.weight": torch.zeros(3, 2)}
    tree = {
        "numbers": [1, -0.0, 1e-310, 0.1 + 0.2, math.inf, 2**63, True, None],
        "pairs": {"betas": (0.9, 0.999), 3: "three", (1, "a"): [(), {}]},
        "$odd": {"$tensor": "not a tensor"},
        "state_dict": {"net.weight": torch.randn(3, 2)},
        "optimizer": {"state": {"net.weight": {"exp_avg": torch.randn(3, 2), "step": torch.tensor(4.0)}}},
    }
    document, leaves = take_apart(tree, parameters)
    assert {name: like for name, (_, like) in leaves.items()} == {
        "net.weight": "net.weight",
        "optimizer/state/net.weight/exp_avg": "net.weight",
        "optimizer/state/net.weight/step": None,
    }
    back = put_together(json.loads(json.dumps(document)), lambda name, like: leaves[name][0])
    moment = back["optimizer"]["state"]["net.weight"]["exp_avg"]
    assert torch.equal(moment, leaves["optimizer/state/net.weight/exp_avg"][0])
    for key in ("numbers", "pairs", "$odd"):
        assert back[key] == tree[key]
        assert repr(back[key]) == repr(tree[key])  # -0.0, True and tuples too


@pytest.mark.parametrize("value", [Path("/x"), {1, 2}, b"bytes", object(), torch.zeros(2).to_sparse()])
def test_what_is_neither_number_nor_text_nor_tensor_is_refused_by_name(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"callbacks.*Mine.*secret"):
        take_apart({"callbacks": {"Mine": {"secret": value}}}, {})


def test_pieces_of_unknown_shape_are_not_taken_for_whole() -> None:
    tree = {"optimizer": {"state": {"net.weight": {"row": torch.zeros(3)}}}}
    parameters = {"net.weight": torch.zeros(3, 2)}
    take_apart(tree, parameters)
    with pytest.raises(CheckpointError, match=r"net\.weight/row .*shape \(3,\)"):
        take_apart(tree, parameters, in_pieces={"net.weight"})


def test_a_file_is_what_its_record_says(tmp_path: Path) -> None:
    tensors = {"one": torch.tensor(0.1), "none": torch.zeros(0, 4), "half": torch.ones(3, dtype=torch.bfloat16)}
    record = write_tensors(tmp_path / "x.safetensors", tensors)
    assert record == record_of(tmp_path / "x.safetensors")
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_torchs_own_reader_understands_the_folder(tmp_path: Path) -> None:
    """So other programs can use a checkpoint without this one."""
    import torch.distributed.checkpoint as dcp

    fit(tmp_path, module := Toy(), 2)
    folder = tmp_path / "checkpoints" / "step_000002"
    state = {"adapter.weight": torch.empty_like(module.adapter.weight)}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    assert torch.equal(state["adapter.weight"], module.adapter.weight)


def test_no_pickle_is_ever_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed.checkpoint's own storage would unpickle ``.metadata``; a folder that brings one is harmless."""

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    fit(tmp_path, Toy(), 2, callbacks=[EMACallback(EMASettings(decay=0.999))])
    folder = tmp_path / "checkpoints" / "step_000002"
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
    for name in ("pickle.load", "pickle.loads", "torch.load"):
        monkeypatch.setattr(name, lambda *a, **k: pytest.fail("a pickle was opened"))
    resume = find_resume_point(tmp_path / "checkpoints")
    fit(tmp_path, Toy(), 3, callbacks=[EMACallback(EMASettings(decay=0.999))], resume=resume)
    assert not (tmp_path / "owned").exists()


def _rewrite(folder: Path, change: Any) -> None:
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    write_manifest(folder, {file.name: record_of(file) for file in folder.iterdir() if file.name != "manifest.json"})


def test_a_folder_whose_parts_do_not_agree_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, Toy(), 2)
    folder = tmp_path / "checkpoints" / "step_000002"

    def elsewhere(state: dict[str, Any]) -> None:
        state["tensors"]["adapter.bias"]["file"] = "../../../secret.safetensors"

    save_file({"adapter.bias": torch.zeros(1)}, tmp_path.parent / "secret.safetensors")
    _rewrite(folder, elsewhere)
    with pytest.raises(CheckpointError, match="secret"):
        find_resume_point(tmp_path / "checkpoints")

    def larger(state: dict[str, Any]) -> None:
        state["tensors"]["adapter.bias"] |= {"file": "tensors-00000.safetensors", "shape": [2**40]}

    _rewrite(folder, larger)
    with pytest.raises(CheckpointError, match=r"adapter\.bias"):
        find_resume_point(tmp_path / "checkpoints")

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../x"] = {"bytes": 1, "crc32": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was not written by this program"):
        verify(folder)


PROGRAM = """
import os, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from tiny.training import Toy, fit
from nemo_aligner_diffusion.errors import OutputError
from nemo_aligner_diffusion.runtime.signals import Interruption
from nemo_aligner_diffusion.training.callbacks.interruption import InterruptionCallback

run = Path(sys.argv[1])
interruption = Interruption()
module = Toy()
module.adapter = torch.nn.Sequential(torch.nn.Linear(8, 40_000), torch.nn.Linear(40_000, 1))

def disk_full(step):
    if step == 3:
        while not (run / "checkpoints" / "last").exists():  # the save of step 2, behind the training
            time.sleep(0.01)
        # no file may grow past a megabyte: write() fails in the middle of the tensors
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    if step == {told}:
        os.kill(os.getpid(), signal.SIGTERM)

module.at_step = disk_full
try:
    with interruption:
        callbacks = [InterruptionCallback(interruption)]
        fit(run, module, 9, save_interval=2, checkpoint={{"async_save": {behind}}}, callbacks=callbacks)
except OutputError as error:
    print(f"step {{module.trainer.global_step}}: {{error}}")
"""


@pytest.mark.parametrize(("behind", "told"), [(False, 0), (True, 0), (True, 5)])
def test_a_full_disk_is_said_and_harms_no_earlier_checkpoint(tmp_path: Path, behind: bool, told: int) -> None:
    """Also where SIGTERM comes in the step (5) that would have met the failure of the save behind it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent), behind=behind, told=told))
    result = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "step_000004 could not be written: " in result.stdout
    assert "File too large" in result.stdout
    assert "Earlier checkpoints are intact" in result.stdout
    if not behind:
        assert "step 4:" in result.stdout
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step_000002"]
    assert (folder / "last").read_text() == "step_000002\n"
    resume = find_resume_point(folder)
    assert resume is not None
    assert resume.step == 2


def test_what_a_killed_save_left_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, Toy(), 2)
    folder = tmp_path / "checkpoints"
    (folder / "last").write_text("step_000001\n")  # killed between the two
    half = folder / ".step_000004.tmp"
    half.mkdir()
    (half / "tensors-00000.safetensors").write_bytes(b"half")
    (folder / ".last.abc.tmp").write_text("step")
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Toy(), 4, resume=find_resume_point(folder))
    assert ".step_000004.tmp, which an earlier run had not finished writing" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step_000002", "step_000004"]


def test_saving_behind_the_training_gives_the_same_checkpoints(tmp_path: Path) -> None:
    for name, behind in (("at once", False), ("behind", True)):
        options: dict[str, Any] = {"save_interval": 2, "checkpoint": {"async_save": behind, "keep_last_n": None}}
        fit(tmp_path / name, Toy(), 7, callbacks=[EMACallback(EMASettings(decay=0.5))], **options)
    for step in (2, 4, 6, 7):
        here, there = (tmp_path / name / "checkpoints" / f"step_{step:06d}" for name in ("at once", "behind"))
        verify(there)
        assert (here / "tensors-00000.safetensors").read_bytes() == (there / "tensors-00000.safetensors").read_bytes()
        assert (here / "state.json").read_bytes() == (there / "state.json").read_bytes()
    assert (tmp_path / "behind" / "checkpoints" / "last").read_text() == "step_000007\n"


def test_a_save_behind_copies_first_and_its_failure_is_raised_once(tmp_path: Path) -> None:
    module = torch.nn.Linear(1000, 1000)
    io = FolderCheckpointIO(module, async_save=True)
    before = module.weight.detach().clone()
    io.save_checkpoint({"state_dict": dict(module.named_parameters())}, tmp_path / "step_000001")
    with torch.no_grad():
        module.weight.zero_()  # training goes on
    io.wait()
    assert torch.equal(load_file(tmp_path / "step_000001" / "tensors-00000.safetensors")["weight"], before)

    (tmp_path / "file").write_text("in the way")
    io.save_checkpoint({"state_dict": dict(module.named_parameters())}, tmp_path / "file" / "step_000002")
    deadline = time.monotonic() + 60
    while not io.is_written and time.monotonic() < deadline:
        time.sleep(0.01)
    assert io.is_writing  # until somebody has looked
    with pytest.raises(OutputError, match="step_000002 could not be written"):
        io.save_checkpoint({"state_dict": {}}, tmp_path / "step_000003")
    io.wait()
    assert not (tmp_path / "step_000003").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saving")]


@pytest.mark.parametrize("behind", [False, True])
def test_a_step_saved_again_replaces_the_one_before(tmp_path: Path, behind: bool) -> None:
    module = torch.nn.Linear(3, 2)
    io = FolderCheckpointIO(module, async_save=behind)
    for number in (1.0, 2.0):
        torch.nn.init.constant_(module.weight, number)
        io.save_checkpoint({"state_dict": dict(module.named_parameters())}, tmp_path / "step_000001")
    io.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step_000001"]
    assert float(io.load_checkpoint(tmp_path / "step_000001")["state_dict"]["weight"].mean()) == 2.0


def test_work_is_shared_out_evenly_and_alike_everywhere() -> None:
    sizes = {f"t{i}": 1000 + i for i in range(100)} | {"large": 30_000}
    shares = share_out(sizes, 4, 1)
    assert shares == share_out(dict(reversed(sizes.items())), 4, 1)
    loads = [sum(size for name, size in sizes.items() if shares[name] == rank) for rank in range(4)]
    assert max(loads) - min(loads) < 2000
    assert set(share_out(sizes, 8, 50_000).values()) == {0, 4}  # small ones are not scattered, but are on two nodes
    assert set(share_out({"a": 5}, 512, 100).values()) == {0}
    assert share_out({}, 4, 100) == {}


def _save_and_load(folder: str, full_disk_on: int | None, behind: bool) -> Any:
    """On each rank of a pool: write what all hold alike, each its share, and read it back."""
    import resource

    import torch.distributed as dist

    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(50, 50) for _ in range(6)))
    io = FolderCheckpointIO(module, async_save=behind, bytes_a_writer=1000)
    place = Path(folder) / "step_000001"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == full_disk_on:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        io.save_checkpoint({"state_dict": dict(module.named_parameters()), "global_step": 1}, place)
        io.wait()
    except OutputError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    loaded = io.load_checkpoint(place)
    assert loaded["global_step"] == 1
    for name, value in module.named_parameters():
        assert torch.equal(loaded["state_dict"][name], value), name
    return sorted(path.name for path in place.iterdir())


@pytest.mark.parametrize("behind", [False, True])
def test_processes_write_a_share_each_and_fail_together(processes: Any, tmp_path: Path, behind: bool) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    expected = ["manifest.json", "state.json", *(f"tensors-{rank:05d}.safetensors" for rank in range(3))]
    assert processes.run(3, _save_and_load, str(good), None, behind) == [expected] * 3
    answers = processes.run(3, _save_and_load, str(bad), 2, behind)
    assert len(set(answers)) == 1  # all of them say the same
    assert "could not be written by process 2 of 3: " in answers[0]
    assert "File too large" in answers[0]
    assert list(bad.iterdir()) == []
