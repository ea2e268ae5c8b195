"""Tokens of texts and conversations, and what else routes tell without generating."""

from __future__ import annotations

import json

import pytest

from mixtral_jax.chat import encode_chat
from mixtral_jax.serve.app import create_app
from mixtral_jax.serve.schema.tgi import Info
from tests.serve.http.conftest import client_of
from tests.serve.http.fake import options
from tests.serve.http.test_tgi import events
from tests.test_chat import V3
from tests.test_tokenizer import V1

pytestmark = pytest.mark.anyio


async def test_tokenize_as_tgi(client):
    found = (await client.post("/tokenize", json={"inputs": "Hi, wörld 🎉"})).json()
    assert [token["id"] for token in found] == V1.encode("Hi, wörld 🎉")
    text = "Hi, wörld 🎉"
    shown = "".join(text[token["start"] : token["stop"]] for token in found)
    assert shown == text
    # As TGI: the text of a token is what lies there; no piece has a name of its own.
    assert "".join(token["text"] for token in found[1:]).removeprefix(" ") == text
    starts = [token["start"] for token in found[1:]]
    assert starts == [token["stop"] for token in found[:-1]]


async def test_tokenize_as_a_harness(client):
    async def ids(text, **more):
        answer = await client.post("/tokenize", json={"prompt": text, **more})
        return answer.json()["tokens"]

    assert await ids("Hi") == V1.encode("Hi")
    assert await ids("Hi", add_special_tokens=False) == V1.encode("Hi", bos=False)
    assert await ids("<s>", add_special_tokens=False) == [V1.bos_id]
    assert await ids("</s>", add_special_tokens=False) == [V1.eos_id]


async def test_detokenize(client):
    ids = V1.encode("Hi, wörld")
    assert (await client.post("/detokenize", json={"tokens": ids})).json() == {
        "prompt": "Hi, wörld"
    }
    answer = await client.post("/detokenize", json={"tokens": [10**6]})
    assert answer.status_code == 422


async def test_tokenizer_info(client):
    found = (await client.get("/tokenizer_info")).json()
    assert (found["bos_token"], found["eos_token"]) == ("<s>", "</s>")


async def test_chat_tokenize(engine_v3):
    messages = [{"role": "user", "content": "Hi"}]
    async with client_of(engine_v3) as client:
        found = (await client.post("/chat_tokenize", json={"messages": messages})).json()
        bad = await client.post("/chat_tokenize", json={"messages": [{"role": "me"}]})
    ids = [token["id"] for token in found["tokenize_response"]]
    assert ids == encode_chat(V3, messages)
    assert found["templated_text"] == "<s>[INST] Hi[/INST]"
    assert (bad.status_code, bad.json()["error_type"]) == (422, "template_error")


async def test_invocations_are_told_apart_by_their_fields(client, engine):
    engine.say("Hello")
    found = (await client.post("/invocations", json={"inputs": "Hi"})).json()
    assert found == [{"generated_text": " Hello"}]
    stream = await client.post("/invocations", json={"inputs": "Hi", "stream": True})
    assert events(stream.text)[-1]["generated_text"] == " Hello"
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    found = (await client.post("/invocations", json=chat)).json()
    assert found["object"] == "chat.completion"
    found = (await client.post("/invocations", json={"prompt": "Hi"})).json()
    assert found["object"] == "text_completion"
    assert (await client.post("/invocations", json={"x": 1})).status_code == 422


async def test_an_invocation_is_refused_for_what_is_wrong_with_its_own_form(client):
    hi = [{"role": "user", "content": "Hi"}]
    for body, message in (
        ({"messages": hi, "temperature": -1}, "temperature: Input should be greater than"),
        ({"prompt": "Hi", "best_of": 0}, "best_of: Input should be greater than"),
        ({"inputs": 5, "prompt": "Hi"}, "inputs: Input should be a valid string"),
        ([1], "CompatGenerateRequest"),
    ):
        answer = await client.post("/invocations", json=body)
        assert answer.status_code in (400, 422)
        assert answer.json()["error"].startswith(message)


async def test_info(client):
    found = (await client.get("/info")).json()
    Info.model_validate(found, strict=True)
    assert found["max_total_tokens"] == 512
    assert found["max_best_of"] == 8
    assert found["adapters"] == ["poet"]


async def test_models(client):
    found = (await client.get("/v1/models")).json()
    assert [model["id"] for model in found["data"]] == ["fake", "poet"]
    assert (await client.get("/v1/models/poet")).json()["id"] == "poet"
    missing = await client.get("/v1/models/none")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("state", "health", "live"),
    [("ready", 200, 200), ("loading", 503, 200), ("draining", 503, 200), ("failed", 503, 503)],
)
async def test_health(client, engine, state, health, live):
    engine.set_state(state)
    assert (await client.get("/health")).status_code == health
    assert (await client.get("/ping")).status_code == health
    assert (await client.get("/live")).status_code == live
    statuses = [(await client.head(path)).status_code for path in ("/health", "/ping", "/live")]
    assert statuses == [health, health, live]
    assert (await client.head("/")).status_code == 200


async def test_experts(client):
    found = (await client.get("/experts")).json()
    assert found == {"load": [[1, 2, 3, 4], [4, 3, 2, 1]], "dropped": [0, 5]}


async def test_the_page_speaks_with_nobody_else(client):
    answer = await client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "connect-src 'self'" in policy
    assert "default-src 'none'" in policy


async def test_documents(client):
    one = (await client.get("/openapi.json")).json()
    two = (await client.get("/api-doc/openapi.json")).json()
    assert one == two
    routes = {
        "/", "/generate", "/generate_stream", "/info", "/health", "/live", "/ping", "/metrics",
        "/tokenize", "/detokenize", "/tokenizer_info", "/chat_tokenize", "/invocations",
        "/v1/chat/completions", "/v1/completions", "/v1/models",
    }  # fmt: skip
    assert routes <= set(one["paths"])


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [("GET", "/nothing", 404, "not_found"), ("GET", "/generate", 405, "method_not_allowed")],
)
async def test_wrong_addresses(client, method, path, status, kind):
    answer = await client.request(method, path)
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)
    answer = await client.request(method, "/v1/nothing")
    assert answer.json()["error"]["code"] == "not_found"


async def test_a_checkpoint_without_a_tokenizer_serves_ids(engine):
    import httpx

    app = create_app(engine, None, options())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post("/v1/completions", json={"prompt": [1, 5], "max_tokens": 2})
        assert answer.status_code == 200
        for path, body in (
            ("/generate", {"inputs": "Hi"}),
            ("/v1/completions", {"prompt": "Hi"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
            ("/tokenize", {"prompt": "Hi"}),
        ):
            refused = await client.post(path, json=body)
            assert refused.status_code in (400, 422)
            assert "no tokenizer" in json.dumps(refused.json())
