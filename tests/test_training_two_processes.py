"""Two data-parallel processes on the CPU: resuming is exact there too, dropout's random state of each rank included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from pytorch_lightning.strategies import DDPStrategy
from tiny.training import Toy, fit
from nemo_aligner_diffusion.parallel.strategy import ParallelStrategy
from nemo_aligner_diffusion.runtime.ending import end
from nemo_aligner_diffusion.training.checkpoints.resume import find_resume_point
from nemo_aligner_diffusion.runtime.signals import Interruption
from nemo_aligner_diffusion.training.callbacks.interruption import InterruptionCallback

rank, root = int(os.environ["RANK"]), Path(sys.argv[1])
options = dict(accumulate=2, devices=2, use_distributed_sampler=False)
class Replicas(DDPStrategy):
    save_checkpoint = ParallelStrategy.save_checkpoint

def run(*arguments, **more):
    fit(*arguments, strategy=Replicas(), **options, **more)

run(root / "whole", Toy(), 4, seed=rank)

interruption, first = Interruption(), Toy()
def at_step(step):
    if step == 2 and rank == 1:  # only one process hears of it; both must stop at the same step
        os.kill(os.getpid(), 15)
first.at_step = at_step
with interruption:
    run(root / "parts", first, 4, seed=rank, callbacks=[InterruptionCallback(interruption)])
resume = find_resume_point(root / "parts" / "checkpoints")
assert resume.step == 2, resume
limit = InterruptionCallback(Interruption(), "00:01:00:00")
run(root / "parts", Toy(), 4, seed=50 + rank, resume=resume, callbacks=[limit])
end(0)  # as a run does
"""


@pytest.mark.slow
def test_resuming_on_two_processes(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    whole, parts = (
        load_file(tmp_path / run / "checkpoints" / "step_000004" / "tensors-00000.safetensors")
        for run in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() >= {"adapter.weight", "adapter.bias"}
    assert whole["nemo_aligner_diffusion/random_states"].shape[0] == 2
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (tmp_path / "parts" / "metrics.csv").read_text().count("\n") == 5
