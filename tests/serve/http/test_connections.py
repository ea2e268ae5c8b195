"""One connection, several requests: what a client sends, reads or leaves in an unusual order."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest

from mixtral_jax.serve.sse import EventStream
from tests.serve.http.conftest import application
from tests.serve.http.live import connect, post_bytes, read_all, serving, wait_until
from tests.serve.http.test_limits import BUFFER, SHORT, allow_long

BODY = json.dumps({"inputs": "Hi"}).encode()


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_sends_more_and_leaves_frees_its_slot(engine, path):
    engine.say("word " * 200, delay=0.05)
    with serving(engine) as port:
        with connect(port) as connection:
            connection.sendall(post_bytes(path, BODY))
            wait_until(lambda: engine.running)
            connection.sendall(b"x")
            time.sleep(0.1)  # the byte is read before the end is
        wait_until(lambda: not engine.running, seconds=2)
    assert engine.tickets[0].is_cancelled


def test_requests_that_are_sent_together_are_answered_one_after_the_other(engine):
    engine.say("word", delay=0.05)
    one = post_bytes("/generate", BODY)
    with serving(engine) as port, connect(port) as connection:
        connection.sendall(one + one + post_bytes("/generate", BODY, "connection: close"))
        assert read_all(connection).count(b"HTTP/1.1 200 OK") == 3


def test_a_client_that_sends_without_end_while_it_is_answered_is_dropped(engine):
    engine.say("word " * 200, delay=0.05)
    with serving(engine, header_limit=4096) as port, connect(port) as connection:
        connection.sendall(post_bytes("/generate", BODY))
        wait_until(lambda: engine.running)
        connection.sendall(b"POST / HTTP/1.1\r\nx: " + b"y" * 5000)
        wait_until(lambda: not engine.running, seconds=2)


def test_a_second_answer_does_not_count_against_one_who_reads_the_first(engine):
    engine.say("word")
    allow_long(engine)
    body = json.dumps({"inputs": "x" * 60_000, "parameters": {"return_full_text": True}}).encode()
    with (
        serving(engine, write_timeout=SHORT, send_buffer=BUFFER) as port,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        connection.connect(("127.0.0.1", port))
        connection.sendall(post_bytes("/generate", body))
        connection.sendall(post_bytes("/generate", body, "connection: close"))
        data, start = b"", time.monotonic()
        while part := connection.recv(BUFFER // 2):
            data += part
            time.sleep(0.05 if time.monotonic() - start < 3 * SHORT else 0)
    assert data.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.anyio
@pytest.mark.parametrize("leaves", [False, True])
async def test_a_stream_that_cannot_begin_ends_what_it_was_about(leaves):
    """Its frames were never begun, so closing them would end nothing."""
    ended = []

    async def frames():
        yield b"never"

    async def send(message):
        if not leaves:
            raise ConnectionError
        await asyncio.sleep(60)

    async def receive():
        await asyncio.sleep(0.05 if leaves else 60)
        return {"type": "http.disconnect"}

    stream = EventStream(frames(), "tgi", on_end=lambda: ended.append(True))
    scope = {"type": "http"}
    if leaves:
        await stream(scope, receive, send)
    else:
        with pytest.raises(ConnectionError):
            await stream(scope, receive, send)
    assert ended == [True]


def test_a_stream_behind_an_answer_that_is_not_read_frees_its_slot(engine):
    engine.say("word " * 3000, delay=0.01)
    allow_long(engine)
    text = json.dumps({"inputs": "a b " * 10_000}).encode()
    with (
        serving(engine, write_timeout=SHORT, send_buffer=BUFFER) as port,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        connection.connect(("127.0.0.1", port))
        connection.sendall(post_bytes("/tokenize", text) + post_bytes("/generate_stream", BODY))
        wait_until(lambda: engine.tickets, seconds=20)
        wait_until(lambda: not engine.running)
    assert engine.tickets[0].is_cancelled


@pytest.mark.anyio
async def test_time_is_up_also_for_events_that_wait(engine):
    """A slow reader finds the next event there whenever it asks."""
    engine.say("word " * 100)
    app = application(engine, request_timeout=0.2)
    sent = []
    inputs = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def send(message):
        sent.append(message)
        await asyncio.sleep(0.05)

    async def receive():
        if not inputs:
            await asyncio.sleep(60)
        return inputs.pop()

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/generate_stream", "raw_path": b"/generate_stream",
        "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1), "server": None,
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip
    await app(scope, receive, send)
    text = b"".join(message.get("body", b"") for message in sent)
    assert text.count(b"data:") < 20
    assert b'"error_type":"timeout"' in text
