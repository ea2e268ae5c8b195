"""Starts one command as several processes on this machine, as a cluster would."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.environ import without_devices

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    stdout: str
    stderr: str


def free_port() -> int:
    """A port such that it and the next one are free."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def start(
    arguments: Sequence[str],
    *,
    count: int = 2,
    timeout: float = 10.0,
    own: Mapping[int, Sequence[str]] | None = None,
) -> list:
    """Starts ``python ARGUMENTS`` ``count`` times with the three flags, and what one has of its
    ``own`` after them; nobody gets the devices that the tests simulate for themselves."""
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable,
                *arguments,
                f"--coordinator=127.0.0.1:{port}",
                f"--num-processes={count}",
                f"--process-id={rank}",
                f"--peer-timeout={timeout}",
                *(own or {}).get(rank, ()),
            ],
            cwd=ROOT,
            env=without_devices(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(processes: Sequence[subprocess.Popen], *, seconds: float = 120) -> list[Ended]:
    """Waits for all of them; none outlives the test."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, *o) for p, o in zip(processes, outputs, strict=True)]


def run(arguments: Sequence[str], *, count: int = 2) -> list[Ended]:
    """Starts and waits; all must end well."""
    ended = finish(start(arguments, count=count))
    for process in ended:
        assert process.code == 0, process.stderr
    return ended
