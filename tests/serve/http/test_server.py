"""Signals, ports and the ends of a server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mixtral_jax.errors import INTERNAL, IO_ERROR, OK, MixtralError
from mixtral_jax.serve.options import HttpFlags
from mixtral_jax.serve.server import Server, bind, serve
from tests.serve.http.fake import options
from tests.serve.http.live import serving, wait_until

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def process(seconds: float) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    """A server of its own with so many seconds to end gracefully."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.http.live", str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            client.get("/health").raise_for_status()
            yield server, client
    finally:
        if server.poll() is None:
            server.kill()
        server.communicate()


def start_stream(client: httpx.Client, texts: list[str]) -> threading.Thread:
    """A stream that is read in a thread; ``texts`` gets its lines."""
    begun = threading.Event()

    def read() -> None:
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            client.stream("POST", "/generate_stream", json={"inputs": "Hi"}) as answer,
        ):
            for line in answer.iter_lines():
                texts.append(line)
                begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(10)
    return thread


def test_sigterm_is_told_at_once_and_what_runs_is_finished():
    with process(30) as (server, client):
        lines: list[str] = []
        stream = start_stream(client, lines)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health").status_code == 503, seconds=0.5)
        assert client.get("/live").status_code == 200
        assert client.post("/generate", json={"inputs": "Hi"}).status_code == 503
        stream.join(20)
        assert json.loads([line for line in lines if line][-1][5:])["generated_text"]
        assert server.wait(10) == 0
        assert server.stderr is not None
        said = [json.loads(line) for line in server.stderr.read().splitlines()]
    messages = [line["message"] for line in said]
    assert messages.index("listening") < messages.index("draining") < messages.index("ended")


@pytest.mark.slow
def test_when_the_time_is_up_what_runs_gets_an_end_and_the_code_is_0():
    with process(0.2) as (server, client):
        lines: list[str] = []
        stream = start_stream(client, lines)
        server.send_signal(signal.SIGTERM)
        stream.join(20)
        last = json.loads([line for line in lines if line][-1][5:])
        assert last["error_type"] == "unhealthy"
        assert server.wait(10) == 0


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once():
    with process(30) as (server, client):
        lines: list[str] = []
        stream = start_stream(client, lines)
        start = time.monotonic()
        server.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
        assert time.monotonic() - start < 1.4  # the stream alone would take longer
        stream.join(5)


def test_a_second_signal_ends_even_what_hangs(engine, monkeypatch):
    from mixtral_jax.serve.app import create_app

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("mixtral_jax.serve.server._SECOND_SIGNAL_SECONDS", 0.05)
    asked = options(port=0)
    server = Server(create_app(engine, engine.tokenizer, asked), asked)
    for number in (signal.SIGTERM, signal.SIGINT):
        server.handle_exit(number, None)
    wait_until(lambda: codes == [0], seconds=5)


def test_an_engine_that_dies_answers_everyone(engine):
    engine.say("word " * 100, delay=0.05)
    with serving(engine) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        lines: list[str] = []
        threads = [start_stream(client, lines) for _ in range(3)]
        engine.die()
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
        assert sum("unhealthy" in line for line in lines) == 3
        assert client.get("/health").status_code == 503
        assert client.get("/live").status_code == 503


def code_of(engine, do) -> int:
    """The exit code of a server to which something happens."""
    from mixtral_jax.serve.app import create_app

    asked = options(port=0)
    listening = bind(asked.http)
    port = listening.getsockname()[1]
    app = create_app(engine, engine.tokenizer, asked)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(serve(app, asked, listening)))
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        do(client)
        thread.join(20)
    (code,) = codes
    return code


def test_a_server_whose_engine_died_ends_and_says_so(engine):
    """Else whoever watches the process would not start another, and followers would wait."""
    assert code_of(engine, lambda client: engine.die()) == INTERNAL


@pytest.mark.parametrize("dies", [False, True])
def test_an_engine_that_dies_while_it_is_drained_is_told_too(engine, monkeypatch, dies):
    servers = []
    begin = Server.attend
    monkeypatch.setattr(Server, "attend", lambda self: (servers.append(self), begin(self)))

    def leave(client: httpx.Client) -> None:
        start_stream(client, [])
        servers[0].handle_exit(signal.SIGTERM, None)
        wait_until(lambda: engine.state() == "draining")
        if dies:
            engine.die()

    engine.say("word " * 10, delay=0.05)
    assert code_of(engine, leave) == (INTERNAL if dies else OK)


def test_what_speaks_http_needs_no_jax():
    program = "import sys, mixtral_jax.serve.app, mixtral_jax.serve.server"
    program += "; print(*{'jax', 'flax'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == ""


def test_a_taken_port_is_told_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MixtralError, match="cannot listen on 127") as caught:
            bind(HttpFlags(port=taken.getsockname()[1]))
    assert caught.value.code == IO_ERROR


def test_metrics_on_a_port_of_their_own_need_no_key(engine):
    from mixtral_jax.serve.app import create_app
    from mixtral_jax.serve.options import ServeOptions, WatchFlags
    from mixtral_jax.serve.server import watch

    port = bind_free()
    asked = ServeOptions(watch=WatchFlags(prometheus_port=port))
    app = create_app(engine, engine.tokenizer, asked, keys=(b"k",))
    server = watch(app.state.service, asked)
    assert server is not None
    wait_until(lambda: server.started)
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
    assert "tgi_queue_size 3.0" in answer.text
    assert httpx.get(f"http://127.0.0.1:{port}/info").status_code == 404
    server.should_exit = True


def bind_free() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
