"""Keys: where they come from, what they open, and what a server without one refuses."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.serve.auth import read_keys
from mixtral_jax.serve.options import HttpFlags
from tests.serve.http.conftest import client_of

KEY = "clé-secrète"
OPEN = ["/health", "/live", "/ping", "/"]
CLOSED = ["/info", "/metrics", "/v1/models", "/tokenizer_info", "/openapi.json", "/experts", "/x"]
POSTS = [
    "/", "/generate", "/generate_stream", "/invocations", "/tokenize", "/detokenize",
    "/chat_tokenize", "/v1/chat/completions", "/v1/completions",
]  # fmt: skip


def bearer(key: str) -> Any:
    return {"authorization": f"Bearer {key}".encode()}


@pytest.mark.anyio
async def test_every_route_but_probes_and_page_asks_for_the_key(engine):
    async with client_of(engine, keys=(KEY.encode(),)) as client:
        for path in OPEN:
            assert (await client.get(path)).status_code == 200
            assert (await client.head(path)).status_code == 200
        refused = [await client.get(path) for path in CLOSED]
        refused += [await client.post(path, json={"inputs": "Hi"}) for path in POSTS]
        basic: Any = {"authorization": KEY.encode()}
        for headers in (
            bearer("other"),
            bearer(KEY + "x"),
            bearer(""),
            basic,
        ):
            refused.append(await client.get("/info", headers=headers))
        for answer in refused:
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert refused[2].json()["error"]["code"] == "invalid_api_key"
        assert refused[0].json()["error_type"] == "unauthorized"
        for path in CLOSED[:-1]:
            assert (await client.get(path, headers=bearer(KEY))).status_code == 200
        answer = await client.post("/generate", json={"inputs": "Hi"}, headers=bearer(KEY))
        assert answer.status_code == 200
    assert len(engine.tickets) == 1
    key = engine.tickets[0].request.cache_key
    assert key == hashlib.sha256(KEY.encode()).hexdigest()


@pytest.mark.anyio
async def test_each_of_several_keys_opens_and_has_a_cache_of_its_own(engine):
    async with client_of(engine, keys=(b"a", b"b")) as client:
        for key in "ab":
            answer = await client.post("/generate", json={"inputs": "Hi"}, headers=bearer(key))
            assert answer.status_code == 200
    assert len({ticket.request.cache_key for ticket in engine.tickets}) == 2


@pytest.mark.anyio
async def test_a_local_server_without_a_key_answers_to_local_names_only(engine):
    async with client_of(engine) as client:
        for host in ("localhost:3000", "127.0.0.1:3000", "[::1]:3000", "127.8.9.1", "a.localhost"):
            answer = await client.get("/info", headers={"host": host})
            assert answer.status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1", ""):
            answer = await client.get("/info", headers={"host": host})
            assert answer.status_code == 401
    async with client_of(engine, insecure=True) as client:
        assert (await client.get("/info", headers={"host": "proxy.example"})).status_code == 200
    async with client_of(engine, keys=(b"k",)) as client:
        headers = {"host": "proxy.example", **bearer("k")}
        assert (await client.get("/info", headers=headers)).status_code == 200


@pytest.mark.anyio
async def test_other_origins_only_where_they_are_named(engine):
    origin = {"origin": "https://app.example"}
    asks = {"access-control-request-method": "POST", **origin}
    async with client_of(engine) as client:
        answer = await client.options("/generate", headers=asks)
        assert "access-control-allow-origin" not in answer.headers
    async with client_of(
        engine, keys=(b"k",), cors_allow_origin=("https://app.example",)
    ) as client:
        answer = await client.options("/generate", headers=asks)  # a preflight carries no key
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = {**asks, "origin": "https://evil.example"}
        answer = await client.options("/generate", headers=other)
        assert "access-control-allow-origin" not in answer.headers
        answer = await client.get("/info", headers=origin | bearer("k"))
        assert answer.headers["access-control-allow-origin"] == "https://app.example"


def test_keys_come_from_the_environment_and_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n", encoding="utf-8")
    assert read_keys(HttpFlags(api_key_file=file), {"API_KEY": "zero"}) == (b"zero", b"one", b"two")
    assert read_keys(HttpFlags(), {}) == ()


def test_a_key_of_the_environment_is_read_as_a_line_of_a_file_is():
    assert read_keys(HttpFlags(), {"API_KEY": " secret\n"}) == (b"secret",)
    assert read_keys(HttpFlags(), {"API_KEY": ""}) == ()
    with pytest.raises(MixtralError, match="API_KEY: expected a key, got white space") as caught:
        read_keys(HttpFlags(insecure=True), {"API_KEY": "\n"})  # else open to everybody
    assert caught.value.code == BAD_DATA


def test_bad_key_files(tmp_path):
    with pytest.raises(MixtralError, match="no key file") as caught:
        read_keys(HttpFlags(api_key_file=tmp_path / "none"), {})
    assert caught.value.code == INPUT_NOT_FOUND
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(MixtralError, match="one key a line") as caught:
        read_keys(HttpFlags(api_key_file=tmp_path / "empty"), {})
    assert caught.value.code == BAD_DATA


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_another_address_needs_a_key(host):
    with pytest.raises(MixtralError, match="lets other machines in") as caught:
        read_keys(HttpFlags(host=host), {})
    assert caught.value.code == USAGE
    assert read_keys(HttpFlags(host=host), {"API_KEY": "k"}) == (b"k",)
    assert read_keys(HttpFlags(host=host, insecure=True), {}) == ()
