"""Loading once per node: what the processes get, who opens files, and what happens when that fails."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch
from tiny.stable_diffusion import save_tiny_pipeline
from tiny_pipelines import named
from torch import nn

from nemo_aligner_diffusion.diffusion.generate import Sampling, generate
from nemo_aligner_diffusion.diffusion.loading import load_model
from nemo_aligner_diffusion.embedded_assets import embedded_reward_path
from nemo_aligner_diffusion.errors import AlignerError, ArchiveError, CheckpointError
from nemo_aligner_diffusion.parallel.broadcast import load_once
from nemo_aligner_diffusion.rewards import build_reward

OPENED: list[str] = []  # paths that this process has opened from Python since `watch()`
EVENTS = ("open", "os.listdir", "os.scandir")


def watch() -> None:
    if not hasattr(watch, "done"):
        watch.done = True  # type: ignore[attr-defined]
        sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event in EVENTS else None)
    OPENED.clear()


def fingerprint(module: nn.Module) -> dict[str, tuple]:
    """Of every parameter and buffer, those included that no state dict holds: dtype, shape, device, bits."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {
        name: (
            str(value.dtype),
            tuple(value.shape),
            value.device.type,
            type(value).__name__,
            value.requires_grad,
            hashlib.sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest(),
        )
        for name, value in tensors
    }


def rank() -> int:
    return int(os.environ["RANK"])


def on_two_nodes() -> None:
    os.environ["NODE_RANK"] = str(rank() // 2)


def load_pipeline(folder: str, dtype: torch.dtype, readers: tuple[int, ...]) -> tuple:
    """``load_model``; who is no reader has a folder that does not exist, so reading there would fail."""
    place = folder if rank() in readers else f"{folder}-which-is-not-there"
    watch()
    model = load_once(lambda: load_model(place, dtype=dtype))
    tokens = model.tokenizer(["red apple"]).input_ids
    picture = generate(model, ["red apple"], [0], Sampling(2, 3.0))  # by the pipeline, so by the same networks
    opened = [path for path in OPENED if path.startswith(folder)]
    return fingerprint(model), tokens, dict(model.pipe.scheduler.config), picture.numpy(), opened


# SDXL reads hidden states of its text encoders, which transformers records for classes that a process has built
@pytest.mark.parametrize(("family", "dtype"), [(None, torch.float32), (None, torch.bfloat16), ("sdxl", torch.float32)])
def test_every_process_gets_the_leaders_model_and_opens_nothing(processes, tmp_path, family, dtype):
    folder = tmp_path / "pipeline"
    named(family).build().save_pretrained(folder) if family else save_tiny_pipeline(folder)
    alone = load_model(folder, dtype=dtype)
    assert {name.split(".")[0] for name in fingerprint(alone)} >= {"denoiser", "vae", "text_encoder"}
    expected = generate(alone, ["red apple"], [0], Sampling(2, 3.0)).numpy()
    results = processes.run(3, load_pipeline, str(folder), dtype, (0,))
    for found, tokens, scheduler, picture, _ in results:
        assert found == fingerprint(alone)
        assert tokens == alone.tokenizer(["red apple"]).input_ids
        assert scheduler == dict(alone.pipe.scheduler.config)
        assert (picture == expected).all()
    assert len(results[0][4]) > 3
    assert results[1][4] == results[2][4] == []


def load_reward(path: str, readers: tuple[int, ...]) -> tuple:
    place = path if rank() in readers else "not-there.nemo"
    watch()
    reward = load_once(lambda: build_reward({"name": "clip", "model": {"restore_from_path": place}}))
    score = reward(torch.full((1, 3, 32, 32), 0.5), ["red apple"])
    return fingerprint(reward), float(score), reward.name, reward.training, [o for o in OPENED if o.startswith(path)]


def test_a_reward_archive_is_read_by_one_process(processes):
    path = str(embedded_reward_path())
    alone = build_reward({})
    score = float(alone(torch.full((1, 3, 32, 32), 0.5), ["red apple"]))
    results = processes.run(3, load_reward, path, (0,))
    assert [result[:4] for result in results] == [(fingerprint(alone), score, alone.name, False)] * 3
    assert results[0][4]
    assert results[1][4] == results[2][4] == []


def load_on_two_nodes(folder: str) -> tuple:
    on_two_nodes()
    try:
        return load_pipeline(folder, torch.float32, (0, 2))
    finally:
        del os.environ["NODE_RANK"]


def test_each_node_has_a_reader_of_its_own(processes, tmp_path):
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    results = processes.run(4, load_on_two_nodes, str(folder))
    assert [result[0] for result in results] == [fingerprint(load_model(folder))] * 4
    assert [bool(result[4]) for result in results] == [True, False, True, False]


def failure(folder: str, two_nodes: bool) -> tuple[str, str]:
    if two_nodes:
        on_two_nodes()
        if rank() >= 2:
            folder += "-of-node-1"  # that node has not mounted it
    try:
        load_once(lambda: load_model(folder, denoiser_path=Path(folder) / "unet.ckpt"))
    except AlignerError as error:
        return type(error).__name__, str(error)
    finally:
        os.environ.pop("NODE_RANK", None)
    return "", ""


def test_a_damaged_file_is_the_same_error_everywhere(processes, tmp_path):
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    (folder / "unet.ckpt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(CheckpointError) as alone:
        load_model(folder, denoiser_path=folder / "unet.ckpt")
    assert str(folder / "unet.ckpt") in str(alone.value)
    results = processes.run(3, failure, str(folder), False)
    assert results == [("CheckpointError", str(alone.value))] * 3
    # the group still works: nobody was left waiting
    assert processes.run(3, load_reward, str(embedded_reward_path()), (0,))


def test_a_file_that_one_node_lacks_stops_all_nodes(processes, tmp_path):
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    torch.save(load_model(folder).denoiser.state_dict(), folder / "unet.ckpt")
    results = processes.run(4, failure, str(folder), True)
    assert len(set(results)) == 1
    kind, message = results[0]
    assert kind == "CheckpointError"
    assert f"{folder}-of-node-1: no such file or folder" in message


class TwoArguments(ArchiveError):
    """An error that pickle cannot make again from its message."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


def raise_odd(kind: str) -> tuple[str, str]:
    def load() -> nn.Module:
        raise TwoArguments("a.nemo", "odd") if kind == "ours" else KeyError("absent")

    try:
        load_once(load)
    except (AlignerError, KeyError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "", ""


def test_errors_that_cannot_be_pickled_keep_their_message(processes):
    assert processes.run(2, raise_odd, "ours") == [("ArchiveError", "a.nemo: odd")] * 2
    assert processes.run(2, raise_odd, "pythons") == [("KeyError", "'absent'")] * 2


class Oddities(nn.Module):
    """Everything that is easily lost on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight  # tied: one parameter
        self.frozen = nn.Parameter(torch.randn(2, 2, dtype=torch.float64), requires_grad=False)
        self.narrow = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("positions", torch.arange(4).expand(2, 4), persistent=False)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("turned", torch.randn(3, 2).T)
        self.register_buffer("absent", None)
        self.plain = torch.randn(4)  # a tensor that is no buffer
        self.shared_a, self.shared_b = self.plain[:2], self.plain[:2]


def odd_module() -> tuple:
    torch.manual_seed(rank())  # the others must not have made it for themselves
    module = load_once(Oddities)
    return (
        fingerprint(module),
        module.plain.tolist(),
        module.head.weight is module.embedding.weight,
        module.shared_a.data_ptr() == module.shared_b.data_ptr(),
        module.shared_a is module.shared_b,
        module.absent is None,
        sorted(module.state_dict()),
    )


def test_ties_buffers_and_every_dtype_survive(processes):
    torch.manual_seed(0)
    alone = Oddities()
    results = processes.run(2, odd_module)
    expected = (fingerprint(alone), alone.plain.tolist(), True, True, False, True, sorted(alone.state_dict()))
    assert results == [expected] * 2


def to_another_device() -> tuple:
    module = load_once(Oddities, "meta")
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.device.type for tensor in tensors}, {(str(t.dtype), tuple(t.shape)) for t in tensors}


def test_every_process_puts_its_tensors_on_its_own_device(processes):
    alone = Oddities()
    expected = {(str(t.dtype), tuple(t.shape)) for t in [*alone.parameters(), *alone.buffers()]}
    assert processes.run(2, to_another_device) == [({"meta"}, expected)] * 2


def local_code() -> tuple:
    calls = []

    def load() -> nn.Module:
        calls.append(1)
        torch.manual_seed(3)
        module = nn.Linear(2, 2)
        module.hook = lambda: None  # nothing that another process could import
        return module

    return fingerprint(load_once(load)), len(calls)


def test_what_cannot_be_pickled_is_loaded_by_everyone(processes):
    results = processes.run(2, local_code)
    assert results[0][0] == results[1][0]
    assert [calls for _, calls in results] == [1, 1]


def test_without_a_process_group_it_is_a_plain_load():
    module = nn.Linear(2, 2)
    phases = []

    class Phase:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    def phase(name: str) -> Phase:
        phases.append(name)
        return Phase()

    assert load_once(lambda: module, "cpu", phase) is module
    assert phases == ["reading weights", "moving to the device"]
