"""Grammars: answers obey them, and hostile ones are refused before they cost anything."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
from typing import Any

import jsonschema
import numpy as np
import pytest

from mixtral_jax.serve.grammar import GrammarCompiler
from mixtral_jax.serve.request import Grammar, Refused, ServeRequest, ServeSampling
from mixtral_jax.tokenizer import Tokenizer
from tests.serve.conftest import TEXT
from tests.serve.requests import finished


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder("mixtral_jax/data/tiny")


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + 7, (tokenizer.eos_id,))


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A bounded schema: every value it allows is short."""
    kinds = ["integer", "boolean", "null", "enum", "string", "number"]
    kind = rng.choice(kinds + (["object", "array"] * 3 if depth < 3 else []))
    if kind == "object":
        names = [f"{rng.choice('abcxyz')}{i}" for i in range(rng.randint(0, 3))]
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        most = rng.randint(0, 3)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": rng.randint(0, most), "maxItems": most}
    if kind == "enum":
        return {"enum": rng.sample(["red", "grün", "a b", 3, None, True], rng.randint(1, 4))}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(0, 8)}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 100)}
    return {"type": kind}


def check_schemas(engine, lm, number: int, seed: int) -> int:
    """Asks for many schemas at once; returns how many answers were complete."""
    rng = random.Random(seed)
    asked = []
    for i in range(number):
        schema = random_schema(rng)
        sampling = ServeSampling(
            max_new_tokens=rng.choice([30, 90]),
            temperature=rng.choice([0.0, 1.0, 1.5]),
            seed=i,
            grammar=Grammar(kind="json_schema", text=json.dumps(schema)),
        )
        ids = tuple(lm.encode(f"Number {i}: "))
        plain = ServeRequest(prompt_ids=ids, sampling=ServeSampling(max_new_tokens=5))
        asked.append((schema, engine.submit(ServeRequest(prompt_ids=ids, sampling=sampling))))
        if i % 5 == 0:
            engine.submit(plain)  # neighbours without a grammar
    num_complete = 0
    for schema, ticket in asked:
        last = finished(ticket)
        if last.reason != "length":
            num_complete += 1
            jsonschema.validate(json.loads(last.text), schema)
    return num_complete


def test_20_random_schemas_give_valid_json(text_engine, text_lm):
    assert check_schemas(text_engine, text_lm, 20, seed=1) >= 10
    assert text_engine.stats().counters["compilations_since_ready"] == 0


@pytest.mark.slow
def test_200_random_schemas_give_valid_json(tiny_engine, tiny_lm):
    assert check_schemas(tiny_engine, tiny_lm, 200, seed=2) >= 100


@pytest.mark.parametrize("is_answer", [True, False])
def test_a_regex_is_obeyed(text_engine, text_lm, is_answer):
    for pattern in (r"[0-9]{3}-[0-9]{4}", r"(yes|no|perhaps)", r"[a-z]+ und [a-z]{2,5}\."):
        sampling = ServeSampling(
            max_new_tokens=40,
            temperature=1.0,
            seed=4,
            grammar=Grammar(kind="regex", text=pattern),
        )
        ids = tuple(text_lm.encode("Tell me:"))
        asked = ServeRequest(prompt_ids=ids, sampling=sampling, is_answer=is_answer)
        last = finished(text_engine.submit(asked))
        if last.reason != "length":
            assert re.fullmatch(pattern, last.text)
            assert last.reason == "eos_token"


@pytest.mark.slow
def test_text_streams_and_seeds_hold_on_the_embedded_model(tiny_engine, tiny_lm):
    """Stop strings, chats and samples beside each other equal the library's answers."""
    prompts = ["Once upon a time", "Es war einmal", "El perro", "Le chat"]
    tickets = []
    for i, text in enumerate(prompts):
        fields = {"max_new_tokens": 24, "temperature": 1.0, "seed": i, "stop": ("e.", " the")}
        sampling = ServeSampling(**fields)
        ids = tuple(tiny_lm.encode(text))
        tickets.append(
            (text, fields, tiny_engine.submit(ServeRequest(prompt_ids=ids, sampling=sampling)))
        )
    for text, fields, ticket in tickets:
        last = finished(ticket)
        theirs = tiny_lm.generate([text], **fields)[0]
        assert last.text == theirs.generated_text
        assert (list(last.token_ids), last.reason) == (theirs.token_ids, theirs.finish_reason)


def grammar_request(lm, pattern: str, **fields) -> ServeRequest:
    grammar = Grammar(kind="regex", text=pattern)
    sampling = ServeSampling(max_new_tokens=40, temperature=1.0, grammar=grammar, **fields)
    return ServeRequest(prompt_ids=tuple(lm.encode("Tell me:")), sampling=sampling)


def test_samples_of_one_grammar_compile_it_once(text_engine, text_lm, monkeypatch):
    compiled, source = [], GrammarCompiler._source

    def spy(self, grammar):
        compiled.append(grammar)
        return source(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "_source", spy)
    pattern = "(one|two|three){1,4}"
    tickets = [text_engine.submit(grammar_request(text_lm, pattern, seed=i)) for i in range(8)]
    texts = [finished(ticket).text for ticket in tickets]
    assert len(compiled) == 1
    assert len(set(texts)) > 1
    assert all(re.fullmatch(pattern, text) for text in texts)


def test_who_is_refused_compiles_no_grammar(text_engine, text_lm, monkeypatch):
    limits = dataclasses.replace(text_engine.limits, max_concurrent_requests=0)
    monkeypatch.setattr(text_engine._scheduler, "limits", limits)
    monkeypatch.setattr(GrammarCompiler, "compile", lambda self, grammar: pytest.fail("compiled"))
    with pytest.raises(Refused) as caught:
        text_engine.submit(grammar_request(text_lm, "[ab]"))
    assert caught.value.kind == "overloaded"


def test_the_tables_of_grammars_are_made_before_the_first_of_them(make_engine, text_lm):
    engine = make_engine(text_lm, TEXT)
    assert engine._grammars is not None


HOSTILE = {
    "regex": [
        "[",
        "(" * 2000 + ")" * 2000,
        "(?=a)b",
        "a" * 5000,
        "((a{1,1000}){1,1000}){1,1000}",
        "(x+x+)+y",
        "(.*a.{20}b|c.*d.{30}){5}",
        "|".join(f".*{i}.*x" for i in range(300)),
        r"\p{L}{1,4000}",
        "\ud800",
    ],
    "json_schema": [
        "",
        "[]",
        "nan",
        '{"type": "strange"}',
        '{"$ref": "#"}',
        '{"$ref": "http://127.0.0.1:1/x"}',
        '{"$ref": "file:///etc/passwd"}',
        '{"a":' * 100 + "1" + "}" * 100,
        '{"a":' * 100_000,
        '{"type":"string","pattern":"("}',
        json.dumps({"allOf": [{"properties": {f"p{i}": {}}} for i in range(500)]}),
        json.dumps({"enum": ["x" * 20 + str(i) for i in range(2000)]}),
        json.dumps({"type": "array", "minItems": 10**9}),
        json.dumps({"type": "string", "minLength": 10**9}),
        json.dumps(
            {"properties": {f"p{i}": {"type": "string", "pattern": ".*a.{50}"} for i in range(200)}}
        ),
        json.dumps(
            {
                "$defs": {
                    f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)
                }
                | {"d40": {"type": "null"}},
                "$ref": "#/$defs/d0",
            }
        ),
    ],
    "lark": ["start: start", "start: /(/", "x: 1", "%import common.INT"],
}
MUST_FAIL = {"[", "(?=a)b", "", "[]", "nan", '{"$ref": "file:///etc/passwd"}', "x: 1", "\ud800"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_grammars_cost_less_than_a_second(compiler, kind):
    for text in HOSTILE[kind]:
        started = time.process_time()
        fault = None
        try:
            matcher = compiler.compile(Grammar(kind=kind, text=text))
            for _ in range(20):  # what is accepted must stay cheap
                bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
                matcher.take(int(bits.nonzero()[0][-1]))
        except Refused as refused:
            fault = refused
        except ValueError:
            pass  # the grammar has ended, or has become too complex on the way
        assert time.process_time() - started < 1.0, text[:60]
        assert fault is not None or text not in MUST_FAIL
        if fault is not None:
            assert fault.kind == "invalid"
            assert len(fault.message) < 500
            assert "passwd:" not in fault.message


def test_the_engine_lives_through_hostile_grammars(text_engine, text_lm):
    ids = tuple(text_lm.encode("x"))
    for text in HOSTILE["regex"]:
        sampling = ServeSampling(max_new_tokens=4, grammar=Grammar(kind="regex", text=text))
        try:
            ticket = text_engine.submit(ServeRequest(prompt_ids=ids, sampling=sampling))
        except Refused as refused:
            assert refused.kind == "invalid"  # noqa: PT017
        else:
            list(ticket.iterate())
    last = finished(text_engine.submit(ServeRequest(prompt_ids=ids, sampling=ServeSampling())))
    assert last.token_ids


def test_masks_name_tokens_by_their_bytes(compiler, tokenizer):
    matcher = compiler.compile(Grammar(kind="regex", text="ü?fox"))
    allowed = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little").nonzero()[0]
    texts = {
        tokenizer.text_of(i) if tokenizer.byte_of(i) is None else bytes([tokenizer.byte_of(i)])
        for i in allowed.tolist()
    }
    assert all(
        "üfox".startswith(t) or "fox".startswith(t) if isinstance(t, str) else t in (b"\xc3", b"f")
        for t in texts
    )
    assert b"\xc3" in texts
    with pytest.raises(ValueError, match="token"):
        matcher.take(tokenizer.encode("z", bos=False)[-1])
