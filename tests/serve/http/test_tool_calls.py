"""Forced calls, hostile calls, and tools that are not to be called."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mixtral_jax.chat import encode_chat
from mixtral_jax.serve.grammar import GrammarCompiler
from mixtral_jax.serve.request import Grammar
from mixtral_jax.serve.tool_calls import MARK, read_calls
from tests.serve.http.conftest import client_of
from tests.serve.http.fake import Script
from tests.serve.http.test_chat import HI, ROUTE, WEATHER, calling, chunks
from tests.serve.http.test_limits import allow_long
from tests.test_chat import V3

ITEM = {"type": "object", "properties": {"n": {"type": "integer"}, "$ref": {"type": "null"}}}
ORDER = {
    "type": "function",
    "function": {
        "name": "order",
        "parameters": {
            "type": "object",
            "properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/Item"}}},
            "required": ["items"],
            "additionalProperties": False,
            "$defs": {"Item": ITEM},
        },
    },
}
TREE = {
    "type": "function",
    "function": {
        "name": "grow",
        "parameters": {"type": "object", "properties": {"child": {"$ref": "#"}}},
    },
}


async def grammar_of(engine: Any, **body: Any) -> Grammar:
    allow_long(engine)
    async with client_of(engine) as client:
        answer = await client.post(ROUTE, json={"messages": HI, **body})
    assert answer.status_code == 200
    return engine.tickets[0].request.sampling.grammar


def allows(grammar: Grammar, text: str) -> bool:
    compiler = GrammarCompiler(V3, V3.vocab_size, [V3.eos_id])
    matcher = compiler.compile(grammar)
    try:
        for byte in text.encode():
            matcher.take(next(i for i in range(V3.vocab_size) if V3.byte_of(i) == byte))
    except ValueError:
        return False
    return True


@pytest.mark.anyio
async def test_a_forced_call_obeys_the_definitions_of_its_schema(engine_v3):
    ids = [*V3.encode('[{"name": "order", "arguments": {}}]', bos=False), V3.eos_id]
    engine_v3.script = lambda request: Script(token_ids=ids)
    tools = [WEATHER, ORDER, TREE]
    grammar = await grammar_of(engine_v3, tools=tools, tool_choice="required")

    def call(name: str, arguments: Any) -> str:
        return json.dumps([{"name": name, "arguments": arguments}])

    assert allows(grammar, call("order", {"items": [{"n": 1}]}))
    assert not allows(grammar, call("order", {"items": [{"n": "one"}]}))
    assert allows(grammar, call("grow", {"child": {"child": {}}}))
    assert not allows(grammar, call("grow", {"child": 1}))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.anyio
async def test_half_a_surrogate_pair_in_a_call_is_answered(engine_v3, stream):
    text = r'[{"name": "f\udc00", "arguments": {"a": "\ud83d", "b": "\ud83d\ude00"}}]'
    engine_v3.script = lambda request: Script(token_ids=calling(text))
    async with client_of(engine_v3) as client:
        body = {"messages": HI, "tools": [WEATHER], "stream": stream}
        answer = await client.post(ROUTE, json=body)
    if stream:
        deltas = [choice["delta"] for part in chunks(answer.text) for choice in part["choices"]]
        (calls,) = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    else:
        calls = answer.json()["choices"][0]["message"]["tool_calls"]
    assert calls[0]["function"] == {"name": "f\ufffd", "arguments": '{"a": "\ufffd", "b": "😀"}'}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_json_has_not_is_no_call(number):
    call = '[{"name": "f", "arguments": {"a": %s}}]'
    assert read_calls(MARK + call % number) is None
    assert read_calls(MARK + call % 1) is not None


@pytest.mark.anyio
async def test_tools_that_are_not_to_be_called_are_not_told(engine_v3):
    async with client_of(engine_v3) as client:
        body = {"messages": HI, "tools": [WEATHER], "tool_choice": "none", "max_tokens": 3}
        await client.post(ROUTE, json=body)
    assert engine_v3.tickets[0].request.prompt_ids == tuple(encode_chat(V3, HI))


@pytest.mark.anyio
async def test_a_forced_call_needs_grammars(engine_v3):
    engine_v3.script = lambda request: Script(token_ids=calling())
    body = {"messages": HI, "tools": [WEATHER]}
    async with client_of(engine_v3, request={"disable_grammar_support": True}) as client:
        answer = await client.post(ROUTE, json=body | {"tool_choice": "required"})
        assert answer.status_code == 400
        assert "--disable-grammar-support" in answer.json()["error"]["message"]
        assert engine_v3.tickets == []
        assert (await client.post(ROUTE, json=body)).status_code == 200
