"""The Slurm job that this run belongs to: its processes, its state, and going back into the queue. Imports no torch.

A job that is still RUNNING when its checkpoint is on disk asks to be put back (``scontrol requeue``); one that Slurm
has put back already only ends; and one that was cancelled is not brought back to life. Which signals come when:
``docs/slurm.md``.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nemo_aligner_diffusion.runtime.process import is_interactive
from nemo_aligner_diffusion.runtime.settings import RequeueSettings, RunDirectorySettings

log = logging.getLogger(__name__)

# sysexits.h EX_TEMPFAIL, "try again later": asks the job script to requeue, where scontrol is not at hand (containers).
EXIT_REQUEUE = 75
STARTS_WITHOUT_PROGRESS = 3
# Its processes are there. SIGNALING: Slurm sends SIGCONT before a warning, and a node has not answered to it yet.
# STOPPED: after SIGSTOP (scancel --signal=STOP), until a SIGCONT is answered.
_AT_WORK = ("RUNNING", "SIGNALING", "STOPPED")
_SECONDS = 30  # for one call of scontrol
_TRANSIENT = ("Unable to contact", "timed out", "Zero Bytes", "Socket", "Communication", "Connection")
_PAUSES = (0, 2, 5)  # before each attempt: a controller under load refuses now and then


@dataclass(frozen=True)
class JobState:
    """What ``scontrol show job`` says.

    Attributes:
        state: such as ``RUNNING``; ``COMPLETING`` while processes are being ended, for whatever reason.
        restarts: how many times the job has been put back into the queue so far.
        may_requeue: it was submitted with ``--requeue``, or the cluster does so by default (``JobRequeue=1``).
        is_batch: submitted with ``sbatch``; others cannot be put back.
        preempted: the nodes are wanted by another job.
    """

    state: str
    restarts: int
    may_requeue: bool
    is_batch: bool
    preempted: bool


@dataclass(frozen=True)
class SlurmJob:
    """A job as its processes see it.

    Attributes:
        job_id: as ``scontrol`` takes it; ``<array>_<task>`` in an array.
        restarts: how many times it had been put back into the queue when this process started.
        nodes: such as ``dgx[01-04]``.
    """

    job_id: str
    restarts: int = 0
    nodes: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> SlurmJob | None:
        """The job of this process; None outside Slurm and in an interactive shell."""
        job = environment.get("SLURM_JOB_ID")
        if not job or is_interactive(environment):
            return None
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return cls(
            # the number of an array's last task is the array's own, which would put back all of them
            job_id=f"{array}_{task}" if array and task else job,
            restarts=int(environment.get("SLURM_RESTART_COUNT") or 0),
            nodes=environment.get("SLURM_JOB_NODELIST", ""),
        )

    def state(self) -> JobState:
        """Ask Slurm.

        Raises:
            FileNotFoundError: there is no ``scontrol`` here, as in most containers.
            OSError: Slurm did not answer.
        """
        text = _scontrol("show", "job", "--oneliner", self.job_id)
        fields = dict(re.findall(r"(\w+)=(\S*)", text))
        return JobState(
            state=fields.get("JobState", ""),
            restarts=int(fields.get("Restarts") or 0),
            may_requeue=fields.get("Requeue") == "1",
            is_batch=fields.get("BatchFlag") == "1",
            preempted=fields.get("PreemptTime", "None") not in ("None", "(null)", ""),
        )

    def requeue(self) -> None:
        """Put the job back into the queue; Slurm then ends all of its processes.

        Raises:
            OSError: as for :meth:`state`.
        """
        _scontrol("requeue", self.job_id)

    def is_running(self) -> bool | None:
        """Whether it has processes at this moment; None if that cannot be found out."""
        try:
            return self.state().state in (*_AT_WORK, "COMPLETING", "SUSPENDED")
        except FileNotFoundError:
            return None
        except OSError as error:
            return False if "Invalid job id" in str(error) else None  # long over, and forgotten


class Requeue:
    """What follows when a run in a Slurm job ends before its time: back into the queue, or not.

    Args:
        job: of this run.
        is_writer: whether this is rank 0, which alone talks to Slurm.
        on_max_time: also after ``exp_manager.max_time_per_run``.
    """

    def __init__(self, job: SlurmJob, is_writer: bool = True, on_max_time: bool = False) -> None:
        self.job = job
        self.is_writer = is_writer
        self.on_max_time = on_max_time
        self._exit_code: int | None = None

    @classmethod
    def for_this_run(cls, section: RequeueSettings, directory: RunDirectorySettings, is_writer: bool) -> Requeue | None:
        """None outside Slurm, and where the configuration does not let the run continue by itself."""
        job = SlurmJob.from_environment(os.environ)
        if job is None or not section.requeue_on_preemption:
            return None
        lacking = [key for key in ("resume_if_exists", "resume_ignore_no_checkpoint") if not getattr(directory, key)]
        if lacking:
            if is_writer:
                log.info(
                    "Slurm job %s: will not be put back into the queue when preempted, since a new start could not "
                    "continue it; for that add %s",
                    job.job_id,
                    " ".join(f"exp_manager.{key}=True" for key in lacking),
                )
            return None
        if is_writer:
            again = f", restarted {job.restarts} time{'' if job.restarts == 1 else 's'}" if job.restarts else ""
            log.info("Slurm job %s on %s%s", job.job_id, job.nodes, again)
        return cls(job, is_writer, section.requeue_on_max_time)

    def leave(
        self,
        reason: str,
        record: Callable[[], None] = lambda: None,
        steps: Sequence[int | None] | None = None,
    ) -> bool:
        """Put the job back into the queue unless Slurm has done so, or must not. On rank 0; others return True.

        Args:
            reason: why the run ends, for the log: ``SIGUSR1`` …
            record: writes down that the run was interrupted; called before Slurm ends this process.
            steps: optimizer steps at the end of the starts before this one and of this one, oldest first; None: it had
                not come to training yet.

        Returns:
            Whether the run goes on in a new start; False: it ends here, and is to be completed as if it were done.
        """
        if not self.is_writer:
            self._exit_code = 0
            return True
        job, state = self.job, None
        try:
            state = job.state()
            refusal = _refusal(state, job, reason, steps)
        except FileNotFoundError:  # no scontrol, as in most containers: the job script is asked
            refusal = "" if reason == "SIGTERM" else _no_progress(steps)
        except (OSError, ValueError) as error:
            refusal = f"its state is unknown: {error}"
        if refusal:
            log.warning("%s: job %s is not put back into the queue: %s", reason, job.job_id, refusal)
            return False
        record()
        if state is None:
            log.warning(
                "%s: scontrol is not at hand here, so exit status %d asks the job script to requeue job %s",
                *(reason, EXIT_REQUEUE, job.job_id),
            )
            self._exit_code = EXIT_REQUEUE
            return True
        who = "Slurm has put"
        if state.restarts <= job.restarts:
            who = "put"
            try:
                job.requeue()
            except OSError as error:
                log.warning("%s: job %s could not be put back into the queue: %s", reason, job.job_id, error)
                return False
        log.info("%s: %s job %s back into the queue; the next start resumes", reason, who, job.job_id)
        self._exit_code = 0
        return True

    def exit_code(self, otherwise: int) -> int:
        """0 where the job goes on (``srun --kill-on-bad-exit`` shall not end a rank that is still at work), or 75."""
        return otherwise if self._exit_code is None else self._exit_code


def _refusal(state: JobState, job: SlurmJob, reason: str, steps: Sequence[int | None] | None) -> str:
    """Why a job must not be put back; empty if it may be, or has been already by Slurm."""
    if state.restarts > job.restarts:
        return ""
    if state.state not in _AT_WORK:
        return f"it is {state.state}: cancelled, or at its time limit (sbatch --signal=USR1@120 warns before it)"
    if not state.is_batch:
        return "it was not submitted with sbatch"
    if not state.may_requeue:
        return "it was submitted without --requeue"
    if reason == "SIGTERM" or state.preempted:
        return ""  # preempted, however often: it is not the job's fault
    return _no_progress(steps)


def _no_progress(steps: Sequence[int | None] | None) -> str:
    """Why another start would get no further than this one; empty if it may."""
    if steps is None:
        return "its time limit is too short: training had not even begun"
    recent = list(steps)[-STARTS_WITHOUT_PROGRESS:]
    if len(recent) == STARTS_WITHOUT_PROGRESS and len(set(recent)) == 1:
        return f"its time limit is too short: {len(recent)} starts in a row ended at step {recent[0]}"
    return ""


def _scontrol(*arguments: str) -> str:
    program = shutil.which("scontrol")
    if program is None:
        raise FileNotFoundError("scontrol is not on PATH")
    error = ""
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            result = subprocess.run(
                [program, *arguments],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            error = f"scontrol {arguments[0]} did not answer within {_SECONDS} s"
            continue
        if result.returncode == 0:
            return result.stdout
        error = result.stderr.strip() or f"scontrol {arguments[0]} ended with status {result.returncode}"
        # a busy controller drops connections; seen: scontrol then dies of SIGPIPE without a word
        if result.returncode > 0 and not any(text in error for text in _TRANSIENT):
            break
    raise OSError(error)
