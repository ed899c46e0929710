"""The watch over ranks, attacked: by callers who know nothing, by one who has stolen the secret, by another user."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_runtime_health import EXIT_CODE, PATIENCE, Run

from nemo_aligner_diffusion.runtime.health import server as health_server
from nemo_aligner_diffusion.runtime.health.lines import SECRET_VARIABLE, Line, call
from nemo_aligner_diffusion.runtime.health.messages import Fault, Position
from nemo_aligner_diffusion.runtime.health.server import HealthServer
from nemo_aligner_diffusion.runtime.health.verdict import Watch

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parent.parent


def wait_until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Watched:
    """A server with two ranks connected to it, each in this process, that waits for a third."""

    def __init__(self, one_node: bool) -> None:
        self.watch = Watch(3, 60.0)
        self.server = HealthServer(one_node, self.watch, 0.05)
        self.server.start()
        self.ranks = [self.join(rank) for rank in range(2)]
        wait_until(lambda: len(self.watch.ranks) == 2)

    def join(self, rank: int, pid: int = 4, host: str = "here", secret: str | None = None) -> Line:
        line, known = call(self.server.address, "127.0.0.1")
        member = {"rank": rank, "host": host, "pid": pid, "local_rank": rank}
        line.send("hello", secret=known if secret is None else secret, member=member)
        return line

    def stranger(self) -> socket.socket:
        kind, place, *_ = self.server.address.split()
        if kind == "tcp":
            return socket.create_connection(("127.0.0.1", int(place)), timeout=PATIENCE)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(f"\0{place}")
        return connection

    def still_works(self) -> bool:
        """Both ranks are there, and what one says arrives."""
        events = self.watch.ranks[1].position.events + 1
        self.ranks[1].send("beat", position=vars(Position(events=events)))
        wait_until(lambda: self.watch.ranks[1].position.events == events)
        return self.server.is_alive() and self.server._fault is None and len(self.watch.active) == 2


@pytest.fixture(params=[True, False], ids=["one machine", "by network"])
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    watched = Watched(request.param)
    yield watched
    for line in watched.ranks:
        line.close()
    watched.server.close()


HELLO = b'{"kind": "hello", "secret": "%s", "member": {"rank": %s, "host": "h", "pid": 1, "local_rank": 1}}\n'


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"kind": "error"}\n',
        b"[1]\n",
        b"7\n",
        b"[" * 100_000,
        b"[" * 2_000 + b"\n",
        b'{"kind": ' + b"[" * 2_000 + b"\n",
        b"x" * (1 << 21),
        HELLO % (b"guess", b"1"),
        HELLO % (b"\xc3\xbc", b"1"),
        HELLO % (b"", b"1e400"),
        HELLO % (b"", b"null"),
    ],
    ids=lambda said: f"{len(said)} {said[:24]!r}",
)
def test_a_stranger_is_turned_away(watched: Watched, said: bytes) -> None:
    with watched.stranger() as stranger, contextlib.suppress(ConnectionError):  # turned away while it still speaks
        stranger.sendall(said)
        if said.startswith(b"[" * 2_000) or said.endswith(b"\n"):
            while stranger.recv(100):
                pass
    assert watched.still_works()


def test_what_a_rank_sends_wrongly_ends_its_line_and_not_the_server(watched: Watched) -> None:
    watched.ranks[0].connection.sendall(b'{"kind": ' + b"[" * 200_000 + b"\n")
    wait_until(lambda: watched.server._fault is not None)
    assert watched.server.is_alive()
    wait_until(lambda: any(message["kind"] == "verdict" for message in watched.ranks[1].receive() or []))


@pytest.mark.alone
def test_callers_who_say_nothing_are_few_and_go(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_server, "_HELLO_WITHIN", 0.5)
    before = len(os.listdir("/proc/self/fd"))
    program = (  # in a process of its own, whose descriptors they are
        "import resource, socket, sys, time\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)\n"
        "kind, place = sys.argv[1:]\n"
        "tcp = kind == 'tcp'\n"
        "family, address = (socket.AF_INET, ('127.0.0.1', int(place))) if tcp else (socket.AF_UNIX, chr(0) + place)\n"
        "callers = [socket.socket(family) for _ in range(1100)]\n"
        "for caller in callers: caller.connect(address)\n"
        "print('called', flush=True)\n"
        "time.sleep(600)\n"
    )
    words = watched.server.address.split()[:2]
    with subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "called\n"
            assert watched.still_works()
            wait_until(lambda: len(watched.server._callers) == 0)
            assert len(os.listdir("/proc/self/fd")) <= before + health_server._MOST_CALLERS + watched.watch.world_size
        finally:
            process.kill()
    assert watched.still_works()


def test_a_stolen_secret_makes_nobody_a_rank_that_is_there(watched: Watched) -> None:
    forged = watched.join(1)
    with contextlib.suppress(ConnectionError):  # turned away already, at the greeting
        forged.send("error", position=vars(Position()), reason="forged", details="", exit_code=0, said=False)
        wait_until(lambda: forged.receive() is None)
    assert watched.still_works()


def test_nobody_is_heard_once_all_ranks_are_there(watched: Watched) -> None:
    """A secret that somebody has read in torch's store opens nothing then."""
    with watched.stranger() as stranger:
        last = watched.join(2)
        wait_until(lambda: watched.watch.is_complete)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(100) == b""
    wait_until(lambda: watched.server._listener.fileno() == -1)
    with pytest.raises(ConnectionError):
        watched.join(2)
    last.send("beat", position=vars(Position(events=7)))
    wait_until(lambda: watched.watch.ranks[2].position.events == 7)
    last.close()


def test_what_is_told_is_bounded_and_has_no_control_characters(watched: Watched) -> None:
    text = "\x1b[2J\x1b]0;owned\x07" + "x" * 10_000 + "\r\u202eend"
    position = {**vars(Position()), "phase": text}
    watched.ranks[1].send("error", position=position, reason=text, details=text * 20, exit_code=256, said=False)
    wait_until(lambda: watched.server._fault is not None)
    fault = watched.server._fault
    assert fault is not None
    heard: list[dict[str, Any]] = []
    while not heard:
        heard = [message for message in watched.ranks[0].receive() or [] if message["kind"] == "verdict"]
    for verdict in (fault, Fault.from_json(heard[0]["fault"])):
        for said in (verdict.headline, verdict.details, *verdict.places):
            assert all(character.isprintable() or character == "\n" for character in said)
            assert len(said) <= 60_000
        assert len(verdict.headline) < 5_000
        assert verdict.exit_code == 1  # 256 would be 0 to the shell


def test_a_process_number_is_the_kernels_or_none() -> None:
    one = Watched(one_node=True)
    assert one.watch.ranks[1].member.pid == os.getpid()  # whatever it has said
    one.server.close()


# A rank whose server, over the network, says that rank 1 is silent, and that its process is the one given.
COME_DOWN = f"""
import os, socket, sys
sys.path.insert(0, {str(ROOT)!r})
from nemo_aligner_diffusion.runtime.health.client import HealthClient
from nemo_aligner_diffusion.runtime.health.messages import Fault, Member
from nemo_aligner_diffusion.runtime.health.progress import Progress
from nemo_aligner_diffusion.runtime.process import Process
from nemo_aligner_diffusion.runtime.settings import FaultToleranceSettings
listener = socket.create_server(("127.0.0.1", 0))
address = f"tcp {{listener.getsockname()[1]}} s"
client = HealthClient(Process(2, 3, 0, 1), address, "127.0.0.1", Progress(FaultToleranceSettings()), 1, 60)
client.start()
connection, _ = listener.accept()
import json
culprit = {{"rank": 1, "host": socket.gethostname(), "pid": int(sys.argv[1]), "local_rank": 1}}
own = {{"rank": 2, "host": socket.gethostname(), "pid": os.getpid(), "local_rank": 2}}
for message in (
    {{"kind": "members", "members": [culprit, own]}},
    {{"kind": "verdict", "fault": Fault("silent", Member(**culprit), "data", "silent").to_json()}},
):
    connection.sendall(json.dumps(message).encode() + b"\\n")
client.join(60)
"""


def test_a_process_number_that_came_over_the_network_is_never_signalled() -> None:
    with subprocess.Popen(["sleep", "600"]) as victim:
        try:
            done = subprocess.run([sys.executable, "-c", COME_DOWN, str(victim.pid)], capture_output=True, text=True)
            assert done.returncode == EXIT_CODE
            assert "error on rank 1" in done.stderr
            assert victim.poll() is None
        finally:
            victim.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_not_heard() -> None:
    watched = Watched(one_node=True)
    program = (
        "import os, socket, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "caller = socket.socket(socket.AF_UNIX)\n"
        "caller.connect(chr(0) + sys.argv[1])\n"
        f"caller.sendall({HELLO % (b'', b'1')!r})\n"
        "print(caller.recv(100))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, watched.server.address.split()[1]], capture_output=True, text=True
    )
    assert done.stdout == "b''\n" or "Broken" in done.stderr or "reset" in done.stderr
    assert watched.still_works()
    watched.server.close()


def test_the_secret_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "of this job")
    watched = Watched(one_node=False)
    assert watched.server.address.split()[:1] == ["tcp"]
    assert len(watched.server.address.split()) == 2  # and is told to nobody
    assert watched.join(1, secret="").receive() in ([], None)
    assert watched.still_works()
    watched.server.close()


def test_ranks_of_several_machines_are_watched_over_the_network(tmp_path: Path) -> None:
    with Run("wait, by network", tmp_path) as run:
        run.all_work()
        assert (tmp_path / "address").read_text().startswith("tcp ")
        run.processes[1].send_signal(signal.SIGKILL)
        assert run.codes() == [EXIT_CODE, -signal.SIGKILL, EXIT_CODE]
    assert run.text().startswith("error on rank 1 ")
