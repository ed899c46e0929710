"""The sockets between rank 0's health server and the ranks, and who may speak on them.

On one machine they are Unix sockets, and the kernel says whose process is at the other end: no other user is heard,
there is no secret to steal, and process numbers are the kernel's. Between machines they are TCP connections: a caller
has to know the run's secret (``NAD_WATCH_SECRET`` where the launcher's environment has one, else what rank 0 has put
into torch's store, which everybody who reaches that can read), and no process number that comes over them is signalled.
Either way nobody is heard any more once all ranks are there.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import struct
import sys
import threading
import weakref
from typing import Any

SECRET_VARIABLE = "NAD_WATCH_SECRET"
LONGEST_HELLO = 2_048  # bytes of a line before its sender is known
LONGEST_LINE = 1 << 20  # afterwards: a traceback, written as JSON
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred, unix(7)
_SECONDS = 5.0  # to send or receive what is there


def listen(one_node: bool) -> tuple[socket.socket, str, str]:
    """A socket, where it is (for :func:`call`), and the secret that callers must know; empty: none is needed."""
    if one_node and sys.platform == "linux":
        listener = socket.socket(socket.AF_UNIX)
        name = f"nad-watch-{secrets.token_hex(8)}"
        listener.bind(f"\0{name}")  # without a file: nothing to clean up after a process that was killed
        listener.listen(1024)
        return listener, f"unix {name}", ""
    listener = socket.create_server(("127.0.0.1" if one_node else "", 0), backlog=1024)
    secret, port = os.environ.get(SECRET_VARIABLE, ""), listener.getsockname()[1]
    if secret:
        return listener, f"tcp {port}", secret
    secret = secrets.token_hex(16)
    return listener, f"tcp {port} {secret}", secret


def call(address: str, host: str) -> tuple[Line, str]:
    """A line to the server at ``address``, and the secret to say.

    Args:
        host: of rank 0.

    Raises:
        OSError: nobody is there, or another user.
    """
    kind, place, *given = address.split()
    if kind == "tcp":
        line = Line(socket.create_connection((host, int(place)), timeout=60.0))
        return line, given[0] if given else os.environ.get(SECRET_VARIABLE, "")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"\0{place}")  # without a time limit it waits where others crowd the server
    line = Line(connection)
    if not line.is_own_user:
        line.close()
        raise PermissionError("another user's process is at the place of rank 0's server")
    return line, ""


def knows(secret: str, said: Any) -> bool:
    """Whether a caller has said the secret."""
    return hmac.compare_digest(str(said).encode(), secret.encode())


class Line:
    """A socket that carries one JSON object a line. Any thread may send; one receives.

    Attributes:
        is_by_kernel: whether the kernel says whose process is at the other end; then
        pid: is that process's, 0 if it is in another container, and
        is_own_user: whether it is this user's.
        longest: bytes that a line may have.
    """

    def __init__(self, connection: socket.socket, longest: int = LONGEST_LINE) -> None:
        connection.settimeout(_SECONDS)
        self.connection = keep_from_children(connection)
        self.longest = longest
        self.is_by_kernel = connection.family == socket.AF_UNIX
        self.pid, self.is_own_user = 0, True
        self._received = b""
        self._sending = threading.Lock()
        if self.is_by_kernel:
            option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self.pid, uid, _ = _CREDENTIALS.unpack(option)
            self.is_own_user = uid == os.geteuid()

    def send(self, kind: str, **content: Any) -> None:
        """Raises OSError where the other side is gone or does not read."""
        with self._sending:
            self.connection.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived, once the socket is readable; None: the other side is gone, or talks something else."""
        try:
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or max(map(len, [*lines, self._received])) > self.longest:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.connection.close()


_own: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def keep_from_children(connection: socket.socket) -> socket.socket:
    """Have it closed in forked children (data workers), which would hold it open beyond this process's end."""
    _own.add(connection)
    return connection


def _let_go() -> None:
    for connection in list(_own):
        connection.close()


os.register_at_fork(after_in_child=_let_go)
