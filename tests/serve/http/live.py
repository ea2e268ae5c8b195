"""A real server on loopback, in a thread, around a fake engine."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mixtral_jax
from mixtral_jax.serve import logs
from mixtral_jax.serve.app import create_app
from mixtral_jax.serve.server import Server, bind, serve
from mixtral_jax.tokenizer import Tokenizer
from tests.serve.http.fake import FakeEngine, options


@contextlib.contextmanager
def serving(
    engine: FakeEngine,
    *,
    keys: tuple[bytes, ...] = (),
    send_buffer: int | None = None,
    **fields: Any,
) -> Iterator[int]:
    """The port of a server that runs inside the block.

    ``send_buffer``: bytes that the kernel takes before the client reads; megabytes, if None.
    """
    asked = options(port=0, **fields)
    listening = bind(asked.http)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = Server(create_app(engine, engine.tokenizer, asked, keys=keys), asked)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def main() -> None:
    """A server of its own process, for signals: prints its port."""
    logs.configure(as_json=True)
    engine = FakeEngine(Tokenizer.from_folder(Path(mixtral_jax.__file__).parent / "data" / "tiny"))
    engine.say("word " * 30, delay=0.05)
    asked = options(port=0, graceful_termination_timeout=float(sys.argv[1]))
    listening = bind(asked.http)
    app = create_app(engine, engine.tokenizer, asked)
    print(listening.getsockname()[1], flush=True)
    serve(app, asked, listening)


def wait_until(is_so: Any, seconds: float = 5.0) -> None:
    """Waits for something to become true, and fails if it does not."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def connect(port: int) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=10)
    return made


def post_bytes(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json"]
    lines += [f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


if __name__ == "__main__":
    main()
