"""Who is lost, and who is only slow: the heartbeat between processes, without processes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest

from mixtral_jax.errors import PEER_LOST, USAGE, MixtralError
from mixtral_jax.sharding import peers as module
from mixtral_jax.sharding.peers import Peers
from tests.sharding.processes import free_port

TIMEOUT = 1.0
OPENED: list = []  # closed after each test


def make(*arguments, **options) -> Peers:
    OPENED.append(Peers(*arguments, timeout=TIMEOUT, **options))
    return OPENED[-1]


@pytest.fixture(autouse=True)
def short_seconds(monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "_OWN_END_SECONDS", 0.1)
    yield
    for each in OPENED:
        each.close()
    OPENED.clear()
    time.sleep(0.3)  # the threads see it


class Verdicts(list):
    """Lines that would have ended the process."""

    def soon(self, seconds: float = 4 * TIMEOUT) -> str:
        until = time.monotonic() + seconds
        while not self and time.monotonic() < until:
            time.sleep(0.02)
        assert self, "nobody was found lost"
        return self[0]


class Fake:
    """A process that says what a test wants."""

    def __init__(self, port: int, rank: int, of: int):
        until = time.monotonic() + 5
        while True:
            with contextlib.suppress(OSError):
                self.socket = socket.create_connection(("127.0.0.1", port))
                OPENED.append(self.socket)
                break
            assert time.monotonic() < until
            time.sleep(0.02)
        self.say(process=rank, of=of, host=f"host{rank}")

    def say(self, **message) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def beat(self, stop: threading.Event, steps=0, computes=False, moves=False) -> None:
        def work():
            with contextlib.suppress(OSError):
                while not stop.wait(0.1):
                    self.say(steps=steps, place=f"step {steps}", computes=computes, moves=moves)

        threading.Thread(target=work, daemon=True).start()


def first_with(*ranks: int) -> tuple[Peers, Verdicts, list[Fake]]:
    port, verdicts, of = free_port(), Verdicts(), len(ranks) + 1
    first = make("127.0.0.1", port, of, 0, lost=verdicts.append)
    fakes: list[Fake] = []
    thread = threading.Thread(target=lambda: fakes.extend(Fake(port, r, of) for r in ranks))
    thread.start()
    first.join(10)
    thread.join()
    return first, verdicts, fakes


def two() -> tuple[list[Peers], list[Verdicts]]:
    port, verdicts = free_port(), [Verdicts(), Verdicts()]
    both = [make("127.0.0.1", port, 2, rank, lost=verdicts[rank].append) for rank in range(2)]
    threads = [threading.Thread(target=peer.join, args=(10,)) for peer in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return both, verdicts


def test_nobody_is_lost_while_all_live():
    both, verdicts = two()
    for peer in both:
        peer.step()
    time.sleep(3 * TIMEOUT)
    assert verdicts == [[], []]


def test_barriers_hold_until_the_last_comes():
    both, _ = two()
    passed = []
    waiting = threading.Thread(target=lambda: (both[0].barrier("here"), passed.append(1)))
    waiting.start()
    time.sleep(0.3)
    assert not passed
    both[1].barrier("here")
    waiting.join(5)
    assert passed


def test_orders_come_in_order():
    both, verdicts = two()
    sent = [{"n": n, "list": list(range(n))} for n in range(200)]
    for message in sent:
        both[0].order(message)
    assert [both[1].await_order() for _ in sent] == sent
    assert verdicts == [[], []]


def passing(both: list[Peers], *calls: tuple) -> list:
    """What each process met at its barrier: None, or the fault."""
    met: list = [TimeoutError()] * len(both)

    def work(rank: int) -> None:
        try:
            met[rank] = both[rank].barrier(*calls[rank])
        except MixtralError as error:
            met[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(both))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    return met


def test_all_are_refused_where_one_is_about_to_do_something_else():
    both, verdicts = two()
    same = {"prompt": "'a'", "json": "False"}
    assert passing(both, ("start", same), ("start", dict(same))) == [None, None]
    met = passing(both, ("load", same), ("load", {**same, "prompt": "'b'"}))
    for error in met:
        assert isinstance(error, MixtralError)
        assert error.code == USAGE
        assert str(error).startswith(
            "process 1 does not do what process 0 does: prompt is 'b', in process 0 'a'; fix: "
        )
    time.sleep(2 * TIMEOUT)
    assert verdicts == [[], []], "each ends by its own fault"


def test_another_barrier_is_something_else():
    both, _ = two()
    met = passing(both, ("end",), ("generate", {"the batch": "x"}))
    for error in met:
        assert "the next step is generate, in process 0 end; the batch is x" in str(error)


def test_gone_is_noticed_by_all_and_named():
    _, verdicts, (one, other) = first_with(1, 2)
    one.socket.shutdown(socket.SHUT_RDWR)
    assert verdicts.soon().startswith("process 1 (host1) is gone")
    told = other.socket.recv(4096).decode()
    while "lost" not in told:
        told += other.socket.recv(4096).decode()
    assert "process 1 (host1) is gone" in told


def test_silent():
    _, verdicts, _ = first_with(1)
    assert verdicts.soon().startswith("process 1 (host1) is silent for 1 s")


def arrive(peer: Peers, name: str, **options) -> None:
    """Comes to a barrier, and waits there in a thread."""
    threading.Thread(target=peer.barrier, args=(name,), kwargs=options, daemon=True).start()


@pytest.mark.parametrize("where", ["step 1", "'loaded'"])
def test_stuck_is_behind_and_does_nothing(where):
    first, verdicts, (fake,) = first_with(1)
    stop = threading.Event()
    fake.beat(stop)
    if where == "step 1":
        first.step()
    else:
        arrive(first, "loaded")
    line = verdicts.soon()
    assert line.startswith(f"process 1 (host1) is stuck after the start: others came to {where} ")
    stop.set()


@pytest.mark.parametrize("sign", ["computes", "moves"])
def test_slow_is_not_stuck(sign):
    first, verdicts, (fake,) = first_with(1)
    stop = threading.Event()
    fake.beat(stop, **{sign: True})
    arrive(first, "loaded")
    time.sleep(3 * TIMEOUT)
    assert not verdicts
    stop.set()


@pytest.mark.parametrize("may_wait", [False, True])
def test_others_wait_for_process_0_only_where_they_may(may_wait):
    first, verdicts, fakes = first_with(1, 2)
    stop = threading.Event()
    fakes[0].beat(stop, steps=1)
    fakes[1].beat(stop, steps=1)
    for fake in fakes:
        fake.say(at=1, facts={"the next step": "converted"}, may_wait=may_wait)
    if may_wait:
        time.sleep(3 * TIMEOUT)
        assert not verdicts
        first.barrier("converted", may_wait_for_first=True)
    else:
        assert verdicts.soon(8 * TIMEOUT).startswith("process 0")
    stop.set()


def test_where_process_0_is_excused_the_others_are_not():
    _, verdicts, fakes = first_with(1, 2)
    stop = threading.Event()
    fakes[0].beat(stop, steps=1)
    fakes[1].beat(stop, steps=0)
    fakes[0].say(at=1, facts={}, may_wait=True)
    assert verdicts.soon().startswith("process 2 (host2) is stuck")
    stop.set()


def test_process_0_waits_for_the_goodbyes_with_a_limit():
    first, verdicts, (fake,) = first_with(1)
    stop = threading.Event()
    fake.beat(stop)
    threading.Thread(target=first.wait_for_others, daemon=True).start()
    assert "others came to the end" in verdicts.soon()
    fake.say(bye=0)
    stop.set()


def test_process_0_can_be_the_stuck_one():
    _, verdicts, (fake,) = first_with(1)
    stop = threading.Event()
    fake.beat(stop, steps=1)
    time.sleep(0.5)
    assert not verdicts
    # The process of these tests works a little; it is idle enough.
    assert verdicts.soon(8 * TIMEOUT).startswith("process 0")
    stop.set()


def test_waiting_together_is_no_fault():
    first, verdicts, (fake,) = first_with(1)
    stop = threading.Event()
    fake.beat(stop, steps=1)
    first.step()
    time.sleep(3 * TIMEOUT)
    assert not verdicts
    stop.set()


def test_a_goodbye_with_a_fault_ends_the_others():
    both, verdicts = two()
    both[1].leave(65)
    assert "process 1" in verdicts[0].soon()
    assert "exit code 65" in verdicts[0].soon()


def test_a_goodbye_ends_nobody():
    both, verdicts = two()
    both[1].leave(0)
    both[0].wait_for_others()
    both[0].leave(0)
    time.sleep(2 * TIMEOUT)
    assert verdicts == [[], []]


def test_process_0_gone():
    port, verdicts = free_port(), Verdicts()
    with socket.create_server(("127.0.0.1", port)) as server:
        peer = make("127.0.0.1", port, 2, 1, lost=verdicts.append)
        joining = threading.Thread(target=peer.join, args=(10,))
        joining.start()
        connection, _ = server.accept()
        connection.sendall(b'{"all": true}\n')
        joining.join()
        connection.close()
    assert verdicts.soon().startswith("process 0 (127.0.0.1) is gone")


def test_who_does_not_come_is_named():
    first = make("127.0.0.1", free_port(), 3, 0)
    with pytest.raises(MixtralError, match="process 1, 2 did not come within 0 s") as caught:
        first.join(0.3)
    assert caught.value.code == PEER_LOST
    other = make("127.0.0.1", free_port(), 3, 1)
    with pytest.raises(MixtralError, match="process 0 does not answer at") as caught:
        other.join(0.3)
    assert caught.value.code == PEER_LOST


@pytest.mark.parametrize(
    ("rank", "of", "fault"),
    [
        (1, 3, "process 1 was started with --num-processes 3, process 0 with 2; fix: "),
        (1, 2, "more than one process was started with --process-id 1; fix: give each process"),
    ],
)
def test_processes_that_do_not_fit_are_told_and_process_0_too(rank, of, fault):
    port, met = free_port(), []
    first = make("127.0.0.1", port, 2 if of == 3 else 3, 0)
    other = make("127.0.0.1", port, of if of == 3 else 3, rank)
    peers = [first, other] + ([] if of == 3 else [make("127.0.0.1", port, 3, rank)])

    def join(peer: Peers) -> None:
        with pytest.raises(MixtralError) as caught:
            peer.join(10)
        met.append((caught.value.code, str(caught.value).startswith(fault)))

    threads = [threading.Thread(target=join, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert met == [(USAGE, True)] * len(peers)


def test_a_latecomer_of_another_command_ends_only_itself():
    both, verdicts = two()
    late = make("127.0.0.1", both[1]._address[1], 2, 1)
    with pytest.raises(MixtralError, match="more than one process"):
        late.join(10)
    assert passing(both, ("end",), ("end",)) == [None, None]
    assert verdicts == [[], []]


HELLOS = [b"GET / HTTP/1.1\r\n\r\n", b'{"process": 0, "of": 2}\n', b"[]\n"]


@pytest.mark.parametrize("hello", HELLOS, ids=["http", "another 0", "a list"])
def test_strangers_are_refused(hello):
    port = free_port()
    first = make("127.0.0.1", port, 2, 0, lost=Verdicts().append)
    joining = threading.Thread(target=first.join, args=(10,))
    joining.start()
    Fake(port, 7, 2)  # no such process
    stranger = Fake.__new__(Fake)
    stranger.socket = socket.create_connection(("127.0.0.1", port))
    OPENED.append(stranger.socket)
    stranger.socket.sendall(hello)
    assert b"refused" in stranger.socket.recv(100)
    assert joining.is_alive()
    Fake(port, 1, 2)
    joining.join(5)
    assert not joining.is_alive()
