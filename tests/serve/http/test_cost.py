"""What a body within the limits may cost: bodies made to be slow are refused in no time."""

from __future__ import annotations

import difflib
import re

import pytest

from mixtral_jax.serve.schema.common import MOST_IGNORED
from mixtral_jax.serve.schema.openai import ChatRequest, CompletionRequest

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "Hi"}]
MANY = 100_000

WRONG = {
    "prompts": ("/v1/completions", {"prompt": [1.5] * MANY}),
    "ids": ("/v1/completions", {"prompt": [[1.5] * MANY]}),
    "messages": ("/v1/chat/completions", {"messages": [1] * MANY}),
    "tools": ("/v1/chat/completions", {"messages": HI, "tools": [1] * MANY}),
    "stop": ("/v1/chat/completions", {"messages": HI, "stop": [1] * MANY}),
    "biases": (
        "/v1/chat/completions",
        {"messages": HI, "logit_bias": {f"x{n}": "a" for n in range(MANY)}},
    ),
    "TGI's stop": ("/generate", {"inputs": "Hi", "parameters": {"stop": [1] * MANY}}),
    "tokens": ("/detokenize", {"tokens": ["a"] * MANY}),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_list_of_a_wrong_type_is_refused_for_its_first_item(client, name):
    path, body = WRONG[name]
    answer = await client.post(path, json=body)
    assert answer.status_code in (400, 422)
    more = re.search(r"and (\d+) more", answer.text)
    assert more is None or int(more[1]) <= 3  # of a union, one of each kind


async def test_three_hundred_biases_are_the_most(client):
    for number, status in ((300, 200), (301, 400)):
        body = {"messages": HI, "logit_bias": {str(n): 1 for n in range(number)}}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == status


def test_only_the_first_unknown_names_are_looked_at(monkeypatch):
    compared = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda name, *_, **__: compared.append(name))
    body = {"prompt": "Hi"} | {f"unknown{n}": n for n in range(MANY)}
    names = CompletionRequest.model_validate(body).check_names()
    assert names == compared == [f"unknown{n}" for n in range(MOST_IGNORED)]


def test_a_refused_name_is_refused_behind_any_number_of_unknown_ones():
    body = {"messages": HI} | {f"unknown{n}": n for n in range(50)} | {"functions": [{}]}
    with pytest.raises(Exception, match="use tools"):
        ChatRequest.model_validate(body).check_names()
