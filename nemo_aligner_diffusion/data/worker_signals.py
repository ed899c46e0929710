"""Data workers outlive the signals of a batch system, so that the training process can save first."""

from __future__ import annotations

import os
import signal
import threading

_ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})


def leave_signals_to_the_parent(worker: int = 0) -> None:
    """For ``DataLoader(worker_init_fn=…)``: end at SIGTERM from the parent only; from anyone else take no notice.

    Slurm signals *every* process of a job step, and a terminal every process of its group. A worker that dies of it
    makes the training process raise in the middle of the very step that it wants to complete and save. A worker that
    ignored SIGTERM altogether could not be ended by its parent if it were stuck. So the signals are blocked, and a
    thread takes them and looks who sent them. A worker whose parent has died ends by itself, as torch's always do.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)

    def watch() -> None:
        while True:
            received = signal.sigwaitinfo(_ENDING)
            if received.si_signo == signal.SIGTERM and received.si_pid == parent:
                os._exit(0)

    threading.Thread(target=watch, name="signals", daemon=True).start()
