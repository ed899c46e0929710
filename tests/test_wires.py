"""What a key says arrives where it acts: whole wires, from the configuration on, that nothing else would miss."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from tiny.runs import rows
from tiny.stable_diffusion import save_tiny_pipeline

from nemo_aligner_diffusion.config.load import load_settings
from nemo_aligner_diffusion.errors import ConfigurationError
from nemo_aligner_diffusion.rewards import build_reward
from nemo_aligner_diffusion.runtime.directory import RunDirectory
from nemo_aligner_diffusion.runtime.join import AgentNotes, find_device
from nemo_aligner_diffusion.runtime.process import Process
from nemo_aligner_diffusion.runtime.settings import StragglerSettings
from nemo_aligner_diffusion.runtime.signals import Interruption
from nemo_aligner_diffusion.runtime.watch import RunWatch, watched
from nemo_aligner_diffusion.training.build import build_model, build_module
from nemo_aligner_diffusion.training.run import run_training
from nemo_aligner_diffusion.training.run_frame import RunFrame
from nemo_aligner_diffusion.training.settings import RunSettings

TWO = ["trainer.devices=2", "model.micro_batch_size=1", "model.global_batch_size=2"]


def configured(*words: str) -> RunSettings:
    return load_settings("draftp_sd", [*TWO, *(f"exp_manager.{word}" for word in words)])


def timeouts(folder: Path) -> dict[str, timedelta]:
    """Of every process group that a run of two processes talks through."""
    import torch.distributed as dist
    from tiny.training import Toy, fit

    from nemo_aligner_diffusion.parallel import broadcast
    from nemo_aligner_diffusion.parallel.layout import Layout
    from nemo_aligner_diffusion.parallel.strategy import ParallelStrategy
    from nemo_aligner_diffusion.runtime.join import join
    from nemo_aligner_diffusion.training.checkpoints.callback import TrainingCheckpoint

    class Replica(Toy):
        def configure_model(self) -> None:
            """Lightning's strategy wants one."""

    settings = configured("fault_tolerance.rank_heartbeat_timeout=20000")
    with watched(settings.trainer, settings.exp_manager) as watch:
        limit = watch.collective_timeout
        join(watch.process, torch.device("cpu"), watch)
    broadcast.gather(None)
    trainer = fit(folder, Replica(), 1, devices=2, strategy=ParallelStrategy(Layout(data=2), limit))
    (checkpoint,) = [callback for callback in trainer.callbacks if isinstance(callback, TrainingCheckpoint)]
    strategy: Any = trainer.strategy
    assert checkpoint._io is not None
    assert broadcast._known is not None
    groups = {
        "replicas": strategy.device_mesh.get_group("data_parallel"),
        "tensor group": strategy.device_mesh.get_group("tensor_parallel"),
        "checkpoints": checkpoint._io.group,
        "loading": broadcast._known[1].world,
        "node": broadcast._known[1].group,
    }
    assert all(isinstance(group, dist.ProcessGroup) for group in groups.values())
    return {name: group._get_backend(torch.device("cpu")).options._timeout for name, group in groups.items()}


def test_no_collective_call_gives_up_before_the_watch_over_ranks(processes: Any, tmp_path: Path) -> None:
    for found in processes.run(2, timeouts, tmp_path):
        assert len(found) == 5
        assert set(found.values()) == {timedelta(seconds=20600)}


@pytest.fixture
def first_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


@pytest.mark.usefixtures("first_of_two")
def test_the_watch_over_ranks_is_as_configured() -> None:
    settings = configured(
        "fault_tolerance.workload_check_interval=0.25",
        "fault_tolerance.silence_timeout=11",
        "fault_tolerance.initial_rank_heartbeat_timeout=12",
        "fault_tolerance.rank_heartbeat_timeout=null",
        "fault_tolerance.calculate_timeouts=false",
        "fault_tolerance.safety_factor=13",
        "fault_tolerance.minimum_heartbeat_timeout=14",
        "straggler_detection_params.report_time_interval=16",
        "straggler_detection_params.gpu_relative_perf_threshold=0.6",
        "straggler_detection_params.stop_if_detected=true",
    )
    with watched(settings.trainer, settings.exp_manager) as watch:
        watch.begin(watch.serve(), "")
        assert watch.progress is not None
        limits = watch.progress.limits
        assert (limits.longest_pause(None), limits.longest_pause(1.0)) == (12.0, float("inf"))
        assert (limits.safety_factor, limits.minimum_heartbeat_timeout) == (13.0, 14.0)
        client, server = watch.client, watch.server
        assert client is not None
        assert server is not None
        assert server.stragglers is not None
        assert server.stragglers.settings == StragglerSettings(16.0, 0.6, True)
        assert (client.interval, client.silence) == (server.interval, server.watch.silence) == (0.25, 11.0)


@pytest.mark.usefixtures("first_of_two")
def test_what_the_watch_over_ranks_leaves_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    settings = configured("create_straggler_detection_callback=false")
    with watched(settings.trainer, settings.exp_manager) as watch:
        watch.serve()
        assert watch.server is not None
        assert watch.server.stragglers is None
    assert caplog.text == ""
    settings = configured("create_fault_tolerance_callback=false")
    with watched(settings.trainer, settings.exp_manager) as watch:
        assert watch.serve() == ""
    assert "slow ranks are not looked for" in caplog.text


def test_closing_work_is_known_to_the_watch_over_ranks(tmp_path: Path) -> None:
    """After the last validation the phase of a step would be on: five minutes for an export, then it counts as hung."""
    watch = RunWatch(Process(0, 2, 0, 2), configured().exp_manager)
    progress, seen = watch.progress, []
    assert progress is not None
    directory = RunDirectory.prepare(tmp_path)
    frame = RunFrame(configured(), watch, Interruption(), torch.device("cpu"), directory, None, AgentNotes(Process()))

    def train() -> None:
        for _ in range(2):
            progress.mark("data", 7, in_training=True)

    def export() -> None:
        seen.append((progress.position().place, progress.position().limit))

    frame.trainer = pl.Trainer(accelerator="cpu", logger=False, barebones=True, max_steps=7)
    assert frame.carry_out(train, [export]) == 0
    assert seen == [("export", 3600.0)]


@pytest.mark.parametrize(
    ("devices", "accelerator", "message"),
    [
        ([0, 3], "cpu", r"trainer\.devices = \[0, 3\] .* only GPUs have indices; .* trainer\.devices=2"),
        (99, "gpu", r"trainer\.devices = 99 .* PyTorch sees \d+ GPUs here"),
    ],
)
def test_devices_that_are_not_there_are_refused(devices: Any, accelerator: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_device(Process(), devices, accelerator)


def test_a_run_does_what_the_keys_of_the_loop_and_of_exp_manager_say(tmp_path: Path) -> None:
    """Each of them at a value that leaves another trace in the run directory than the default does."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"p{number}\n" for number in range(9)))
    words = [
        "rm=symmetry",
        f"model.from_pretrained={save_tiny_pipeline(tmp_path / 'pipeline')}",
        "family=embedded",
        f"model.data.train.webdataset.local_root_path={prompts}",
        "model.data.validation.max_prompts=5",  # two pictures each; eight a batch
        "model.infer.inference_steps=2",
        "model.truncation_steps=1",
        "model.kl_coeff=0",
        "model.micro_batch_size=2",
        "model.global_batch_size=2",
        "optim=sgd",
        "model.optim.lr=100",
        "model.optim.momentum=0",
        "sched=constant",
        "report.enable=false",
        "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=3",
        "trainer.draftp_sd.max_epochs=1",  # four whole batches
        "trainer.draftp_sd.max_steps=50",
        "trainer.draftp_sd.val_check_interval=4",
        "trainer.draftp_sd.limit_val_batches=1",
        "trainer.draftp_sd.save_interval=1",
        "trainer.draftp_sd.gradient_clip_val=1e-5",
        "exp_manager.checkpoint_callback_params.keep_last_n=3",
        "exp_manager.ema.enable=true",
        "exp_manager.ema.decay=0.5",
        "exp_manager.ema.every_n_steps=2",
    ]
    run = tmp_path / "run"
    assert run_training(load_settings("draftp_sd", [*words, f"exp_manager.explicit_log_dir={run}"])) == 0
    metrics = rows(run / "metrics.csv")
    assert [row["step"] for row in metrics] == ["1", "2", "3", "4"]  # max_epochs
    assert len(json.loads((run / "validation_samples.json").read_text())["prompts"]) == 8  # limit_val_batches
    folders = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert folders == ["step_000002", "step_000003", "step_000004"]  # save_interval, keep_last_n
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [3]  # log_every_n_steps

    tree = json.loads((run / "checkpoints" / "step_000004" / "state.json").read_text())["tree"]
    assert tree["non_finite"] == {"consecutive": 0, "skipped": 0, "events": []}  # goes on when the run is resumed
    saved = load_file(run / "checkpoints" / "step_000004" / "tensors-00000.safetensors")
    means = {name.rpartition("/")[2]: value for name, value in saved.items() if "EMACallback" in name}
    moved = {name: value for name, value in means.items() if "lora_B" in name}  # they begin at zero

    def norm(tensors: Any) -> float:
        return float(torch.stack([tensor.norm() for tensor in tensors]).norm())

    assert all(float(row["grad_norm"]) > 2e-5 for row in metrics)
    assert 1e-5 < norm(saved[name] for name in moved) <= 4.001e-3  # gradient_clip_val
    exported = load_file(run / "export" / "pytorch_lora_weights.safetensors")
    of_export = norm(value for name, value in exported.items() if "lora.up" in name or "lora_B" in name)
    of_export /= 32 / 8  # alpha / rank, which an export holds in its tensors
    assert of_export == pytest.approx(norm(moved.values()), rel=1e-5)  # ema.enable
    assert of_export < 0.8 * norm(saved[name] for name in moved)

    more = ["trainer.precision=bf16", "trainer.draftp_sd.max_steps=1", "trainer.draftp_sd.val_check_interval=1"]
    other = tmp_path / "other"
    run_training(load_settings("draftp_sd", [*words, *more, f"exp_manager.explicit_log_dir={other}"]))
    whole, half = (float(rows(folder / "validation.csv")[0]["base_reward"]) for folder in (run, other))
    assert 1e-6 < abs(whole - half) < 1e-2  # precision


@pytest.mark.parametrize(("precision", "fused"), [("bf16", True), ("16", False)])
def test_the_fused_optimizer_is_left_out_only_where_there_is_a_loss_scale(precision: str, fused: bool) -> None:
    cfg = load_settings("draftp_sd", ["rm=symmetry", "optim=fused_adam", f"trainer.precision={precision}"])
    module = build_module(cfg, build_model(cfg), build_reward(cfg.rm), 5)
    assert bool(module.configure_optimizers()["optimizer"].defaults["fused"]) == fused
