"""A real Slurm cluster of two nodes on this machine, in a folder of its own; nothing outside the folder is touched.

Slurm and munge come from the machine if they are installed, else as Debian packages, which are unpacked and not
installed: neither root nor a change to the system is needed. Ports are free ones, and the daemons end with the cluster.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NODES = ("n1", "n2")
PACKAGES = ("slurm-wlm", "munge")


class Unavailable(Exception):
    """Slurm can neither be found on this machine nor fetched."""


def fetch_slurm(folder: Path) -> Path:
    """Download Debian's packages of Slurm and munge, with the libraries this machine lacks, and unpack them.

    Args:
        folder: receives ``root/``; what is there already is used again.

    Raises:
        Unavailable: no ``apt``, or no package archive within reach.
    """
    root = folder / "root"
    if (folder / "complete").exists():
        return root
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise Unavailable("Slurm is not installed, and apt-get and dpkg are not here to fetch Debian's packages")
    for place in ("lists/partial", "cache/archives/partial", "packages", "root"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    # lists and cache of our own: no root needed, and the system's stay as they are
    apt = ["apt-get", "-q", "-o", f"Dir::State::lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}"]
    apt += ["-o", "APT::Sandbox::User=", "-o", "Acquire::Retries=3", "-o", "Debug::NoLocking=true"]
    _apt([*apt, "update"])
    listed = _apt([*apt, "install", "--no-install-recommends", "--yes", "--print-uris", *PACKAGES])
    names = re.findall(r"^'\S+' ([^_\s]+)_\S+\.deb ", listed, flags=re.MULTILINE)
    _apt([*apt, "download", *names], cwd=folder / "packages")
    for package in sorted((folder / "packages").glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)
    (folder / "complete").touch()
    return root


def _apt(command: list[str], cwd: Path | None = None) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{' '.join(command[:2])} … {command[-1]}: no end within {error.timeout:.0f} s") from None
    if result.returncode != 0:
        raise Unavailable(f"{' '.join(command[:2])} … {command[-1]} failed: {(result.stderr or result.stdout)[-500:]}")
    return result.stdout


class Cluster:
    """Two nodes ``n1`` and ``n2`` with 4 processors each; use it as a context manager.

    Partitions: ``low`` and ``grace``, whose jobs may be preempted, those of ``grace`` with a warning; ``high``,
    whose jobs preempt them.

    Args:
        folder: receives settings, state and logs.
        kill_wait: seconds between SIGTERM and SIGKILL, and of warning in ``grace``.

    Attributes:
        environment: for Slurm's commands and for jobs.
    """

    def __init__(self, folder: Path, kill_wait: int = 30) -> None:
        self.folder = folder
        self.kill_wait = kill_wait
        self._daemons: list[subprocess.Popen[bytes]] = []
        if shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("munged"):
            self._root = Path("/")
        else:
            self._root = fetch_slurm(folder.parent / "slurm-packages")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        if self._root != Path("/"):
            libraries = [place.parent for place in self._root.glob("usr/lib/*/slurm-wlm")]
            self._plugins: Path | None = libraries[0] / "slurm-wlm"
            self.environment["PATH"] = f"{self._root / 'usr/bin'}:{self.environment['PATH']}"
            paths = [str(libraries[0]), str(self._plugins), self.environment.get("LD_LIBRARY_PATH", "")]
            self.environment["LD_LIBRARY_PATH"] = ":".join(filter(None, paths))
        else:
            self._plugins = None

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, *command: str, check: bool = True) -> str:
        """Output of one of Slurm's commands. A controller without processor time drops connections: asked again."""
        for attempt in range(5):
            time.sleep(2 * attempt)
            result = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=120)
            transient = result.returncode < 0 or "Unable to contact" in result.stderr or "timed out" in result.stderr
            if not transient or command[0] == "sbatch":  # which may have been heard
                break
        if check and result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {result.returncode}: {result.stderr}{result.stdout}")
        return result.stdout

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says about it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def logs(self, lines: int = 25) -> str:
        """The end of what each daemon has said."""
        texts = []
        for file in sorted(self.folder.glob("output-*.log")):
            texts.append(f"--- {file.name}")
            texts += [line for line in file.read_text(errors="replace").splitlines() if "pmi" not in line][-lines:]
        return "\n".join(texts)

    def close(self) -> None:
        """Cancel all jobs, and end all daemons and whatever they have started."""
        if len(self._daemons) > 1 and self._daemons[1].poll() is None:  # the controller
            with contextlib.suppress(Exception):
                self.run("scancel", "--signal=KILL", "--user", str(os.getuid()), check=False)
                self.run("scancel", "--user", str(os.getuid()), check=False)
                self._wait_for(lambda: not self.run("squeue", "--noheader", check=False).strip(), 15, "the end of jobs")
        for daemon in reversed(self._daemons):
            if daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []
        self._end_leftovers()

    def _end_leftovers(self) -> None:
        """slurmstepd, and processes of jobs, outlive slurmd: they carry our SLURM_CONF in their environment."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)

    def _program(self, name: str) -> str:
        for place in (f"usr/sbin/{name}", f"usr/sbin/{name}-wlm"):
            if (self._root / place).exists():
                return str(self._root / place)
        found = shutil.which(name)
        if found is None:
            raise Unavailable(f"{name} is not on PATH")
        return found

    def _configure(self) -> None:
        folder = self.folder
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # munge wants a folder that others cannot write to
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        host, user = socket.gethostname(), _user()
        controller, first, second = _free_ports(3)
        settings: dict[str, Any] = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": controller,
            "FirstJobId": controller,  # job scripts make a port of it: no two clusters of a machine the same
            "MinJobAge": 86400,  # seconds that a job which is over stays known (against the manual, 0 means 2)
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            # A requeued job waits until the old start's credential is void: two minutes by default. A start that takes
            # longer than this on its way from the controller to the nodes is refused.
            "AuthInfo": f"socket={folder / 'munge.socket'},cred_expire=10",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool-%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "SlurmctldLogFile": folder / "slurmctld.log",
            "SlurmdLogFile": folder / "slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",  # no control groups, which containers lack
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SlurmdParameters": "config_overrides",  # the nodes have as many processors as we say
            "SchedulerParameters": "bf_interval=3,sched_interval=3",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "KillWait": self.kill_wait,
            "MessageTimeout": 60,  # for machines that have no processor time left
            "TCPTimeout": 30,
            "UnkillableStepTimeout": 600,
            "ReturnToService": 2,
        }
        if self._plugins is not None:
            settings["PluginDir"] = self._plugins
        node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=2000 State=UNKNOWN"
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [f"NodeName={name} Port={port} {node}" for name, port in zip(NODES, (first, second), strict=True)]
        lines += [
            "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=0 State=UP",
            f"PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime={self.kill_wait} State=UP",
            "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP",
        ]
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "cgroup.conf").write_text("")

    def _start(self) -> None:
        folder = self.folder
        munge = [f"--{what}-file={folder / f'munged.{what}'}" for what in ("pid", "log", "seed")]
        munge += [f"--key-file={folder / 'munge.key'}", f"--socket={folder / 'munge.socket'}", "--num-threads=2"]
        self._daemon(self._program("munged"), "--foreground", "--force", *munge)
        self._wait_for((folder / "munge.socket").exists, 60, "munged")
        self._daemon(self._program("slurmctld"), "-D", "-i")
        for node in NODES:
            self._daemon(self._program("slurmd"), "-D", "-N", node, "-d", self._program("slurmstepd"))
        self._wait_for(
            lambda: self.run("sinfo", "--noheader", "--format=%T %D", "-p", "low", check=False).strip() == "idle 2",
            120,
            "two idle nodes",
        )

    def _daemon(self, *command: str) -> None:
        log = open(self.folder / f"output-{len(self._daemons)}.log", "wb")  # noqa: SIM115
        with log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    env=self.environment,
                    cwd=self.folder,
                    start_new_session=True,  # a signal to the test's process group is the test's to answer
                    preexec_fn=_end_with_parent(),
                )
            )

    def _wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise RuntimeError(f"{what} did not come within {seconds:.0f} s\n{self.logs()}")
            time.sleep(0.2)


def _end_with_parent() -> Callable[[], None] | None:
    """Linux ends a daemon whose test was killed (prctl PR_SET_PDEATHSIG); looked up here, before the fork."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return lambda: prctl(1, signal.SIGTERM)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(number: int) -> list[int]:
    """Not of those that the kernel hands out by itself (from 32768 on): any connection might get it before its daemon.

    Nor of those that job scripts take for their processes (15000 to 24999).
    """
    found: list[int] = []
    for port in random.sample(range(25_000, 32_768), 1000):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            break
    return found
