"""Names that nobody knows: told in a header that every client and proxy can read."""

from __future__ import annotations

from urllib.parse import quote

import httpx
import pytest

from tests.serve.http.live import serving

pytestmark = pytest.mark.anyio


async def test_unknown_parameters_are_named_in_the_answer(client):
    body = {"inputs": "Hi", "options": {"use_cache": False}, "parameters": {"zzz": 1}}
    answer = await client.post("/generate", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-parameters"] == "options, parameters.zzz"


async def test_a_name_cannot_leave_its_header(client):
    body = {"inputs": "Hi", "a\r\nset-cookie: b": 1, "": 1, "x ": 1, "é, b": 1}
    answer = await client.post("/generate", json=body)
    shown = "a%0D%0Aset-cookie%3A%20b, %00, x%20, %C3%A9%2C%20b"
    assert answer.headers["x-ignored-parameters"] == shown
    assert "set-cookie" not in answer.headers


def test_any_name_is_a_header_that_http_allows(engine):
    """The one over a socket: without h11 in between, anything is a header."""
    with serving(engine) as port:
        for name in (" ", "x ", "\r\n", "\x00", "é" * 64):
            body = {"inputs": "Hi", name: 1}
            answer = httpx.post(f"http://127.0.0.1:{port}/generate_stream", json=body)
            assert answer.status_code == 200
            assert answer.headers["x-ignored-parameters"] == quote(name)
    assert engine.running == set()


async def test_long_names_do_not_make_a_long_header(client):
    body = {"inputs": "Hi"} | {f"{n}" + "🎉" * 63: 1 for n in range(10)}
    answer = await client.post("/generate", json=body)
    assert answer.headers["x-ignored-parameters"] == "0" + quote("🎉") * 63
