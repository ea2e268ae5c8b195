"""What a body within the limits may cost: bodies made to be slow are refused in no time."""

from __future__ import annotations

import difflib
import re
import threading

import pytest

from mixtral_jax.serve.schema.common import MOST_IGNORED
from mixtral_jax.serve.schema.openai import ChatRequest, CompletionRequest
from mixtral_jax.tokenizer import Tokenizer
from tests.test_tokenizer import V1

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


TEXTS = {
    "/generate": {"inputs": "Hi", "parameters": {"truncate": 5}},
    "/generate_stream": {"inputs": "Hi"},
    "/v1/completions": {"prompt": ["Hi"]},
    "/v1/chat/completions": {"messages": HI},
    "/tokenize": {"inputs": "Hi"},
    "/chat_tokenize": {"messages": HI},
}


@pytest.mark.parametrize("path", TEXTS)
async def test_texts_are_cut_while_others_are_answered(client, monkeypatch, path):
    threads = []
    encode = Tokenizer.encode

    def watched(*args, **options):
        threads.append(threading.get_ident())
        return encode(*args, **options)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    assert (await client.post(path, json=TEXTS[path])).status_code == 200
    assert threads
    assert threading.get_ident() not in threads


async def test_what_no_prompt_can_be_is_not_cut(client, engine, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", None)  # whoever cuts it fails
    text = "a" * (V1.longest_piece * (engine.limits.max_input_tokens + 1))
    parts = [{"type": "text", "text": text}]
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}),
        ("/chat_tokenize", {"messages": [{"role": "user", "content": parts}]}),
        ("/tokenize", {"inputs": text}),
        ("/v1/completions", {"prompt": ["a"] * 33}),
    ):
        assert (await client.post(path, json=body)).status_code in (400, 422)


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
