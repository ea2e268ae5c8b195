"""Where process 0 listens, and which lines are messages."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest

from mixtral_jax.serve import commands
from mixtral_jax.sharding import wire
from tests.sharding.processes import free_port

DOCUMENTED = "192.0.2.1"  # of no machine (RFC 5737): as an address of a router in front


@pytest.mark.parametrize(
    ("host", "bound"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        (DOCUMENTED, "0.0.0.0"),
        ("a-name", "0.0.0.0"),
    ],
)
def test_listens_where_it_is_called_and_nowhere_else(host, bound):
    with wire.listen(host, free_port(), 1) as server:
        assert server.getsockname()[0] == bound


def test_a_port_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        wire.listen("127.0.0.1", taken.getsockname()[1], 1)


@pytest.mark.parametrize("line", [b"", b"[]\n", b"{", b"{}", b"x\n", b"[" * 9999 + b"\n"])
def test_what_is_no_message_ends_the_conversation(line, tmp_path):
    (tmp_path / "said").write_bytes(b'{"beat": true}\n' + line)
    with open(tmp_path / "said", "rb") as file:
        assert wire.read(file) == {"beat": True}
        assert wire.read(file) is None


def test_a_step_of_many_grammars_arrives():
    masks = {row: np.full((1024,), row, np.uint32) for row in range(300)}  # 32k tokens
    step = commands.Step(class_id=0, num_steps=1, running=tuple(masks), masks=masks)
    ours, theirs = socket.socketpair()
    with ours, theirs, theirs.makefile("rb") as file:
        send = wire.sender(ours, threading.Lock())
        message = {"do": commands.to_json(step)}
        thread = threading.Thread(target=send, args=(message,))
        thread.start()
        assert wire.read(file) == message
        thread.join()


def test_what_nobody_would_read_is_not_sent():
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="bytes"):
        wire.sender(ours, threading.Lock())({"do": "x" * wire.LONGEST_LINE})
