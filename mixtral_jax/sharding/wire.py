"""Messages between processes: JSON objects, one a line, over TCP."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import socket
import threading
from collections.abc import Callable
from typing import BinaryIO

# What processes compare names every file of a checkpoint; a step of a server may hold the masks of
# thousands of rows (5.5 KB each for 32k tokens).
LONGEST_LINE = 1 << 24


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A server at the address that others call, if that is one of this machine.

    On all addresses where ``host`` is a name: this machine may resolve its own name to another
    address than others do; or where it is the address of a router in front.

    Raises:
        OSError: the port is taken.
    """
    if host == "localhost" or _is_address(host):
        try:
            return socket.create_server((host, port), backlog=backlog)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return socket.create_server(("", port), backlog=backlog)


def _is_address(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def sender(connection: socket.socket, lock: threading.Lock) -> Callable[[dict], None]:
    """Sends whole lines; that a peer is gone is found by reading, not here.

    What it returns raises ValueError for a message that the other side would not read.
    """

    def send(message: dict) -> None:
        line = json.dumps(message).encode() + b"\n"
        if len(line) > LONGEST_LINE:
            raise ValueError(f"message: expected at most {LONGEST_LINE} bytes, got {len(line)}")
        with lock, contextlib.suppress(OSError):
            connection.sendall(line)

    return send


def read(file: BinaryIO) -> dict | None:
    """The next JSON object, one a line; None at the end, or at anything else."""
    try:
        line = file.readline(LONGEST_LINE)
        message = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def is_hello(message: dict) -> bool:
    """Whether it is the first message of a process of ours."""
    rank, of = message.get("process"), message.get("of")
    return isinstance(rank, int) and isinstance(of, int) and 0 < rank < of
