"""Which process of the run this is, as the launcher's environment says: read here and nowhere else. Imports no torch.

Launchers, the first that is found: this program's own (:mod:`.launch`), ``torchrun``, ``srun``, and whatever sets the
four variables of torch's ``env://`` (Kubernetes' PyTorchJob). Without one there is one process, rank 0, whatever
variables another program has left behind; :func:`left_over` names those, so that nobody relies on them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nemo_aligner_diffusion.errors import ConfigurationError

LAUNCHER_VARIABLE = "NAD_LAUNCHER"  # process number of our own launcher: believed from the parent only
ENV_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_INTERACTIVE_STEP = "4294967290"  # SLURM_STEP_ID of the shell that salloc opens on a node (slurm/slurm.h)
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")


@dataclass(frozen=True)
class Process:
    """One process among those of the run.

    Attributes:
        launcher: ``nad-train`` (our own), ``torchrun``, ``srun``, ``environment``; empty: nobody has started others.
        restart: how often torchrun has started the processes again.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    launcher: str = ""
    restart: int = 0

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def is_one_node(self) -> bool:
        return self.local_world_size == self.world_size


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """The process that calls it.

    Raises:
        ConfigurationError: a launcher's variable is missing, no number, or out of range; it is named.
    """
    if environment.get(LAUNCHER_VARIABLE) == str(os.getppid()):
        return _from_env(environment, "nad-train", node="NODE_RANK")
    if "TORCHELASTIC_RUN_ID" in environment:
        restart = _number(environment, "TORCHELASTIC_RESTART_COUNT", default=0)
        return _from_env(environment, "torchrun", node="GROUP_RANK", restart=restart)
    in_step = all(name in environment for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"))
    if in_step and not is_interactive(environment):
        size = _number(environment, "SLURM_NTASKS", least=1)
        rank = _number(environment, "SLURM_PROCID", below=size)
        nodes = _number(
            environment, "SLURM_STEP_NUM_NODES", least=1, default=_number(environment, "SLURM_NNODES", default=1)
        )
        local = _number(environment, "SLURM_LOCALID", default=rank if nodes == 1 else 0, below=size)
        return Process(rank, size, local, size // nodes, _number(environment, "SLURM_NODEID", default=0), "srun")
    if all(name in environment for name in ENV_VARIABLES) and _number(environment, "WORLD_SIZE", least=1) > 1:
        return _from_env(environment, "environment", node="NODE_RANK")
    return Process()


def is_interactive(environment: Mapping[str, str]) -> bool:
    """Whether this runs in a shell inside a Slurm allocation, whose variables describe the shell and not the run."""
    if "SLURM_JOB_ID" not in environment:
        return False
    if "SLURM_STEP_ID" not in environment:
        return "SLURM_PROCID" not in environment  # salloc's shell; a batch script has one
    if environment["SLURM_STEP_ID"] == _INTERACTIVE_STEP:
        return True
    # srun --pty, with something between it and this process
    return "SLURM_PTY_PORT" in environment and environment.get("SLURM_TASK_PID") != str(os.getpid())


def left_over(process: Process, environment: Mapping[str, str] = os.environ) -> str:
    """What to tell the user about variables of a launcher that nobody stands behind; empty: there are none."""
    if process.launcher:
        return ""
    names = [name for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK") if environment.get(name, "0") != "0"]
    names += [name for name in ("WORLD_SIZE",) if environment.get(name, "1") != "1"]
    if not names:
        return ""
    return (
        f"{', '.join(f'{name}={environment[name][:40]!r}' for name in names)} in the environment without effect: no "
        f"launcher has started this process (it would have set {', '.join(ENV_VARIABLES)})"
    )


def check_agrees(process: Process, devices: int, nodes: int, environment: Mapping[str, str] = os.environ) -> None:
    """Compare the configured processes with those that were started.

    Args:
        devices, nodes: processes a machine, and machines, as configured.

    Raises:
        ConfigurationError: they differ: the run would wait for processes that never come, or go on with too few.
    """
    expected, started = devices * nodes, process.world_size
    configured = f"trainer.devices × trainer.num_nodes = {devices} × {nodes} = {expected}"
    if process.launcher == "torchrun":
        if started != expected:
            local = process.local_world_size
            raise ConfigurationError(
                f"torchrun started {started} processes ({local} on this machine), but {configured}: add "
                f"trainer.devices={local} trainer.num_nodes={started // local}"
            )
    elif process.launcher == "srun":
        _check_tasks(process, devices, nodes, configured, environment)
    elif process.launcher == "environment":
        if started != expected:
            raise ConfigurationError(
                f"WORLD_SIZE={started} in the environment, but {configured}: where each variable counts processes, set "
                "these two keys to fit; where it counts machines, start torchrun on each; where it is left over from "
                "something else, unset RANK and WORLD_SIZE"
            )
        if "LOCAL_RANK" not in environment and devices > 1:
            raise ConfigurationError(
                f"RANK and WORLD_SIZE={started} without LOCAL_RANK in the environment, trainer.devices = {devices}: "
                "nobody says which device is whose; set LOCAL_RANK, or use torchrun"
            )
    elif process.launcher == "":
        _check_nobody_else(environment, configured, expected, devices, nodes)


def _check_tasks(process: Process, devices: int, nodes: int, configured: str, environment: Mapping[str, str]) -> None:
    started, local = process.world_size, process.local_world_size
    machines = started // local if local else 1
    if started != devices * nodes or machines != nodes:
        raise ConfigurationError(
            f"srun started {started} process{'' if started == 1 else 'es'} on {machines} "
            f"node{'' if machines == 1 else 's'}, but {configured}: add trainer.devices={local} "
            f"trainer.num_nodes={machines}, or ask Slurm for --nodes={nodes} --ntasks-per-node={devices}; in a shell "
            "that srun has opened, unset SLURM_STEP_ID SLURM_PROCID"
        )
    if started > 1 and "SLURM_NTASKS_PER_NODE" not in environment:
        raise ConfigurationError(
            f"the Slurm job asked for --ntasks={started}: write --nodes={nodes} --ntasks-per-node={devices} instead, "
            "so that the processes are spread as configured"
        )


def _check_nobody_else(
    environment: Mapping[str, str], configured: str, expected: int, devices: int, nodes: int
) -> None:
    tasks = environment.get("SLURM_NTASKS")
    in_batch_script = tasks is not None and "SLURM_STEP_ID" not in environment and not is_interactive(environment)
    if in_batch_script and (expected > 1 or tasks != "1"):
        raise ConfigurationError(
            f"{configured}, in a Slurm job of {tasks} task{'' if tasks == '1' else 's'}, but the program was not "
            f"started by srun. Put srun before it, with --nodes={nodes} --ntasks-per-node={devices} for the job "
            "(examples/mm/slurm/ has scripts), or start it with torchrun"
        )
    if tasks is None:
        for name in _MPI_SIZES:
            if environment.get(name, "1") != "1":
                raise ConfigurationError(
                    f"{name}={environment[name][:40]!r} in the environment: mpirun and its kin do not start this "
                    f"program's processes; use torchrun or srun, or unset {name} if it is left over"
                )


def _from_env(environment: Mapping[str, str], launcher: str, node: str, restart: int = 0) -> Process:
    size = _number(environment, "WORLD_SIZE", least=1)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", least=1, default=1, below=size + 1)
    return Process(
        rank=_number(environment, "RANK", below=size),
        world_size=size,
        local_rank=_number(
            environment, "LOCAL_RANK", default=0, below=local_size if launcher != "environment" else size
        ),
        local_world_size=local_size,
        node_rank=_number(environment, node, default=0, below=size),
        launcher=launcher,
        restart=restart,
    )


def _number(
    environment: Mapping[str, str], name: str, least: int = 0, default: int | None = None, below: int | None = None
) -> int:
    """A launcher's variable; without a default it has to be there."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is not None and text.isascii() and text.isdigit() and len(text) < 10:
        value = int(text)
        if value >= least and (below is None or value < below):
            return value
    wanted = f"a whole number from {least} on" if below is None else f"a whole number from {least} to {below - 1}"
    raise ConfigurationError(
        f"{name} = {'missing' if text is None else repr(text[:40])} in the environment: expected {wanted}, as the "
        "other variables of the launcher are there; unset them all if they are left over from another program"
    )
