"""What a client may take: bytes, seconds, depth. Each limit is seen to let the allowed pass."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterator

import pytest

from mixtral_jax.serve.strict_json import BadJSONError, parse
from tests.serve.http.conftest import client_of
from tests.serve.http.live import connect, post_bytes, read_all, serving, wait_until

SHORT = 0.4  # seconds, for timeouts


def status_of(data: bytes) -> int:
    assert data.startswith(b"HTTP/1.1 "), data[:100]
    return int(data.split(b" ", 2)[1])


def ask(port: int, data: bytes) -> bytes:
    with connect(port) as connection:
        connection.sendall(data)
        return read_all(connection)


def generate(text: str = "Hi", **parameters) -> bytes:
    body = json.dumps({"inputs": text, "parameters": parameters}).encode()
    return post_bytes("/generate", body, "connection: close")


@pytest.mark.anyio
@pytest.mark.parametrize("size", [1000, 1001])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_at_the_limit_passes_and_one_byte_more_is_413(engine, size, chunked):
    body = json.dumps({"inputs": "Hi", "x": ""}).encode()
    body = body[:-2] + b"y" * (size - len(body)) + b'"}'
    assert len(body) == size

    async def parts():
        for start in range(0, size, 100):
            yield body[start : start + 100]

    async with client_of(engine, payload_limit=1000) as client:
        content = parts() if chunked else body
        headers = {"content-type": "application/json"}
        answer = await client.post("/generate", content=content, headers=headers)
    if size == 1000:
        assert answer.status_code == 200
    else:
        assert (answer.status_code, answer.json()["error_type"]) == (413, "payload_too_large")
        assert engine.tickets == []


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_client_that_sends_first_and_reads_then_gets_its_413(engine, is_chunked):
    body = b'{"inputs": "' + b"x" * 3_000_000 + b'"}'
    data = post_bytes("/generate", body)
    if is_chunked:
        head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
        data = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with serving(engine) as port:
        assert status_of(ask(port, data)) == 413
        waits = post_bytes("/generate", b"", "expect: 100-continue")
        waits = waits.replace(b"content-length: 0", b"content-length: 3000000")
        assert status_of(ask(port, waits)) == 413  # and no 100 before it
        assert status_of(ask(port, generate())) == 200


@pytest.mark.anyio
async def test_what_is_no_json_type_is_415(client, engine):
    body = b'{"inputs": "Hi"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = await client.post("/generate", content=body, headers={"content-type": kind})
        assert answer.status_code == 415
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        answer = await client.post("/generate", content=body, headers={"content-type": kind})
        assert answer.status_code == 200
    assert len(engine.tickets) == 3


BAD_JSON = {
    "nothing": b"",
    "cut": b'{"inputs": "Hi"',
    "two values": b'{"inputs": "Hi"} {}',
    "deep": b'{"inputs": ' + b"[" * 64 + b"]" * 64 + b"}",
    "very deep": b"[" * 1_000_000,
    "twice": b'{"inputs": "a", "inputs": "b"}',
    "NaN": b'{"inputs": "Hi", "parameters": {"temperature": NaN}}',
    "infinite": b'{"inputs": "Hi", "parameters": {"temperature": 1e400}}',
    "digits": b'{"inputs": "Hi", "parameters": {"seed": ' + b"9" * 5000 + b"}}",
    "no utf-8": b'{"inputs": "\xff"}',
    "half a pair": b'{"inputs": "\\ud800"}',
    "a list": b"[]",
    "bom": b'\xef\xbb\xbf{"inputs": "Hi"}',
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", BAD_JSON)
async def test_bad_json_is_refused_by_both_families(client, engine, name):
    headers = {"content-type": "application/json"}
    for path, status in (("/generate", 422), ("/v1/chat/completions", 400)):
        answer = await client.post(path, content=BAD_JSON[name], headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]
    assert engine.tickets == []


def test_what_json_allows_is_read():
    deepest = b"[" * 64 + b"]" * 64
    parse(deepest, max_depth=64)
    assert parse(b'{"a": "[[[[{{", "b": "\\"[", "c": "\\ud83c\\udf89"}', max_depth=1)["c"] == "🎉"
    with pytest.raises(BadJSONError):
        parse(b"[" + deepest + b"]", max_depth=64)


@pytest.mark.parametrize(
    "body",
    [
        b'"' + b'\\"' * 500_000,
        b'"' * 1_000_000,
        b"[]," * 600_000,
        b"\\" * 1_000_000,
        b"{" + b",".join(b'"%d":0' % n for n in (*range(150_000), 149_999)) + b"}",  # twice, late
    ],
)
def test_hostile_bytes_take_no_time(body):
    start = time.perf_counter()
    with pytest.raises(BadJSONError):
        parse(body, max_depth=64)
    assert time.perf_counter() - start < 2


def test_a_slow_body_is_408_and_a_patient_one_passes(engine):
    with serving(engine, body_timeout=SHORT) as port:
        data = generate()
        with connect(port) as connection:
            connection.sendall(data[:-5])
            assert status_of(read_all(connection)) == 408
        with connect(port) as connection:
            connection.sendall(data[:-5])
            time.sleep(SHORT / 4)
            connection.sendall(data[-5:])
            assert status_of(read_all(connection)) == 200


def test_slow_headers_are_408_and_leave_the_server_to_others(engine):
    with serving(engine, header_timeout=SHORT) as port:
        slow = [connect(port) for _ in range(50)]
        for connection in slow:
            connection.sendall(b"POST /generate HTTP/1.1\r\nhost: loc")
        assert status_of(ask(port, generate())) == 200
        for connection in slow:
            assert status_of(read_all(connection)) == 408
            connection.close()
        silent = connect(port)
        assert status_of(read_all(silent)) == 408
        silent.close()


def test_headers_at_the_limit_pass_and_larger_ones_are_431(engine):
    with serving(engine, header_limit=4096) as port:
        small = post_bytes(
            "/generate", b'{"inputs": "Hi"}', "connection: close", "x: " + "y" * 3000
        )
        assert status_of(ask(port, small)) == 200
        # Sent in one piece without an end, as a client that never stops would.
        assert status_of(ask(port, b"GET / HTTP/1.1\r\nx: " + b"y" * 10_000)) == 431
        assert status_of(ask(port, generate())) == 200


MUTATED = [
    b"\x00\x01\x02\r\n\r\n",
    b"GET /\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nhost: localhost\r\nbad header\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


def test_what_is_no_http_is_refused_and_the_server_lives(engine):
    with serving(engine, header_timeout=SHORT, body_timeout=SHORT) as port:
        for data in MUTATED:
            answer = ask(port, data)
            assert not answer or 400 <= status_of(answer) < 500
        assert status_of(ask(port, generate())) == 200


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/chat/completions"])
def test_a_client_that_leaves_frees_its_slot(engine, path):
    engine.say("word " * 200, delay=0.02)
    body = {"inputs": "Hi", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    if path == "/generate":
        del body["stream"]
    with serving(engine) as port:
        connections = [connect(port) for _ in range(10)]
        for connection in connections:
            connection.sendall(post_bytes(path, json.dumps(body).encode()))
        wait_until(lambda: len(engine.running) == 10)
        for connection in connections:
            connection.close()
        wait_until(lambda: not engine.running, seconds=2)
    assert all(ticket.is_cancelled for ticket in engine.tickets)
    assert all(ticket.made < 200 for ticket in engine.tickets)


def test_a_client_that_stays_is_not_cancelled(engine):
    engine.say("word", delay=0.05)
    with serving(engine) as port:
        assert status_of(ask(port, generate())) == 200
    assert not engine.tickets[0].is_cancelled


BUFFER = 4096


def allow_long(engine) -> None:
    longer = {"max_total_tokens": 10**6, "max_input_tokens": 10**6 - 1}
    engine.limits = dataclasses.replace(engine.limits, **longer)


@contextlib.contextmanager
def large_answer(engine, size: int) -> Iterator[tuple[int, socket.socket]]:
    """A port, and a client that was sent an answer larger than the kernel keeps for it."""
    engine.say("word")
    allow_long(engine)
    body = json.dumps({"inputs": "x" * size, "parameters": {"return_full_text": True}})
    with (
        serving(engine, write_timeout=SHORT, send_buffer=BUFFER) as port,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        connection.connect(("127.0.0.1", port))
        connection.sendall(post_bytes("/generate", body.encode(), "connection: close"))
        yield port, connection


def test_a_reader_that_never_reads_loses_its_connection(engine):
    with large_answer(engine, 300_000) as (port, connection):
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        wait_until(lambda: is_reset(connection), seconds=10)
        assert status_of(ask(port, generate())) == 200


def test_a_reader_that_reads_slowly_gets_everything(engine):
    with large_answer(engine, 300_000) as (_, connection):
        data, start = b"", time.monotonic()
        while part := connection.recv(2 * BUFFER):
            data += part
            time.sleep(0.05 if time.monotonic() - start < 4 * SHORT else 0)
    assert time.monotonic() - start > 2 * SHORT
    assert json.loads(data.partition(b"\r\n\r\n")[2])["generated_text"].endswith("x word")


def test_a_stream_that_is_not_read_loses_its_slot(engine):
    engine.say("word " * 3000)
    allow_long(engine)
    body = json.dumps({"inputs": "Hi", "parameters": {"max_new_tokens": 9000}})
    with (
        serving(engine, write_timeout=SHORT, send_buffer=BUFFER) as port,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        connection.connect(("127.0.0.1", port))
        connection.sendall(post_bytes("/generate_stream", body.encode()))
        wait_until(lambda: engine.tickets and not engine.running, seconds=10)
        assert engine.tickets[0].is_cancelled
        ticket = engine.tickets[0]
        assert ticket.made < len(ticket.script.token_ids)
        wait_until(lambda: is_reset(connection), seconds=2)


def is_reset(connection: socket.socket) -> bool:
    try:
        connection.sendall(b" ")
    except OSError:
        return True
    time.sleep(0.05)
    return False


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_an_answer_that_takes_too_long_is_408_or_a_last_event(engine, path):
    engine.say("word " * 50, delay=0.05)
    async with client_of(engine, request_timeout=0.3) as client:
        answer = await client.post(path, json={"inputs": "Hi"})
    if path == "/generate":
        assert (answer.status_code, answer.json()["error_type"]) == (408, "timeout")
    else:
        last = answer.text.split("\n\n")[-2]
        assert json.loads(last.removeprefix("data:"))["error_type"] == "timeout"
    assert engine.running == set()
    assert engine.tickets[0].is_cancelled


def test_streams_of_many_clients_keep_their_tokens_apart(engine):
    """Each client sends a word of its own and gets that word back, whatever the others do."""
    import asyncio

    import httpx

    engine.script = lambda request: scripted(engine, request)
    nonces = [f"nonce{n * 7919}" for n in range(64)]

    async def one(client: httpx.AsyncClient, nonce: str) -> str:
        text = None
        body = {"inputs": nonce, "stream": True}
        async with client.stream("POST", "/", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    assert text is None  # the last event, and only it, has the text
                    text = json.loads(line.removeprefix("data:"))["generated_text"]
        return str(text)

    async def everyone(port: int) -> list[str]:
        limits = httpx.Limits(max_connections=64)
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as client:
            return await asyncio.gather(*(one(client, nonce) for nonce in nonces))

    with serving(engine) as port:
        texts = asyncio.run(everyone(port))
    assert texts == [f" {nonce}" for nonce in nonces]


def scripted(engine, request):
    from tests.serve.http.fake import Script

    ids = [*request.prompt_ids[1:], engine.tokenizer.eos_id]
    return Script(token_ids=ids, delay=0.001 * (ids[0] % 5))
