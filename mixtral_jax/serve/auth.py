"""API keys: where they come from, who has one, and which host names a local server answers to."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.serve.bounds import send_failure
from mixtral_jax.serve.failures import Failure
from mixtral_jax.serve.options import LOCAL_HOSTS, HttpFlags

ENVIRONMENT = "API_KEY"
# Probes carry no key, and the page asks for one itself.
_OPEN = {
    ("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("GET", "/live"), ("GET", "/ping"),
    ("HEAD", "/health"), ("HEAD", "/live"), ("HEAD", "/ping"),
}  # fmt: skip


def read_keys(flags: HttpFlags, environ: Mapping[str, str]) -> tuple[bytes, ...]:
    """The API keys of this server: of the file, one a line, and of the environment.

    Raises:
        MixtralError: exit code 66 without the file, 65 if it has no key or the environment's is
            blank; 64 where others could reach a server without one.
    """
    given = environ.get(ENVIRONMENT, "")
    keys = [given.strip()] if given else []  # secrets of files often end with a newline
    if given and not given.strip():
        raise MixtralError(
            f"environment variable {ENVIRONMENT}",
            expected="a key",
            got="white space",
            fix="set a key, or leave it out",
            code=BAD_DATA,
        )
    if flags.api_key_file is not None:
        keys += _lines(flags.api_key_file)
    if not keys and flags.host not in LOCAL_HOSTS and not flags.insecure:
        raise MixtralError(
            f"--host {flags.host} lets other machines in",
            expected=f"an API key (environment {ENVIRONMENT}, or --api-key-file)",
            got="none",
            fix="set one, or --insecure where something in front keeps them out",
            code=USAGE,
        )
    return tuple(key.encode("utf-8", "surrogateescape") for key in keys)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        raise MixtralError(
            f"no key file at {path}", fix="name another --api-key-file", code=INPUT_NOT_FOUND
        ) from None
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise MixtralError(
            str(path), expected="one key a line", got="none", fix="add one", code=BAD_DATA
        )
    return keys


class Auth:
    """Middleware that asks for a key, or on a local server without one for a local name.

    A request with a key gets the key's digest as its ``cache_key``. A local server without a key
    answers only to local host names: a web page could otherwise reach it under a name of its own
    (DNS rebinding).

    Args:
        app: the application.
        keys: any of which is enough; none for a server without.
        flags: where the server listens.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[bytes], flags: HttpFlags):
        self._app = app
        self._keys = tuple(keys)
        self._checks_host = not keys and flags.host in LOCAL_HOSTS and not flags.insecure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["cache_key"] = self._check(scope)
        except Failure as failure:
            await send_failure(scope, send, failure)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> str:
        headers = dict(scope["headers"])
        if self._checks_host and not _is_local(headers.get(b"host", b"localhost")):
            message = "host: expected a name of this machine; fix: set a key, or --insecure"
            raise Failure("unauthorized", message)
        if not self._keys:
            return ""
        if (scope["method"], scope["path"]) in _OPEN:
            return ""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip()
        # All are compared, so that the time does not tell which one is near.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Failure("unauthorized", "expected the header Authorization: Bearer <API key>")
        return hashlib.sha256(given).hexdigest()


def _is_local(host: bytes) -> bool:
    name = host.decode("latin-1").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
