"""TGI's own routes: answers, details, streams, headers and what they refuse."""

from __future__ import annotations

import json

import httpx
import pytest

from mixtral_jax.serve.request import ServeRequest, ServeSampling
from mixtral_jax.serve.schema.tgi import GenerateResponse, StreamResponse
from tests.serve.http.conftest import client_of
from tests.serve.http.fake import Script
from tests.serve.http.live import serving
from tests.test_tokenizer import V1

pytestmark = pytest.mark.anyio
HELLO = " Hello, world"


def events(text: str) -> list[dict]:
    assert text.endswith("\n\n")
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data:{") for line in lines)  # as TGI frames them, and no [DONE]
    return [json.loads(line.removeprefix("data:")) for line in lines]


async def test_an_answer(client, engine):
    engine.say("Hello, world")
    answer = await client.post("/generate", json={"inputs": "Hi"})
    assert answer.status_code == 200
    assert answer.json() == {"generated_text": HELLO}
    asked = engine.tickets[0].request
    assert asked.prompt_ids == tuple(V1.encode("Hi"))
    assert asked.sampling.temperature == 0
    assert asked.sampling.max_new_tokens == 512 - len(asked.prompt_ids)  # what the limits leave


async def test_every_parameter_reaches_the_engine(client, engine):
    parameters = {
        "adapter_id": "poet",
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "typical_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "seed": 2**64 - 1,
        "stop": ["END"],
        "max_new_tokens": 3,
        "top_n_tokens": 2,
        "decoder_input_details": True,
        "truncate": 2,
        "grammar": {"type": "json", "value": {"type": "object"}},
    }
    await client.post("/generate", json={"inputs": "one two three", "parameters": parameters})
    asked = engine.tickets[0].request
    assert asked.adapter_id == "poet"
    whole = V1.encode("one two three")
    assert asked.prompt_ids == (whole[0], whole[-1])
    expected = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "typical_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.3,
        "seed": 2**64 - 1,
        "stop": ("END",),
        "max_new_tokens": 3,
        "top_logprobs": 2,
        "prompt_logprobs": True,
    }
    found = {name: getattr(asked.sampling, name) for name in expected}
    assert found == expected
    grammar = asked.sampling.grammar
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", {"type": "object"})


@pytest.mark.parametrize("one", [{"do_sample": True}, {"top_k": 5}, {"temperature": 1.0}])
async def test_sampling_is_on_with_do_sample_or_any_option_of_it(client, engine, one):
    await client.post("/generate", json={"inputs": "Hi", "parameters": one})
    assert engine.tickets[0].request.sampling.temperature == 1.0


async def test_details(client, engine):
    engine.say("Hello, world")
    parameters = {"details": True, "decoder_input_details": True, "top_n_tokens": 2}
    answer = await client.post("/generate", json={"inputs": "Hi", "parameters": parameters})
    GenerateResponse.model_validate(answer.json(), strict=True)
    details = answer.json()["details"]
    ids = [*V1.encode("Hello, world", bos=False), V1.eos_id]
    assert [token["id"] for token in details["tokens"]] == ids
    assert details["tokens"][-1] == {"id": 2, "text": "</s>", "logprob": -0.5, "special": True}
    assert (details["finish_reason"], details["generated_tokens"]) == ("eos_token", len(ids))
    assert details["seed"] is None  # greedy
    assert [token["id"] for token in details["prefill"]] == V1.encode("Hi")
    assert details["prefill"][0]["logprob"] is None
    assert all(len(top) == 2 for top in details["top_tokens"])


async def test_no_token_shows_the_name_of_its_piece(client, engine):
    """TGI decodes each by itself: what is no whole character is U+FFFD."""
    text = "wörld\n"
    engine.say(text)
    parameters = {"details": True, "decoder_input_details": True, "top_n_tokens": 1}
    answer = await client.post("/generate", json={"inputs": text, "parameters": parameters})
    details = answer.json()["details"]
    shown = ["\ufffd", "\ufffd", "\n"]  # two bytes of the ö, and a newline
    tops = [top["text"] for (top,) in details["top_tokens"]]
    for texts in ([token["text"] for token in details["prefill"]], tops):
        assert [piece for piece in texts if piece in shown] == shown
        assert not any(piece.startswith("<0x") for piece in texts)


async def test_best_of_gives_the_most_probable_and_lists_the_others(client, engine):
    def script(request):
        n = request.sampling.sample_id
        ids = [*V1.encode("abc"[n], bos=False), V1.eos_id]
        return Script(token_ids=ids, logprob=[-2.0, -1.0, -3.0][n])

    engine.script = script
    parameters = {"best_of": 3, "do_sample": True, "seed": 5, "details": True}
    answer = await client.post("/generate", json={"inputs": "Hi", "parameters": parameters})
    found = answer.json()
    assert found["generated_text"] == " b"
    others = found["details"]["best_of_sequences"]
    assert [other["generated_text"] for other in others] == [" a", " c"]
    GenerateResponse.model_validate(found, strict=True)


@pytest.mark.parametrize("stop", [[], ["zzz"]])
@pytest.mark.parametrize("most", [2, 100])
async def test_a_stream_is_one_event_per_token_and_the_last_has_everything(
    client, engine, stop, most
):
    engine.say("Hello, world")
    parameters = {"stop": stop, "max_new_tokens": most, "do_sample": True, "seed": 3}
    body = {"inputs": "Hi", "parameters": parameters}
    answer = await client.post("/generate_stream", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    found = events(answer.text)
    for event in found:
        StreamResponse.model_validate(event, strict=True)
    ids = [*V1.encode("Hello, world", bos=False), V1.eos_id][:most]
    assert [event["token"]["id"] for event in found] == ids
    assert [event["index"] for event in found] == list(range(1, len(ids) + 1))
    assert all(event["details"] is event["generated_text"] is None for event in found[:-1])
    assert found[-1]["details"] == {
        "finish_reason": "length" if most == 2 else "eos_token",
        "generated_tokens": len(ids),
        "input_length": len(V1.encode("Hi")),
        "seed": 3,
    }
    whole = await client.post("/generate", json=body)
    assert found[-1]["generated_text"] == whole.json()["generated_text"]


@pytest.mark.parametrize("stop", [[], ["STOP"], ["zzz"]])
async def test_the_texts_of_streamed_tokens_add_up_to_the_answer(client, engine, stop):
    """As clients join them: lines and characters of several bytes are pieces of bytes."""
    text = "ab\ncd 🎉 STOP ef"
    assert {V1.byte_of(i) for i in V1.encode(text)} >= {0x0A, 0xF0}
    engine.say(text)
    body = {"inputs": "Hi", "parameters": {"stop": stop, "max_new_tokens": 100, "details": True}}
    found = events((await client.post("/generate_stream", json=body)).text)
    joined = "".join(event["token"]["text"] for event in found if not event["token"]["special"])
    assert joined == found[-1]["generated_text"]
    whole = (await client.post("/generate", json=body)).json()
    tokens = [token["text"] for token in whole["details"]["tokens"] if not token["special"]]
    assert "".join(tokens) == whole["generated_text"] == joined


async def test_a_token_is_sent_before_the_next_one_is_made(engine):
    """Streams hold nothing back, unless a token may be the last one."""
    engine.say("Hello, world", delay=0.05)
    seen = await sent_while_made(engine, "/generate_stream", {"inputs": "Hi"})
    number_made = {event["index"]: made for made, event in seen}
    last = max(number_made)
    assert number_made == {n: n for n in range(1, last + 1)}


async def sent_while_made(engine, path, body):
    """Each event of a stream, and how many tokens the engine had made when it was sent."""
    seen = []
    with serving(engine) as port:
        url = f"http://127.0.0.1:{port}{path}"
        async with httpx.AsyncClient() as client, client.stream("POST", url, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    made = engine.tickets[-1].made
                    seen.append((made, json.loads(line.removeprefix("data:"))))
    return seen


async def test_the_root_answers_with_a_list_and_streams_on_demand(client, engine):
    engine.say("Hello, world")
    answer = await client.post("/", json={"inputs": "Hi"})
    assert answer.json() == [{"generated_text": HELLO}]
    answer = await client.post("/", json={"inputs": "Hi", "stream": True})
    assert events(answer.text)[-1]["generated_text"] == HELLO


async def test_the_prompt_comes_back_where_asked_for(client, engine):
    engine.say("there")
    body = {"inputs": "Hi", "parameters": {"return_full_text": True}}
    assert (await client.post("/generate", json=body)).json()["generated_text"] == "Hi there"
    stream = await client.post("/generate_stream", json=body)
    assert events(stream.text)[-1]["generated_text"] == "Hi there"


async def test_a_stop_string_ends_the_text_and_stays_in_it(client, engine):
    engine.say("one two three four")
    body = {"inputs": "Hi", "parameters": {"stop_sequences": ["three"], "details": True}}
    asked = (await client.post("/generate", json=body)).json()
    assert asked["details"]["finish_reason"] == "stop_sequence"
    assert engine.tickets[0].request.sampling.include_stop


async def test_control_pieces_written_in_a_prompt_become_their_ids(client, engine):
    await client.post("/generate", json={"inputs": "<s>[INST] Hi [/INST]"})
    ids = engine.tickets[0].request.prompt_ids
    assert ids == tuple(V1.encode("[INST] Hi [/INST]"))
    assert ids.count(V1.bos_id) == 1


async def test_response_headers(client, engine):
    engine.say("Hello, world")
    headers = (await client.post("/generate", json={"inputs": "Hi there"})).headers
    assert headers["x-compute-characters"] == "8"
    assert headers["x-prompt-tokens"] == str(len(V1.encode("Hi there")))
    assert headers["x-generated-tokens"] == str(len(V1.encode("Hello, world")))
    assert headers["x-queue-time"] == "1"
    assert headers["x-inference-time"] == "5"
    assert float(headers["x-compute-time"]) > 0
    for name in ("x-compute-type", "x-total-time", "x-validation-time", "x-time-per-token"):
        assert headers[name]


REFUSED = {
    "too long": ({"max_new_tokens": 512}, "max_new_tokens: expected at most 512 tokens"),
    "watermark": ({"watermark": True}, "watermark: not offered"),
    "best_of": ({"best_of": 9, "do_sample": True}, "best_of: expected at most 8"),
    "greedy best_of": ({"best_of": 2}, "best_of: greedy"),
    "top_n_tokens": ({"top_n_tokens": 21}, "top_n_tokens"),
    "stop": ({"stop": ["a"] * 5}, "stop: expected at most 4"),
    "long stop": ({"stop": ["é" * 129]}, "stop: expected texts of 1 to 256 bytes, got 258"),
    "empty stop": ({"stop": [""]}, "stop: expected texts"),
    "temperature 0": ({"temperature": 0}, "temperature"),
    "top_p": ({"top_p": 1.1}, "top_p"),
    "seed": ({"seed": 2**64}, "seed"),
    "a number as text": ({"top_k": "5"}, "top_k"),
    "true as a number": ({"max_new_tokens": True}, "max_new_tokens"),
    "a fraction of a token": ({"max_new_tokens": 1.0}, "max_new_tokens"),
    "adapter": ({"adapter_id": "nobody"}, "adapter_id: expected poet, got 'nobody'"),
    "grammar": ({"grammar": {"type": "regex", "value": "("}}, "grammar"),
    "grammar kind": ({"grammar": {"type": "lark", "value": "x"}}, "grammar"),
    "grammar text": ({"grammar": {"type": "json", "value": "{"}}, "grammar: its JSON schema"),
    "grammar list": ({"grammar": {"type": "json", "value": "[]"}}, "grammar: expected a JSON"),
    "OpenAI's name": ({"max_tokens": 5}, "parameters.max_tokens: OpenAI's name, not known here"),
    "repetition": ({"repetition_penalty": 100.1}, "repetition_penalty"),
    "misspelled": ({"temprature": 0.5}, "fix: temperature"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_are_422_and_name_the_parameter(client, engine, name, stream):
    parameters, message = REFUSED[name]
    route = "/generate_stream" if stream else "/generate"
    answer = await client.post(route, json={"inputs": "Hi", "parameters": parameters})
    assert answer.status_code == 422
    assert answer.json()["error_type"] == "validation"
    assert message in answer.json()["error"]
    assert engine.running == set()


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens"])
async def test_a_length_in_the_wrong_place_is_refused(client, engine, name):
    answer = await client.post("/generate", json={"inputs": "Hi", name: 5})
    assert answer.status_code == 422
    assert "parameters" in answer.json()["error"]
    assert engine.tickets == []


async def test_the_longest_request_is_accepted_and_one_more_token_refused(client, engine):
    room = 512 - len(V1.encode("Hi"))
    for asked, status in ((room - 1, 200), (room, 200), (room + 1, 422)):
        body = {"inputs": "Hi", "parameters": {"max_new_tokens": asked}}
        assert (await client.post("/generate", json=body)).status_code == status


async def test_a_prompt_that_is_too_long_however_it_is_cut_is_refused_uncut(
    client, engine, monkeypatch
):
    most = engine.limits.max_input_tokens
    monkeypatch.setattr(type(V1), "encode", None)  # whoever cuts it fails
    text = "a" * (V1.longest_piece * (most + 1))
    answer = await client.post("/generate", json={"inputs": text})
    assert answer.status_code == 422
    assert f"at most {most} tokens, got {most + 1} or more" in answer.json()["error"]
    body = {"messages": [{"role": "user", "content": text}]}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 400


async def test_a_failure_is_424_and_in_a_stream_the_last_event(client, engine):
    engine.say("Hello, world", fails_after=2)
    answer = await client.post("/generate", json={"inputs": "Hi"})
    assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
    found = events((await client.post("/generate_stream", json={"inputs": "Hi"})).text)
    assert [event["token"]["id"] for event in found[:-1]] == V1.encode("Hello, world")[1:3]
    assert found[-1] == {"error": "scripted: generation", "error_type": "generation"}


async def test_a_full_queue_is_429_with_a_time_to_come_again(engine):
    limits = {**engine.limits.__dict__, "max_concurrent_requests": 1}
    engine.limits = engine.limits.__class__(**limits)
    engine.submit(ServeRequest(prompt_ids=(1, 5), sampling=ServeSampling()))
    async with client_of(engine) as client:
        answer = await client.post("/generate", json={"inputs": "Hi"})
    assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
    assert answer.headers["retry-after"] == "3"


async def test_samples_are_taken_all_or_none(engine):
    limits = {**engine.limits.__dict__, "max_concurrent_requests": 3}
    engine.limits = engine.limits.__class__(**limits)
    other = engine.submit(ServeRequest(prompt_ids=(1, 5), sampling=ServeSampling()))
    async with client_of(engine) as client:
        body = {"inputs": "Hi", "parameters": {"best_of": 3, "do_sample": True}}
        assert (await client.post("/generate", json=body)).status_code == 429
    assert [ticket.is_cancelled for ticket in engine.tickets] == [False, True, True]
    assert engine.running == {other}


async def test_more_samples_than_ever_fit_are_no_matter_of_coming_again(engine):
    limits = {**engine.limits.__dict__, "max_concurrent_requests": 2}
    engine.limits = engine.limits.__class__(**limits)
    async with client_of(engine) as client:
        body = {"inputs": "Hi", "parameters": {"best_of": 3, "do_sample": True}}
        answer = await client.post("/generate", json=body)
        assert answer.status_code == 422
        assert "at most 2 answers at one time, got 3" in answer.json()["error"]
        body["parameters"]["best_of"] = 2
        assert (await client.post("/generate", json=body)).status_code == 200
    assert len(engine.tickets) == 2


@pytest.mark.parametrize("state", ["loading", "draining", "failed"])
async def test_without_a_ready_model_it_is_503(client, engine, state):
    engine.set_state(state)
    answer = await client.post("/generate", json={"inputs": "Hi"})
    assert (answer.status_code, answer.json()["error_type"]) == (503, "unhealthy")
    assert ("retry-after" in answer.headers) == (state != "failed")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
async def test_a_fault_of_ours_is_a_500_that_says_nothing_of_the_inside(engine, path, caplog):
    def broken(request):
        raise RuntimeError("secret detail")

    engine.script = broken
    async with client_of(engine, cors_allow_origin=("https://app.example",)) as client:
        body = {"inputs": "Hi", "prompt": "Hi"}
        answer = await client.post(path, json=body, headers={"origin": "https://app.example"})
        figures = (await client.get("/metrics")).text
    assert answer.status_code == 500
    assert answer.headers["x-request-id"]
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert 'tgi_request_failure{err="500"} 1.0' in figures
    assert "internal" in answer.text
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text


async def test_infinite_logprobs_are_numbers_in_the_answer(client, engine):
    engine.say("Hello", logprob=float("-inf"))
    body = {"inputs": "Hi", "parameters": {"details": True}}
    answer = await client.post("/generate", json=body)
    assert {token["logprob"] for token in answer.json()["details"]["tokens"]} == {-9999.0}
