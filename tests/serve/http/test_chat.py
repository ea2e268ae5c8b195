"""/v1/chat/completions: answers, streams, tools, log-probabilities and refusals."""

from __future__ import annotations

import json

import pytest

from mixtral_jax.chat import encode_chat
from mixtral_jax.serve.schema.openai import ChatCompletion
from tests.serve.http.conftest import client_of
from tests.serve.http.fake import Script
from tests.test_chat import V3
from tests.test_tokenizer import V1

pytestmark = pytest.mark.anyio
ROUTE = "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "tells",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '[{"name": "get_weather", "arguments": {"city": "Paris"}}]'
NAMED = {"name": "n", "schema": {"a": 1}}
MARK = V3.control_ids["[TOOL_CALLS]"]


def chunks(text: str) -> list[dict]:
    lines = [line for line in text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(found: list[dict], index: int = 0) -> str:
    choices = [choice for chunk in found for choice in chunk["choices"]]
    return "".join(c["delta"].get("content") or "" for c in choices if c["index"] == index)


def calling(text: str = CALL) -> list[int]:
    return [MARK, *V3.encode(text, bos=False), V3.eos_id]


async def test_an_answer(client, engine):
    engine.say("Hello, world")
    answer = await client.post(ROUTE, json={"model": "any", "messages": HI})
    assert answer.status_code == 200
    found = answer.json()
    ChatCompletion.model_validate(found, strict=True)
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, world"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    asked = engine.tickets[0].request
    assert asked.prompt_ids == tuple(encode_chat(V1, HI))
    assert asked.is_answer
    assert asked.sampling.temperature == 1.0
    generated = len(V1.encode("Hello, world"))
    assert found["usage"]["prompt_tokens"] == len(asked.prompt_ids)
    assert found["usage"]["completion_tokens"] == generated
    assert found["usage"]["total_tokens"] == len(asked.prompt_ids) + generated
    assert found["model"] == "fake"


async def test_every_parameter_reaches_the_engine(client, engine):
    body = {
        "messages": HI,
        "model": "poet",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 1.5, "7": -100},
        "max_completion_tokens": 4,
        "seed": 9,
        "stop": "x",
        "logprobs": True,
        "top_logprobs": 3,
        "response_format": {"type": "json_object"},
        "user": "someone",
    }
    answer = await client.post(ROUTE, json=body)
    assert answer.status_code == 200
    asked = engine.tickets[0].request
    assert asked.adapter_id == "poet"
    expected = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": ((5, 1.5), (7, -100.0)),
        "max_new_tokens": 4,
        "seed": 9,
        "stop": ("x",),
        "top_logprobs": 3,
    }
    assert {name: getattr(asked.sampling, name) for name in expected} == expected
    assert not asked.sampling.include_stop
    assert asked.sampling.grammar.kind == "json"


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"type": "json_schema", "json_schema": NAMED}, "json_schema", '{"a": 1}'),
        ({"type": "json_schema", "value": NAMED}, "json_schema", '{"a": 1}'),
        ({"type": "json", "value": NAMED["schema"]}, "json_schema", '{"a": 1}'),
        ({"type": "json", "value": '{"a": 1}'}, "json_schema", '{"a": 1}'),
        ({"type": "regex", "value": "a+"}, "regex", "a+"),
        ({"type": "json_object"}, "json", ""),
    ],
)
async def test_response_formats_of_both_apis(client, engine, given, kind, text):
    await client.post(ROUTE, json={"messages": HI, "response_format": given})
    grammar = engine.tickets[0].request.sampling.grammar
    assert (grammar.kind, grammar.text) == (kind, text)


async def test_a_stream(client, engine):
    engine.say("Hello, world 🎉")
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    answer = await client.post(ROUTE, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = chunks(answer.text)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(found) == "Hello, world 🎉"
    assert [c["finish_reason"] for chunk in found for c in chunk["choices"]][-1] == "stop"
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in found}) == 1
    assert all(chunk["usage"] is None for chunk in found[:-1])
    assert found[-1]["choices"] == []
    usage = found[-1]["usage"]
    assert usage["completion_tokens"] == len(engine.script(engine.tickets[0].request).token_ids)


async def test_streamed_text_is_that_of_the_whole_answer_with_stop_strings_and_bytes(
    client, engine
):
    engine.say("ab🎉 STOPPED never")
    body = {"messages": HI, "stop": ["🎉 STOP"], "logprobs": True}
    whole = (await client.post(ROUTE, json=body)).json()["choices"][0]
    found = chunks((await client.post(ROUTE, json=body | {"stream": True})).text)
    assert joined(found) == whole["message"]["content"] == "ab"
    scored = [
        entry
        for chunk in found
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert scored == whole["logprobs"]["content"]


async def test_several_answers(client, engine):
    def script(request):
        text = "abc"[request.sampling.sample_id]
        return Script(token_ids=[*V1.encode(text, bos=False), V1.eos_id])

    engine.script = script
    body = {"messages": HI, "n": 3, "seed": 4}
    found = (await client.post(ROUTE, json=body)).json()
    assert [c["message"]["content"] for c in found["choices"]] == ["a", "b", "c"]
    assert [c["index"] for c in found["choices"]] == [0, 1, 2]
    assert found["usage"]["prompt_tokens"] == len(engine.tickets[0].request.prompt_ids)
    assert {ticket.request.sampling.seed for ticket in engine.tickets} == {4}
    stream = chunks((await client.post(ROUTE, json=body | {"stream": True})).text)
    assert [joined(stream, index) for index in range(3)] == ["a", "b", "c"]


@pytest.mark.parametrize("stream", [False, True])
async def test_response_headers(client, engine, stream):
    engine.say("Hello")
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    body = {"messages": [{"role": "user", "content": parts}], "n": 2, "stream": stream}
    headers = (await client.post(ROUTE, json=body)).headers
    assert headers["x-compute-characters"] == "7"
    assert headers["x-prompt-tokens"] == str(len(engine.tickets[0].request.prompt_ids))
    assert ("x-time-per-token" in headers) == (not stream)


async def test_logprobs(client, engine):
    engine.say("Hello")
    body = {"messages": HI, "logprobs": True, "top_logprobs": 2}
    choice = (await client.post(ROUTE, json=body)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == len(V1.encode("Hello"))
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]


async def test_a_last_message_of_the_assistant_is_continued(client, engine):
    messages = [*HI, {"role": "assistant", "content": "Well"}]
    await client.post(ROUTE, json={"messages": messages})
    asked = engine.tickets[0].request.prompt_ids
    assert asked == tuple(encode_chat(V1, messages, continue_final_message=True))


@pytest.mark.parametrize("stream", [False, True])
async def test_what_continues_a_message_keeps_its_space(client, engine, stream):
    engine.say("is 42")
    body = {"messages": [*HI, {"role": "assistant", "content": "It"}], "stream": stream}
    answer = await client.post(ROUTE, json=body)
    text = (
        joined(chunks(answer.text)) if stream else answer.json()["choices"][0]["message"]["content"]
    )
    assert text == " is 42"


async def test_a_tool_is_called(engine_v3):
    engine_v3.script = lambda request: Script(token_ids=calling())
    body = {"messages": HI, "tools": [WEATHER]}
    async with client_of(engine_v3) as client:
        found = (await client.post(ROUTE, json=body)).json()
        stream = chunks((await client.post(ROUTE, json=body | {"stream": True})).text)
    ChatCompletion.model_validate(found, strict=True)
    choice = found["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert len(call["id"]) == 9
    asked = engine_v3.tickets[0].request
    assert asked.prompt_ids == tuple(encode_chat(V3, HI, tools=[WEATHER]))
    assert asked.sampling.grammar is None
    deltas = [c["delta"] for chunk in stream for c in chunk["choices"]]
    (streamed,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert streamed[0]["function"] == call["function"]
    assert streamed[0]["index"] == 0
    assert joined(stream) == ""
    assert stream[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_tool_in_tgis_spelling_is_the_same_tool(engine_v3):
    function = dict(WEATHER["function"])
    function["arguments"] = function.pop("parameters")
    body = {"messages": HI, "tools": [{"type": "function", "function": function}]}
    async with client_of(engine_v3) as client:
        await client.post(ROUTE, json=body)
    asked = engine_v3.tickets[0].request.prompt_ids
    assert asked == tuple(encode_chat(V3, HI, tools=[WEATHER]))


async def test_the_answer_to_a_call_goes_back_into_the_conversation(engine_v3):
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "22"},
    ]
    async with client_of(engine_v3) as client:
        await client.post(ROUTE, json={"messages": messages})
    assert engine_v3.tickets[0].request.prompt_ids == tuple(encode_chat(V3, messages))


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
async def test_a_forced_call_begins_in_the_prompt_and_obeys_a_schema(engine_v3, choice):
    ids = [*V3.encode(CALL, bos=False), V3.eos_id]
    engine_v3.script = lambda request: Script(token_ids=ids)
    body = {"messages": HI, "tools": [WEATHER], "tool_choice": choice}
    async with client_of(engine_v3) as client:
        found = (await client.post(ROUTE, json=body)).json()["choices"][0]
    asked = engine_v3.tickets[0].request
    assert asked.prompt_ids == (*encode_chat(V3, HI, tools=[WEATHER]), MARK)
    schema = json.loads(asked.sampling.grammar.text)
    (one,) = schema["items"]["anyOf"]
    assert one["properties"]["name"] == {"const": "get_weather"}
    assert one["properties"]["arguments"] == WEATHER["function"]["parameters"]
    assert found["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_a_call_cut_short_is_text(engine_v3):
    engine_v3.script = lambda request: Script(token_ids=calling())
    body = {"messages": HI, "tools": [WEATHER], "max_tokens": 6}
    async with client_of(engine_v3) as client:
        choice = (await client.post(ROUTE, json=body)).json()["choices"][0]
        stream = chunks((await client.post(ROUTE, json=body | {"stream": True})).text)
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"] == joined(stream) != ""


async def test_text_in_spite_of_tools_is_streamed_as_it_comes(engine_v3):
    engine_v3.say("No need")
    body = {"messages": HI, "tools": [WEATHER], "stream": True}
    async with client_of(engine_v3) as client:
        found = chunks((await client.post(ROUTE, json=body)).text)
    assert joined(found) == "No need"
    assert len([c for c in found if c["choices"][0]["delta"].get("content")]) > 1


REFUSED = {
    "no message": ({"messages": []}, 400, "messages"),
    "bad role": ({"messages": [{"role": "me", "content": "x"}]}, 400, "role"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "text",
    ),
    "n": ({"messages": HI, "n": 9}, 400, "n: expected at most 8"),
    "top_logprobs": ({"messages": HI, "top_logprobs": 2}, 400, "logprobs true"),
    "too many tops": ({"messages": HI, "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "two lengths": (
        {"messages": HI, "max_tokens": 3, "max_completion_tokens": 3},
        400,
        "max_completion_tokens",
    ),
    "tools of v1": ({"messages": HI, "tools": [WEATHER]}, 400, "v3"),
    "functions": ({"messages": HI, "functions": [{}]}, 400, "use tools"),
    "TGI's name": ({"messages": HI, "max_new_tokens": 5}, 400, "fix: max_tokens"),
    "bias": ({"messages": HI, "logit_bias": {"99999999": 1}}, 400, "logit_bias"),
    "same bias twice": ({"messages": HI, "logit_bias": {"1": 1, "01": 1}}, 400, "once"),
    "temperature": ({"messages": HI, "temperature": -1}, 400, "temperature"),
    "long": ({"messages": HI, "max_tokens": 512}, 400, "max_tokens: expected at most 512"),
    "format": ({"messages": HI, "response_format": {"type": "yaml"}}, 400, "response_format"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_have_openais_form(client, engine, name, stream):
    body, status, message = REFUSED[name]
    answer = await client.post(ROUTE, json=body | {"stream": stream})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert engine.tickets == []


async def test_a_choice_of_an_unknown_function_is_refused(engine_v3):
    body = {"messages": HI, "tools": [WEATHER]}
    choice = {"type": "function", "function": {"name": "nothing"}}
    async with client_of(engine_v3) as client:
        answer = await client.post(ROUTE, json=body | {"tool_choice": choice})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("kind", "status"), [("generation", 424), ("overloaded", 429), ("unavailable", 503)]
)
async def test_failures_under_way(client, engine, kind, status):
    engine.say("Hello, world", fails_after=1, kind=kind)
    body = {"messages": HI}
    answer = await client.post(ROUTE, json=body)
    assert answer.status_code == status
    stream = (await client.post(ROUTE, json=body | {"stream": True})).text
    last = stream.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == f"scripted: {kind}"
    assert "[DONE]" not in stream
