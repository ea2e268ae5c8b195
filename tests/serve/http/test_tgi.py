"""TGI's own routes: answers, details, streams, headers and what they refuse."""

from __future__ import annotations

import json

import pytest

from tests.serve.http.conftest import client_of

pytestmark = pytest.mark.anyio


def events(text: str) -> list[dict]:
    assert text.endswith("\n\n")
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data:{") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


async def test_an_answer(client, engine):
    engine.say(" Hello, world")
    answer = await client.post("/generate", json={"inputs": "Hi"})
    assert answer.status_code == 200
    assert answer.json() == {"generated_text": " Hello, world"}
