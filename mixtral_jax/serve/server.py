"""Listening, serving, and leaving gracefully: SIGTERM is told at once and answered to the end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mixtral_jax.errors import INTERNAL, IO_ERROR, OK, MixtralError
from mixtral_jax.serve import logs
from mixtral_jax.serve.exposition import CONTENT_TYPE
from mixtral_jax.serve.options import HttpFlags, ServeOptions
from mixtral_jax.serve.protocol import protocol_of
from mixtral_jax.serve.service import Service

_BACKLOG = 2048
_ATTEND_SECONDS = 0.2
_SECOND_SIGNAL_SECONDS = 1.0  # for an orderly end
_LAST_SECONDS = 5  # for answers to be read after everything is generated


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM keeps listening while what runs is finished.

    A first signal: no new requests (503, also on /health), those that run go on. When they are
    done, or the time for it is up, the server ends with code 0. A second signal: out at once.

    Args:
        app: made by ``create_app``.
        options: of the command line.
    """

    def __init__(self, app: FastAPI, options: ServeOptions):
        flags = options.http
        super().__init__(
            uvicorn.Config(
                app,
                host=flags.host,
                port=flags.port,
                http=protocol_of(flags),
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=flags.header_limit,
                timeout_graceful_shutdown=_LAST_SECONDS,
                backlog=_BACKLOG,
            )
        )
        self._service: Service = app.state.service
        self._seconds = flags.graceful_termination_timeout
        self._leaving = False
        self.has_failed = False

    def attend(self) -> None:
        """Says when the engine is ready, and ends the server once it has failed."""
        engine, start, is_told = self._service.engine, time.monotonic(), False
        while not self.should_exit:
            state = engine.state()
            if state == "ready" and not is_told:
                logs.event("ready", seconds=round(time.monotonic() - start, 1))
                is_told = True
            if state == "failed" and not self._leaving:
                self.has_failed = True
                logs.event("the engine has failed: ending")
                self.should_exit = True  # whoever waits has been told; answers are sent first
            time.sleep(_ATTEND_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Takes SIGTERM and SIGINT."""
        if self._leaving:
            self.should_exit = self.force_exit = True
            # A connection or a device that hangs must not keep it.
            last = threading.Timer(_SECOND_SIGNAL_SECONDS, os._exit, (OK,))
            last.daemon = True
            last.start()
            return
        self._leaving = True
        self._service.is_draining = True
        # Not here: a signal handler must not wait, nor log while a log line is being written.
        threading.Thread(target=self._drain, args=(sig,), name="drain", daemon=True).start()

    def _drain(self, sig: int) -> None:
        seconds = self._seconds
        logs.event("draining", signal=signal.Signals(sig).name, seconds=seconds)
        try:
            engine = self._service.engine
            is_done = engine.drain(seconds)
            self.has_failed = engine.state() == "failed"  # as it may meanwhile
            if not is_done:
                logs.event("time is up: ending what still runs", seconds=seconds)
                engine.close()  # whoever waits gets an end
        finally:
            self.should_exit = True


def bind(flags: HttpFlags) -> socket.socket:
    """A socket that listens where the options say.

    Raises:
        MixtralError: exit code 74 if the address cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            flags.host, flags.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except OSError as error:
        raise MixtralError(
            f"cannot listen on {flags.host}:{flags.port}: {error.strerror or error}",
            fix="choose another --port or --host",
            code=IO_ERROR,
        ) from None
    return made


def serve(app: FastAPI, options: ServeOptions, listening: socket.socket) -> int:
    """Serves until a signal says otherwise, or the engine fails; then closes the engine.

    Returns:
        The exit code: 70 if the engine failed, so that whoever watches starts another.
    """
    service: Service = app.state.service
    server = Server(app, options)
    watching = watch(service, options)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logs.event("listening", url=f"http://{shown}:{port}", model=service.engine.model.name)
    threading.Thread(target=server.attend, name="attend", daemon=True).start()
    try:
        server.run(sockets=[listening])
    finally:
        if watching is not None:
            watching.should_exit = True
        service.engine.close()
        service.tracing.close()
    code = INTERNAL if server.has_failed else OK
    logs.event("ended", code=code)
    return code


def watch(service: Service, options: ServeOptions) -> uvicorn.Server | None:
    """A server of its own for /metrics, in a thread: it answers while the other is busy."""
    port = options.watch.prometheus_port
    if port is None:
        return None

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})

    flags = options.http
    listening = bind(HttpFlags(host=flags.host, port=port, insecure=True))
    config = uvicorn.Config(
        Starlette(routes=[Route("/metrics", metrics)]),
        http=protocol_of(flags),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listening]}, name="metrics", daemon=True
    )
    thread.start()
    return server
