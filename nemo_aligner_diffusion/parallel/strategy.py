"""Lightning's strategy for every run of more than one process."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.strategies.strategy import Strategy
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim import Optimizer

from nemo_aligner_diffusion.parallel.layout import Layout
from nemo_aligner_diffusion.runtime.process import Process


class LaunchedProcesses(ClusterEnvironment):
    """Tells Lightning which process this is, so that it does not look for a launcher itself.

    Left alone it would take other variables at their word, and under Slurm SIGUSR1 for itself: save in the middle of a
    step, from the signal handler, and requeue.
    """

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process = process

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        raise NotImplementedError("the processes have met already (runtime/join.py)")

    @property
    def main_port(self) -> int:
        raise NotImplementedError("the processes have met already (runtime/join.py)")

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.process.world_size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.process.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.process.local_rank

    def node_rank(self) -> int:
        return self.process.node_rank


class ParallelStrategy(ModelParallelStrategy):
    """``ModelParallelStrategy`` with a data × tensor mesh, whose checkpoints go through ``checkpoint_io``.

    Every process gives its own pieces of the state and calls the plugin (Lightning's strategy would write another
    format for each layout): what makes a checkpoint readable under any layout is the plugin's work.

    Args:
        layout: sizes; their product must be the number of processes.
        timeout: after which a collective call that does not complete is an error.
    """

    def __init__(self, layout: Layout, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(data_parallel_size=layout.data, tensor_parallel_size=layout.tensor, timeout=timeout)
        self.layout = layout
        self.timeout = timeout

    def setup_environment(self) -> None:
        super().setup_environment()
        mesh = self.device_mesh
        for name in mesh.mesh_dim_names or ():  # its groups have torch's own timeout, which may be the shorter one
            _set_pg_timeout(self.timeout, mesh.get_group(name))

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's pieces."""
        return Strategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This process's pieces."""
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """On every process."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)


def layout_of(trainer: pl.Trainer) -> Layout:
    """Of a run; replicas under a strategy of Lightning's own."""
    strategy = trainer.strategy
    return strategy.layout if isinstance(strategy, ParallelStrategy) else Layout(data=trainer.world_size)
