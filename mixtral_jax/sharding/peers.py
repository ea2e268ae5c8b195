"""Signs of life between the processes of one command.

What jax does by itself when a process is lost is to hang in a collective, or to abort. So every
process keeps a TCP connection to process 0, a thread sends a beat every second, and process 0 tells
all who is lost, who then end with exit code 76. Three ways to be lost:

gone    its connection ended without a goodbye (killed), or its goodbye gave another code than 0;
silent  no beat for ``timeout`` seconds (stopped, or its host is gone);
stuck   it beats, but the others wait for it in a step or at a barrier, and it does nothing
        (signs.py).

Before that they agree: at a barrier each says what it is about to do (agreement.py), and where one
differs from process 0 all are refused, with exit code 64. Messages are those of wire.py.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from mixtral_jax.errors import PEER_LOST, USAGE, MixtralError
from mixtral_jax.sharding.agreement import FIX, Facts, difference
from mixtral_jax.sharding.signs import Peer, Work, find_lost
from mixtral_jax.sharding.wire import is_hello, listen, read, sender

BEAT_SECONDS = 1.0
_OWN_END_SECONDS = 4.0  # a fault that all meet ends each with its own line and code


def end_process(line: str) -> None:
    """One line and exit code 76, at once: the main thread may be inside a collective."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(PEER_LOST)


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
        self._steps, self._place, self._work = 0, "the start", Work()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._passed = threading.Condition()  # guards _opened and _refusal
        self._barriers = self._opened = 0  # come to, and open
        self._refusal: str | None = None
        self._arrived: dict[int, dict[int, Facts]] = {}  # by barrier and process
        self._first_is_excused = False
        self._peers: dict[int, Peer] = {}
        self._all_joined = threading.Event()
        self._verdict: str | None = None
        self._has_left = self._first_has_left = False
        self._heard_first = time.monotonic()
        self._to_first: socket.socket | None = None
        self._orders: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self._sockets: list[socket.socket] = []

    def join(self, seconds: float) -> None:
        """Meets the others.

        Raises:
            MixtralError: exit code 76 if some do not come in time, naming them; 64 if some were
                started as others of another number.
        """
        until = time.monotonic() + seconds
        if self.process_id == 0:
            self._listen()
        else:
            self._connect(until)
        while not self._all_joined.wait(0.2):
            self._raise_refusal()
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

    def step(self, place: str | None = None) -> None:
        """Says that this process comes to the next place that all must come to."""
        self._place = place or f"step {self._steps + 1}"
        self._steps += 1

    def barrier(
        self, name: str, facts: Facts | None = None, *, may_wait_for_first: bool = False
    ) -> None:
        """Waits until every process has come to its next barrier.

        Args:
            name: of the barrier; process 0 refuses processes that come to another.
            facts: what all must agree on.
            may_wait_for_first: process 0 may take its time until it comes here, whatever it does.

        Raises:
            MixtralError: exit code 64, in every process, where they differ.
        """
        self._barriers += 1
        self.step(repr(name))
        message = {
            "at": self._barriers,
            "facts": {"the next step": name, **(facts or {})},
            "may_wait": may_wait_for_first,
        }
        if self.process_id == 0:
            self._arrive(0, message)
        else:
            self._tell(message)
        with self._passed:
            self._passed.wait_for(lambda: self._refusal or self._opened >= self._barriers)
        self._raise_refusal()

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            raise MixtralError(self._refusal, code=USAGE)

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

    def order(self, message: dict) -> None:
        """On process 0: tells all others what to do next."""
        for peer in self._others():
            peer.send({"do": message})

    def await_order(self) -> dict:
        """On the others: what process 0 says to do next, in order."""
        return self._orders.get()

    def wait_for_others(self) -> None:
        """On process 0: waits until all others have left."""
        self.step("the end")
        while self._others():
            time.sleep(0.05)

    def _others(self) -> list[Peer]:
        with self._lock:
            return [peer for rank, peer in self._peers.items() if rank and not peer.has_left]

    @staticmethod
    def _thread(work: Callable, *args: object) -> None:
        threading.Thread(target=work, args=args, daemon=True, name="mixtral_jax peers").start()

    def _state(self) -> dict:
        return {"steps": self._steps, "place": self._place, **self._work.since()}

    # Process 0.

    def _listen(self) -> None:
        try:
            server = listen(*self._address, backlog=self.num_processes)
        except OSError as error:
            raise MixtralError(
                f"port {self._address[1]} (the coordinator's + 1) cannot be listened on: {error}",
                fix="choose another port for --coordinator",
            ) from None
        self._peers[0] = Peer(socket.gethostname(), lambda message: None, time.monotonic())
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
            hello, send = read(file), sender(connection, self._sending)
            if hello is None or not is_hello(hello):
                send({"refused": "this is no process of the command that runs here"})
                return
            rank = hello["process"]
            fault = self._admit(rank, hello["of"], str(hello.get("host")), send)
            if fault is None:
                self._follow_peer(rank, file)
                return
            send({"refused": fault})
            if not self._all_joined.is_set():  # else: another command, with the address of this
                self._refuse(fault)

    def _admit(self, rank: int, of: int, host: str, send: Callable) -> str | None:
        """Takes a process in, or says why not."""
        if of != self.num_processes:
            numbers = f"--num-processes {of}, process 0 with {self.num_processes}"
            return f"process {rank} was started with {numbers}; fix: {FIX}"
        with self._lock:
            if rank in self._peers:
                fix = "give each process its own --process-id"
                return f"more than one process was started with --process-id {rank}; fix: {fix}"
            self._peers[rank] = Peer(host, send, time.monotonic())
            if len(self._peers) == self.num_processes:
                self._all_joined.set()
        return None

    def _refuse(self, fault: str) -> None:
        """Ends the command in every process: they do not fit together."""
        self._has_left = True  # first: nobody is lost by what follows
        for peer in self._others():
            peer.send({"refused": fault})
        self._note_refusal(fault)

    def _note_refusal(self, fault: str) -> None:
        """Each process ends itself now."""
        self._has_left = True
        with self._passed:
            self._refusal = fault
            self._passed.notify_all()

    def _follow_peer(self, rank: int, file: BinaryIO) -> None:
        peer = self._peers[rank]
        while (message := read(file)) is not None:
            peer.heard = time.monotonic()
            if "steps" in message:
                peer.note(message, peer.heard)
            if "at" in message:
                self._arrive(rank, message)
            if "bye" in message:
                peer.has_left = True
                if message["bye"] != 0 and not self._has_left:
                    time.sleep(_OWN_END_SECONDS)
                    self._judge(rank, f"ended with exit code {message['bye']}")
        if not (peer.has_left or self._has_left):
            self._judge(rank, "is gone (its connection ended)")

    def _arrive(self, rank: int, message: dict) -> None:
        number = message["at"]
        with self._lock:
            arrived = self._arrived.setdefault(number, {})
            arrived[rank] = message["facts"]
            self._first_is_excused = message["may_wait"] and 0 not in arrived
            if len(arrived) < self.num_processes:
                return
            del self._arrived[number]
        fault = difference(arrived)
        if fault is not None:
            self._refuse(f"{fault}; fix: {FIX}")
            return
        for peer in self._others():
            peer.send({"open": number})
        self._open(number)

    def _open(self, number: int) -> None:
        with self._passed:
            self._opened = number
            self._passed.notify_all()

    def _check(self) -> None:
        now = time.monotonic()
        self._peers[0].note(self._state(), now)
        excused = (0,) if self._first_is_excused else ()
        lost = find_lost(dict(self._peers), now, self.timeout, excused)
        if lost is not None:
            self._judge(*lost)

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
        while (message := read(file)) is not None:
            self._heard_first = time.monotonic()
            if "all" in message:
                self._all_joined.set()
            if "open" in message:
                self._open(message["open"])
            if "do" in message:
                self._orders.put(message["do"])
            if "lost" in message:
                self._end(str(message["lost"]))
            if "refused" in message:
                self._note_refusal(str(message["refused"]))
                return
            if "bye" in message:
                self._first_has_left = True
                if message["bye"] != 0:
                    time.sleep(_OWN_END_SECONDS)
                    self._end(f"process 0 ended with exit code {message['bye']}")
        if not self._first_has_left and not self._has_left:
            self._end(f"process 0 ({self._address[0]}) is gone (its connection ended)")

    def _tell(self, message: dict) -> None:
        assert self._to_first is not None
        sender(self._to_first, self._sending)(message)

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
