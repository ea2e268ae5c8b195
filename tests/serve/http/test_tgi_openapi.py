"""What TGI's published OpenAPI document allows is answered here, the documented exceptions aside.

The document is TGI's (docs/openapi.json of its repository) and no part of this one: its path comes
from MIXTRAL_JAX_TGI_OPENAPI. docs/serve.md lists what differs; ``usual`` takes that out of a body.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import given, settings
from starlette.testclient import TestClient

from tests.serve.http.conftest import application
from tests.serve.http.fake import FakeEngine
from tests.serve.http.test_contract import SLOW, quick
from tests.test_tokenizer import V1

FILE = os.environ.get("MIXTRAL_JAX_TGI_OPENAPI")
EXAMPLES = int(os.environ.get("MIXTRAL_JAX_CONTRACT_EXAMPLES", "200"))
PATHS = (
    "/", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/invocations",
    "/v1/chat/completions", "/v1/completions",
)  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason="MIXTRAL_JAX_TGI_OPENAPI names no file"),
]


def as_31(part: Any) -> Any:
    """The document in OpenAPI 3.1: null is a type there, and defaults are no words for it."""
    if isinstance(part, list):
        return [as_31(each) for each in part]
    if not isinstance(part, dict):
        return part
    found = {k: as_31(v) for k, v in part.items() if k not in ("default", "example", "nullable")}
    is_schema = "type" in found or "allOf" in found
    if part.get("nullable") is True and is_schema:
        return {"anyOf": [found, {"type": "null"}]}
    return found | ({"openapi": "3.1.0"} if "openapi" in found else {})


def _within(body: dict[str, Any], name: str, least: float, most: float) -> None:
    value = body.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        # To a schema 1.0 is an integer, to TGI and to us it is none.
        kind = int if isinstance(least, int) else float
        body[name] = kind(min(max(value, least), most))


def usual(body: Any) -> Any:
    """The body without what docs/serve.md says is not offered, and within its limits."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if isinstance(body.get("parameters"), dict):
        body["parameters"] = usual(body["parameters"])
    for name in ("adapter_id", "suffix", "tools", "tool_choice", "tool_prompt", "guideline"):
        body.pop(name, None)
    for name in ("logit_bias", "model"):
        body.pop(name, None)
    if body.get("watermark"):
        body["watermark"] = False
    for name in ("max_new_tokens", "max_tokens"):
        _within(body, name, 1, 8)
    for name in ("truncate", "n", "best_of", "top_n_tokens", "top_logprobs"):
        _within(body, name, 1, 2)
    for name in ("frequency_penalty", "presence_penalty"):
        _within(body, name, -2.0, 2.0)
    _within(body, "temperature", 0.01, 100)
    _within(body, "repetition_penalty", 0.1, 10)
    _within(body, "top_k", 1, 2**31 - 1)
    for name in ("top_p", "typical_p", "min_p"):
        _within(body, name, 0.01, 1)
    _within(body, "seed", 0, 2**63 - 1)
    body.pop("best_of", None)  # needs sampling, and no stream
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if isinstance(body.get("stop"), list):
        body["stop"] = [text[:20] for text in body["stop"][:4] if text]
    for name in ("grammar", "response_format"):
        if body.get(name) is not None:
            body[name] = {"type": "json", "value": SCHEMA}
    if "messages" in body:
        body["messages"] = [{"role": "user", "content": str(body["messages"])[:200]}]
    if isinstance(body.get("prompt"), list):
        body["prompt"] = [text[:200] for text in body["prompt"][:32]] or ["a"]
    if isinstance(body.get("inputs"), str):
        body["inputs"] = body["inputs"][:400]
    return body


def test_what_tgi_takes_is_taken():
    assert FILE is not None
    document = as_31(json.loads(Path(FILE).read_text("utf-8")))
    client = TestClient(application(FakeEngine(V1, quick)), base_url="http://localhost")
    checked, answered = 0, 0
    schema: Any = schemathesis.openapi.from_dict(document)
    for operation in schema.get_all_operations():
        found = operation.ok()
        if found.method.upper() != "POST" or found.path not in PATHS:
            continue

        @given(case=found.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=SLOW, database=None)
        def check(case: Any) -> None:
            nonlocal answered
            path, body = case.operation.path, usual(case.body)
            answer = client.post(path, json=body)
            assert answer.status_code == 200, (path, body, answer.text)
            answered += 1

        check()
        checked += 1
    assert checked == len(PATHS)
    print(f"{answered} requests were answered")


def test_the_check_sees_a_refusal():
    client = TestClient(application(FakeEngine(V1, quick)), base_url="http://localhost")
    body = {"inputs": "a", "parameters": {"watermark": True}}
    assert client.post("/generate", json=body).status_code == 422
    assert client.post("/generate", json=usual(body)).status_code == 200
