"""The thread of each process that reports its position to rank 0, hears the verdict, and brings the process down."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

from nemo_aligner_diffusion.runtime.ending import leave, write_error_file
from nemo_aligner_diffusion.runtime.health import processes
from nemo_aligner_diffusion.runtime.health.lines import Line, call
from nemo_aligner_diffusion.runtime.health.messages import LONGEST_DETAILS, Fault, Member, Position
from nemo_aligner_diffusion.runtime.health.progress import Progress
from nemo_aligner_diffusion.runtime.process import Process

log = logging.getLogger(__name__)

_LINGER = 1.5  # seconds between verdict and end: the launcher must see the culprit's end first, and all hear of it
_LINGER_LATEST = 10.0  # that long where the culprit takes its time
_CLOSING_TIME = 60.0  # seconds that rank 0 gets for export and report where every rank has raised
_ANSWER_WITHIN = 30.0  # seconds; it takes one at most, but a busy machine's rank 0 may stand still for some
_OWNER_WITHIN = 3.0  # seconds that the rank whose error this is gets to say so, before launchers end it for our end
_SETTLED_WITHIN = 10.0  # seconds; a firewall may drop what is sent to rank 0
_NOT_OVER_WITHIN = 3.0  # seconds; who cannot reach rank 0 may just have come to a run that is ending
_STACK_LINES = 6


class HealthClient(threading.Thread):
    """Start it on every rank, rank 0 included.

    Args:
        process: this one.
        address, host: of rank 0's server.
        progress: what the main thread marks.
        interval: seconds between heartbeats.
        silence: seconds without a sign of life of rank 0 after which it counts as gone.
        on_fault: writes the verdict down; called on one rank, in this thread.
    """

    def __init__(
        self,
        process: Process,
        address: str,
        host: str,
        progress: Progress,
        interval: float,
        silence: float,
        on_fault: Callable[[Fault], None] | None = None,
    ) -> None:
        super().__init__(name="health client", daemon=True)
        self.process = process
        self._address = address, host
        self.progress = progress
        self.interval = interval
        self.silence = silence
        self.on_fault = on_fault
        self.member = Member(process.rank, socket.gethostname(), os.getpid(), process.local_rank)
        self.verdict: Fault | None = None
        self._members: dict[int, Member] = {}
        self._line: Line | None = None
        self._rank0 = Position()
        self._settled = threading.Event()  # connected, or given up
        self._closing = threading.Event()
        self._raised = threading.Event()
        self._answered = threading.Event()
        self._is_first: bool | None = None
        self._is_to_wait = False
        self._killed_before = processes.out_of_memory_kills()
        self._screen = os.dup(2)

    # for the main thread

    def settle(self) -> None:
        """Wait until rank 0 knows this rank. Then errors find everybody in touch, and no rank ends unheard.

        After seconds it goes on without.
        """
        self._settled.wait(_SETTLED_WITHIN)

    def failed(self, reason: str, details: str, exit_code: int, communication: bool, said: bool = False) -> bool:
        """The main thread has met an error. True: this rank is the first, and should print it.

        Does not return where another rank's fault explains the error: the process then ends here.

        Args:
            reason: in a line or a few.
            details: the traceback.
            exit_code: with which this process will end, and with it the others.
            communication: whether the error may come from another rank's end (a closed connection).
            said: it is another rank's, who has handed it on, and prints it.
        """
        if communication:
            _pause(10.0)  # the verdict that explains it comes within milliseconds and ends the process
        self._raised.set()
        if said:
            self._mute()
        if not self._settled.wait(1.0) or self._line is None:
            return self.verdict is None and not said
        position = vars(self.progress.position())
        content = {"reason": reason, "details": details[-LONGEST_DETAILS:], "exit_code": exit_code, "said": said}
        with contextlib.suppress(OSError):
            self._line.send("error", position=position, **content)
        self._answered.wait(_OWNER_WITHIN if said else _ANSWER_WITHIN)
        first = not said and (self.verdict is None if self._is_first is None else self._is_first)
        if not first:
            self._mute()
        return first

    def wait_for_rank_0(self) -> None:
        """After :meth:`failed`, before this process ends: all ranks may have raised, and rank 0 may be exporting."""
        if self._is_to_wait and self.process.rank != 0:
            self.join(_CLOSING_TIME)  # rank 0 says goodbye

    def close(self) -> None:
        """Goodbye: from here on this process is not missed."""
        self._closing.set()
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.send("bye")
                self._line.connection.shutdown(socket.SHUT_WR)  # rank 0 then closes the line, which ends the thread
        self.join(timeout=5.0)

    # the thread

    def run(self) -> None:
        try:
            self._line = self._connect()
            if self._closing.is_set():  # which took so long that this process has come to its end
                self._line.send("bye")
        except Exception as error:
            self._settled.set()
            if not self._closing.wait(_NOT_OVER_WITHIN) and not self._raised.is_set():
                log.warning("rank %d is not watched: %s", self.process.rank, error)
        self._settled.set()
        try:
            if self._line is not None:
                self._talk(self._line)
        finally:
            self._answered.set()
            if self._line is not None:
                self._line.close()
            os.close(self._screen)

    def _connect(self) -> Line:
        line, secret = call(*self._address)
        line.send("hello", secret=secret, member=vars(self.member))
        return line

    def _talk(self, line: Line) -> None:
        heard = looked = time.monotonic()
        due = 0.0
        while True:
            readable = wait([line.connection], max(due - time.monotonic(), 0.0))
            now = time.monotonic()
            if now - looked > self.silence / 2:  # this process was stopped: rank 0 may have spoken meanwhile
                heard += now - looked
                self.progress.slept(now - looked)
            looked = now
            if readable:
                messages = line.receive()
                if messages is None:
                    self._rank_0_is_gone("lost", "the process is gone; it closed its connection without a word")
                    return
                heard = now
                for message in messages:
                    if message["kind"] == "bye":
                        return
                    self._handle(message)
            elif now - heard > self.silence:
                self._rank_0_is_gone("silent", f"no sign of life for {now - heard:.0f} s, with its connection open")
                return
            if now >= due:
                due = now + self.interval
                with contextlib.suppress(OSError):  # why rank 0 has closed the line is still to be read
                    line.send("beat", position=vars(self.progress.position()))

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "alive":
            self._rank0 = Position.from_json(message["position"])
        elif kind == "members":
            members = map(Member.from_json, message["members"])
            self._members = {member.rank: member for member in members}
        elif kind == "answer":
            self._is_first, self._is_to_wait = bool(message["first"]), bool(message["wait"])
            self._answered.set()
        elif kind == "verdict":
            self._come_down(Fault.from_json(message["fault"]))

    def _rank_0_is_gone(self, kind: str, reason: str) -> None:
        if self._closing.is_set() or self.verdict is not None:
            return
        member = self._members.get(0, Member(0, "unknown", 0, 0))
        self._come_down(Fault(kind, member, f"last heard of in {self._rank0.place}", reason))

    def _come_down(self, fault: Fault) -> None:
        """Say it once a machine, write it down once, and end this process."""
        self.verdict = fault = self._looked_at(fault)
        spokesman, writer = self._is_spokesman(fault), self._is_writer(fault)
        if spokesman and not self._raised.is_set():
            with contextlib.suppress(OSError):
                os.write(self._screen, (self._words(fault) + "\n").encode())
        self._mute()  # what the libraries have to say about lost connections only hides the reason
        if writer and self.on_fault is not None:
            with contextlib.suppress(Exception):
                self.on_fault(fault)
        if spokesman:
            self._settle(fault)
        end, latest = time.monotonic() + _LINGER, time.monotonic() + _LINGER_LATEST
        while time.monotonic() < end:
            if self._raised.is_set() and fault.kind == "error":
                return  # the same error here: the main thread ends the process by itself
            if time.monotonic() < latest and self._is_closing(fault):
                end = time.monotonic() + _LINGER / 3
            time.sleep(0.02)
        if fault.kind != "error":
            write_error_file(fault.headline)
        leave(fault.exit_code)

    def _is_closing(self, fault: Fault) -> bool:
        """Whether a culprit of this machine that has raised is still there."""
        culprit = fault.culprit
        return fault.kind == "error" and culprit.host == self.member.host and processes.is_running(culprit.pid)

    def _is_spokesman(self, fault: Fault) -> bool:
        """One a machine; where the culprit itself has said it, only on the other machines."""
        if fault.kind == "error" and fault.culprit.host == self.member.host:
            return False
        here = [member.rank for member in self._members.values() if member.host == self.member.host]
        return self._is_lowest(here, fault)

    def _is_writer(self, fault: Fault) -> bool:
        return self._is_lowest(list(self._members) or [0], fault)

    def _is_lowest(self, ranks: list[int], fault: Fault) -> bool:
        """Whether this rank is the first of these that can still do something."""
        able = [rank for rank in ranks if rank != fault.culprit.rank or fault.kind in ("error", "hang", "slow")]
        return self.process.rank == min(able, default=self.process.rank)

    def _looked_at(self, fault: Fault) -> Fault:
        """With what this machine's kernel knows of the culprit, if it is a process of this machine."""
        culprit = fault.culprit
        more = []
        if culprit.host == self.member.host and culprit.pid and culprit.rank != self.process.rank:
            if fault.kind == "lost":
                more.append(processes.death_of(culprit.pid))
                if processes.out_of_memory_kills() > self._killed_before:
                    more.append("this machine's kernel has killed a process for want of memory meanwhile")
            elif fault.kind in ("silent", "hang"):
                more.append(processes.state_of(culprit.pid))
        return dataclasses.replace(fault, reason="; ".join([fault.reason, *filter(None, more)]))

    def _words(self, fault: Fault) -> str:
        lines = [fault.headline]
        if fault.details and fault.kind == "hang":
            lines += ["  its main thread, innermost call last:"]
            lines += [f"    {line}" for line in fault.details.splitlines()[-_STACK_LINES:]]
        lines += [f"  ending all {self.process.world_size} processes with exit code {fault.exit_code}"]
        return "\n".join(lines)

    def _settle(self, fault: Fault) -> None:
        """See to it that a culprit of this machine that can't end itself does end, and that torchrun knows why."""
        culprit = fault.culprit
        if culprit.host != self.member.host or culprit.rank == self.process.rank or not culprit.pid:
            return
        if fault.kind in ("lost", "silent"):
            write_error_file(fault.headline, culprit.local_rank)
        # a number that the kernel has given: it still has its connection open, so it is still this process's
        if fault.kind == "silent" and self._line is not None and self._line.is_by_kernel:
            with contextlib.suppress(OSError):
                if not processes.state_of(culprit.pid):  # it runs, but holds the interpreter: see faulthandler
                    os.kill(culprit.pid, signal.SIGUSR2)
                    _pause(0.5)
                os.kill(culprit.pid, signal.SIGKILL)

    def _mute(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
        os.close(null)


def _pause(seconds: float) -> None:
    """Sleep in pieces: after a standstill of the whole machine, others then have time before this process goes on."""
    for _ in range(round(seconds / 0.1)):
        time.sleep(0.1)
