"""/v1/completions: texts, ids, echoes, scores, lists of prompts."""

from __future__ import annotations

import json

import pytest

from mixtral_jax.serve.schema.openai import Completion
from tests.serve.http.fake import Script
from tests.serve.http.test_chat import chunks
from tests.test_tokenizer import V1

pytestmark = pytest.mark.anyio
ROUTE = "/v1/completions"


async def test_an_answer_to_a_text_and_to_its_ids_is_the_same(client, engine):
    engine.say("Hello, world")
    ids = V1.encode("Hi", bos=False)
    answers = [
        (await client.post(ROUTE, json={"prompt": prompt, "seed": 1})).json()
        for prompt in ("Hi", ids, [V1.bos_id, *ids], ["Hi"], [ids])
    ]
    for answer in answers:
        Completion.model_validate(answer, strict=True)
        assert answer["choices"] == answers[0]["choices"]
        assert answer["choices"][0]["text"] == " Hello, world"
        assert answer["choices"][0]["finish_reason"] == "stop"
    prompts = {ticket.request.prompt_ids for ticket in engine.tickets}
    assert prompts == {tuple(V1.encode("Hi"))}


async def test_many_prompts_and_many_answers_of_each(client, engine):
    def script(request):
        text = f"{request.prompt_ids[-1]} {request.sampling.sample_id}"
        return Script(token_ids=[*V1.encode(text, bos=False), V1.eos_id])

    engine.script = script
    ids = V1.encode("one two", bos=False)[:2]
    body = {"prompt": [[ids[0]], [ids[1]]], "n": 2}
    found = (await client.post(ROUTE, json=body)).json()
    texts = [choice["text"].strip() for choice in found["choices"]]
    assert texts == [f"{ids[0]} 0", f"{ids[0]} 1", f"{ids[1]} 0", f"{ids[1]} 1"]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert found["usage"]["prompt_tokens"] == 4  # each prompt once, with <s>
    stream = chunks((await client.post(ROUTE, json=body | {"stream": True})).text)
    for index, text in enumerate(texts):
        parts = [c["text"] for chunk in stream for c in chunk["choices"] if c["index"] == index]
        assert "".join(parts).strip() == text


async def test_best_of_keeps_the_most_probable(client, engine):
    def script(request):
        n = request.sampling.sample_id
        ids = [*V1.encode("abc"[n], bos=False), V1.eos_id]
        return Script(token_ids=ids, logprob=[-3.0, -1.0, -2.0][n])

    engine.script = script
    found = (await client.post(ROUTE, json={"prompt": "Hi", "n": 2, "best_of": 3})).json()
    assert [choice["text"] for choice in found["choices"]] == [" b", " c"]


async def test_logprobs_are_parallel_lists(client, engine):
    engine.say("Hello")
    found = (await client.post(ROUTE, json={"prompt": "Hi", "logprobs": 2})).json()
    logprobs = found["choices"][0]["logprobs"]
    size = len(V1.encode("Hello"))
    assert [len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs")] == [
        size
    ] * 3
    assert logprobs["text_offset"][0] == 0
    assert all(len(top) >= 2 for top in logprobs["top_logprobs"])


PROMPTS = ["Hi there", " Hi  there", "wörld 🎉", "<s>Hi</s> there", [5, 2, 9], [V1.bos_id, 7]]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
async def test_offsets_say_where_a_token_lies_in_the_text(client, engine, prompt, stream, echo):
    engine.say("Hello, wörld 🎉")
    body = {"prompt": prompt, "echo": echo, "logprobs": 1, "stream": stream}
    answer = await client.post(ROUTE, json=body)
    parts = chunks(answer.text) if stream else [answer.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    text = "".join(choice["text"] for choice in choices)
    scored = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    offsets = [offset for part in scored for offset in part["text_offset"]]
    tokens = [token for part in scored for token in part["tokens"]]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith("<"):  # neither control piece nor byte
            rest = text[offset:]
            assert rest.startswith(token) or rest.startswith(token.removeprefix(" "))
    assert text[offsets[-1] :] == ""  # </s>
    whole = len(text) - len(" Hello, wörld 🎉")
    assert whole in offsets  # where the answer begins
    assert offsets.count(text.index("ö", whole)) == 2  # both its bytes


@pytest.mark.parametrize("stream", [False, True])
async def test_response_headers(client, engine, stream):
    engine.say("Hello")
    body = {"prompt": ["Hi", "there"], "n": 3, "stream": stream}
    answer = await client.post(ROUTE, json=body)
    size = len(V1.encode("Hi")) + len(V1.encode("there"))
    assert answer.headers["x-prompt-tokens"] == str(size)  # each prompt once, as in usage
    assert answer.headers["x-compute-characters"] == "7"
    assert answer.headers["x-compute-type"] == "jax+1x1"
    if not stream:
        usage = answer.json()["usage"]
        assert usage["prompt_tokens"] == size
        assert answer.headers["x-generated-tokens"] == str(usage["completion_tokens"])
        for name in ("total-time", "validation-time", "queue-time", "inference-time"):
            assert answer.headers[f"x-{name}"]
        assert answer.headers["x-time-per-token"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_has_the_prompt_without_the_bos_that_was_added(client, engine, stream):
    engine.say("there")
    body = {"prompt": "Hi", "echo": True, "logprobs": 1, "stream": stream}
    answer = await client.post(ROUTE, json=body)
    if stream:
        choices = [choice for chunk in chunks(answer.text) for choice in chunk["choices"]]
        text = "".join(choice["text"] for choice in choices)
        scored = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        tokens = [token for part in scored for token in part["tokens"]]
    else:
        text = answer.json()["choices"][0]["text"]
        tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
    assert text == "Hi there"
    prompt = [V1.text_of(i) for i in V1.encode("Hi", bos=False)]
    assert tokens[: len(prompt)] == prompt
    assert engine.tickets[0].request.sampling.prompt_logprobs


async def test_the_request_of_an_evaluation_harness(client, engine):
    """Ids without <s>, echo, one token: scores for each id that was sent, and one more."""
    ids = V1.encode("one two three", bos=False)
    body = {
        "model": "any",
        "prompt": [ids, ids[:2]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    found = (await client.post(ROUTE, json=body)).json()
    for choice, sent in zip(found["choices"], (ids, ids[:2]), strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(sent) + 1
        assert None not in choice["logprobs"]["token_logprobs"]  # <s> is before the first
        tops = choice["logprobs"]["top_logprobs"]
        assert len(tops) == len(sent) + 1
        # Harnesses look up the best token of each place to say whether the answer was greedy.
        pieces = choice["logprobs"]["tokens"]
        assert all(piece in top for piece, top in zip(pieces, tops, strict=True))
    asked = engine.tickets[0].request
    assert asked.prompt_ids == (V1.bos_id, *ids)
    assert asked.sampling.temperature == 0


async def test_no_token_at_all_scores_the_prompt(client, engine):
    body = {"prompt": "Hi", "echo": True, "logprobs": 0, "max_tokens": 0}
    found = (await client.post(ROUTE, json=body)).json()
    assert found["choices"][0]["text"] == "Hi"
    assert len(found["choices"][0]["logprobs"]["tokens"]) == len(V1.encode("Hi", bos=False))
    assert found["usage"]["completion_tokens"] == 0
    stream = chunks((await client.post(ROUTE, json=body | {"stream": True})).text)
    assert "".join(c["text"] for chunk in stream for c in chunk["choices"]) == "Hi"


REFUSED = {
    "suffix": ({"prompt": "Hi", "suffix": "x"}, "suffix"),
    "no prompt": ({"prompt": []}, "prompt: expected a text"),
    "empty ids": ({"prompt": [[]]}, "prompt: expected token ids"),
    "unknown id": ({"prompt": [10**6]}, "prompt: expected token ids below"),
    "mixed": ({"prompt": ["a", 1]}, "prompt"),
    "best_of": ({"prompt": "Hi", "n": 3, "best_of": 2}, "best_of"),
    "best_of stream": ({"prompt": "Hi", "best_of": 2, "stream": True}, "best_of"),
    "nothing": ({"prompt": "Hi", "max_tokens": 0}, "max_tokens"),
    "many": ({"prompt": ["a"] * 33}, "prompt: expected at most 32"),
    "logprobs": ({"prompt": "Hi", "logprobs": 21}, "logprobs"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals(client, engine, name):
    body, message = REFUSED[name]
    answer = await client.post(ROUTE, json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert engine.tickets == []


async def test_a_failure_of_one_prompt_cancels_the_others(client, engine):
    def script(request):
        ids = [5] * 200
        bad = request.prompt_ids[-1] == 7
        return Script(token_ids=ids, delay=0.01, fails_after=1 if bad else None)

    engine.script = script
    answer = await client.post(ROUTE, json={"prompt": [[6], [7], [8]], "max_tokens": 100})
    assert answer.status_code == 424
    assert [ticket.is_cancelled for ticket in engine.tickets] == [True, True, True]
    assert engine.running == set()
    assert json.loads(answer.text)["error"]["code"] == "generation"
