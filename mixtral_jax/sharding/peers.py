"""Signs of life between the processes of one command.

What jax does by itself when a process is lost is to hang in a collective, or to abort. So every
process keeps a TCP connection to process 0, a thread sends a beat every second, and process 0 tells
all who is lost, who then end with exit code 76. Three ways to be lost:

gone    its connection ended without a goodbye (killed), or its goodbye gave another code than 0;
silent  no beat for ``timeout`` seconds (stopped, or its host is gone);
stuck   it beats, but the others wait for it in a step: it is behind for ``timeout`` seconds without
        using the CPU, or for ``PATIENCE`` times as long while it does (a compilation is no fault).

Messages are JSON lines. Nothing in here knows of jax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from mixtral_jax.errors import PEER_LOST, MixtralError

BEAT_SECONDS = 1.0
PATIENCE = 60  # a busy process may be behind so many timeouts
_BUSY = 0.2  # share of one core above which a process counts as working
_LONGEST_LINE = 4096
_OWN_END_SECONDS = 4.0  # a fault that all meet ends each with its own line and code


def end_process(line: str) -> None:
    """One line and exit code 76, at once: the main thread may be inside a collective."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(PEER_LOST)


@dataclasses.dataclass
class _Peer:
    """What process 0 knows of a process.

    ``changed`` is when its steps last changed; ``busy`` whether it used the CPU (``cpu`` seconds
    so far) in a window of time that ended at ``looked``.
    """

    name: str
    send: Callable[[dict], None]
    heard: float
    steps: int = 0
    cpu: float = 0.0
    changed: float = 0.0
    looked: float = 0.0
    cpu_then: float = 0.0
    busy: bool = True
    has_left: bool = False

    def __post_init__(self):
        self.changed = self.looked = self.heard


class Peers:
    """This process among its peers.

    Args:
        host: of process 0.
        port: that process 0 listens on.
        num_processes: of them all.
        process_id: of this one.
        timeout: seconds of silence after which a process is given up.
        lost: called in a thread, once, with the line that says who is lost.
    """

    def __init__(
        self,
        host: str,
        port: int,
        num_processes: int,
        process_id: int,
        *,
        timeout: float,
        lost: Callable[[str], None] = end_process,
    ):
        self.num_processes, self.process_id, self.timeout = num_processes, process_id, timeout
        self._address, self._lost = (host, port), lost
        self._steps = 0
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._passed = threading.Condition()  # guards _open_barriers
        self._open_barriers: set[str] = set()
        self._arrived: dict[str, set[int]] = {}
        self._peers: dict[int, _Peer] = {}
        self._all_joined = threading.Event()
        self._verdict: str | None = None
        self._has_left = self._first_has_left = False
        self._heard_first = time.monotonic()
        self._to_first: socket.socket | None = None
        self._sockets: list[socket.socket] = []

    def join(self, seconds: float) -> None:
        """Meets the others.

        Raises:
            MixtralError: exit code 76 if some do not come in time, naming them.
        """
        until = time.monotonic() + seconds
        if self.process_id == 0:
            self._listen()
        else:
            self._connect(until)
        while not self._all_joined.wait(0.2):
            if time.monotonic() > until:
                raise self._missing(seconds)
        if self.process_id == 0:
            for peer in self._others():
                peer.send({"all": True})
        self._thread(self._beat)

    def _missing(self, seconds: float) -> MixtralError:
        if self.process_id != 0:
            what = "the other processes did not all come"
        else:
            ranks = set(range(1, self.num_processes)) - self._peers.keys()
            what = f"process {', '.join(map(str, sorted(ranks)))} did not come"
        fix = f"start all {self.num_processes} with one --coordinator"
        return MixtralError(f"{what} within {seconds:.0f} s", fix=fix, code=PEER_LOST)

    def step(self) -> None:
        """Says that this process starts the next step that all must take."""
        self._steps += 1

    def barrier(self, name: str) -> None:
        """Waits until every process has come to the barrier of this name."""
        if self.process_id == 0:
            self._arrive(name, 0)
        else:
            self._tell({"at": name})
        with self._passed:
            self._passed.wait_for(lambda: name in self._open_barriers)

    def leave(self, code: int) -> None:
        """Says goodbye with an exit code; anything but 0 ends the others too."""
        self._has_left = True
        if self.process_id != 0:
            self._tell({"bye": code})
            return
        for peer in self._others():
            peer.send({"bye": code})

    def close(self) -> None:
        """Ends all connections; nobody is lost by that any more."""
        self._has_left = True
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def wait_for_others(self) -> None:
        """On process 0: waits until all others have left."""
        while self._others():
            time.sleep(0.05)

    def _others(self) -> list[_Peer]:
        with self._lock:
            return [peer for rank, peer in self._peers.items() if rank and not peer.has_left]

    @staticmethod
    def _thread(work: Callable, *args: object) -> None:
        threading.Thread(target=work, args=args, daemon=True, name="mixtral_jax peers").start()

    def _state(self) -> dict:
        return {"steps": self._steps, "cpu": time.process_time()}

    # Process 0.

    def _listen(self) -> None:
        try:
            server = socket.create_server(("", self._address[1]), backlog=self.num_processes)
        except OSError as error:
            raise MixtralError(
                f"port {self._address[1]} (the coordinator's + 1) cannot be listened on: {error}",
                fix="choose another port for --coordinator",
            ) from None
        now = time.monotonic()
        self._peers[0] = _Peer(
            socket.gethostname(), lambda message: None, now, changed=now, looked=now
        )
        self._thread(self._accept, server)

    def _accept(self, server: socket.socket) -> None:
        with server:
            self._sockets.append(server)
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                self._thread(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        """Reads what one process says until it leaves."""
        with connection, connection.makefile("rb") as file:
            self._sockets.append(connection)
            hello = _read(file)
            rank = None if hello is None else hello.get("process")
            known = isinstance(rank, int) and 0 < rank < self.num_processes
            if hello is None or not known or hello.get("of") != self.num_processes:
                rank = None
            if rank is None or not self._admit(rank, connection, str(hello and hello.get("host"))):
                _sender(connection, self._sending)({"refused": True})
                return
            self._follow_peer(rank, file)

    def _admit(self, rank: int, connection: socket.socket, host: str) -> bool:
        now = time.monotonic()
        with self._lock:
            if rank in self._peers:
                return False
            send = _sender(connection, self._sending)
            self._peers[rank] = _Peer(host, send, now)
            if len(self._peers) == self.num_processes:
                self._all_joined.set()
        return True

    def _follow_peer(self, rank: int, file: BinaryIO) -> None:
        peer = self._peers[rank]
        while (message := _read(file)) is not None:
            peer.heard = time.monotonic()
            if "steps" in message:
                self._note(peer, message)
            if "at" in message:
                self._arrive(str(message["at"]), rank)
            if "bye" in message:
                peer.has_left = True
                if message["bye"] != 0:
                    time.sleep(_OWN_END_SECONDS)
                    self._judge(rank, f"ended with exit code {message['bye']}")
        if not (peer.has_left or self._has_left):
            self._judge(rank, "is gone (its connection ended)")

    @staticmethod
    def _note(peer: _Peer, state: dict) -> None:
        peer.cpu = state["cpu"]
        if state["steps"] != peer.steps:
            peer.steps, peer.changed = state["steps"], time.monotonic()

    def _look(self, peer: _Peer, now: float) -> None:
        """Every quarter of the timeout: has it used the CPU since the last look?"""
        if now - peer.looked >= self.timeout / 4:
            peer.busy = peer.cpu - peer.cpu_then > _BUSY * (now - peer.looked)
            peer.looked, peer.cpu_then = now, peer.cpu

    def _arrive(self, name: str, rank: int) -> None:
        with self._lock:
            arrived = self._arrived.setdefault(name, set())
            arrived.add(rank)
            if len(arrived) < self.num_processes:
                return
        for peer in self._others():
            peer.send({"open": name})
        self._open(name)

    def _open(self, name: str) -> None:
        with self._passed:
            self._open_barriers.add(name)
            self._passed.notify_all()

    def _check(self) -> None:
        now = time.monotonic()
        self._note(self._peers[0], self._state())
        self._peers[0].heard = now
        staying = {rank: p for rank, p in self._peers.items() if not p.has_left}
        furthest = max(peer.steps for peer in staying.values())
        arrived_there = [p.changed for p in staying.values() if p.steps == furthest]
        for rank, peer in staying.items():
            self._look(peer, now)
            if now - peer.heard > self.timeout:
                self._judge(rank, f"is silent for {now - peer.heard:.0f} s")
            elif peer.steps < furthest:
                behind = now - max(peer.changed, min(arrived_there))
                if behind > self.timeout * (PATIENCE if peer.busy else 1):
                    where = f"step {peer.steps}, where others began step {furthest}"
                    self._judge(rank, f"is stuck after {where} {behind:.0f} s ago")

    def _judge(self, rank: int, fault: str) -> None:
        """Tells everybody who is lost, then ends this process."""
        line = f"process {rank} ({self._peers[rank].name}) {fault}"
        with self._lock:
            if self._verdict is not None:
                return
            self._verdict = line
        for peer in self._others():
            peer.send({"lost": line})
        self._end(line)

    def _end(self, line: str) -> None:
        self._lost(f"{line}; fix: look at its own output, then start all processes again")

    # The others.

    def _connect(self, until: float) -> None:
        while True:
            try:
                connection = socket.create_connection(self._address, timeout=5)
                break
            except OSError as error:
                if time.monotonic() > until:
                    host, port = self._address
                    what = f"process 0 does not answer at {host}:{port} ({error})"
                    fix = "start all processes with the address of process 0 as --coordinator"
                    raise MixtralError(what, fix=fix, code=PEER_LOST) from None
                time.sleep(0.2)
        connection.settimeout(None)
        self._to_first = connection
        hello = {"process": self.process_id, "of": self.num_processes}
        self._tell({**hello, "host": socket.gethostname()})
        self._sockets.append(connection)
        self._thread(self._follow_first, connection)

    def _follow_first(self, connection: socket.socket) -> None:
        """Reads what process 0 says until it leaves."""
        with connection, connection.makefile("rb") as file:
            self._read_first(file)

    def _read_first(self, file: BinaryIO) -> None:
        while (message := _read(file)) is not None:
            self._heard_first = time.monotonic()
            if "all" in message:
                self._all_joined.set()
            if "open" in message:
                self._open(str(message["open"]))
            if "lost" in message:
                self._end(str(message["lost"]))
            if "refused" in message:
                what = f"process 0 refused process {self.process_id} of {self.num_processes}"
                self._lost(f"{what}; fix: give each process its own --process-id")
            if "bye" in message:
                self._first_has_left = True
                if message["bye"] != 0:
                    time.sleep(_OWN_END_SECONDS)
                    self._end(f"process 0 ended with exit code {message['bye']}")
        if not self._first_has_left and not self._has_left:
            self._end(f"process 0 ({self._address[0]}) is gone (its connection ended)")

    def _tell(self, message: dict) -> None:
        assert self._to_first is not None
        _sender(self._to_first, self._sending)(message)

    def _beat(self) -> None:
        while not self._has_left:
            if self.process_id == 0:
                for peer in self._others():
                    peer.send({"beat": True})
                self._check()
            else:
                self._tell(self._state())
                silent = time.monotonic() - self._heard_first
                if silent > self.timeout and not self._first_has_left:
                    self._end(f"process 0 ({self._address[0]}) is silent for {silent:.0f} s")
            time.sleep(BEAT_SECONDS)


def _sender(connection: socket.socket, lock: threading.Lock) -> Callable[[dict], None]:
    """Sends whole lines; that a peer is gone is found by reading, not here."""

    def send(message: dict) -> None:
        with lock, contextlib.suppress(OSError):
            connection.sendall(json.dumps(message).encode() + b"\n")

    return send


def _read(file: BinaryIO) -> dict | None:
    """The next JSON object, one a line; None at the end, or at anything else."""
    try:
        line = file.readline(_LONGEST_LINE)
        message = json.loads(line) if line.endswith(b"\n") else None
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
