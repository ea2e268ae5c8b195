"""Token ids equal mistral-common's, for its own published tokenizer files."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.chat import encode_chat, encode_rendered
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.tokenizer import IncrementalDetokenizer, Tokenizer

pytestmark = pytest.mark.parity

FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
VERSIONS = tuple(FILES)
SEED = 20240410
CONVERSATIONS = 900
MIN_ACCEPTED = 200


def path_of(version: str) -> Path:
    import mistral_common

    assert mistral_common.__file__ is not None
    return Path(mistral_common.__file__).parent / "data" / FILES[version]


@functools.cache
def ours(version: str) -> Tokenizer:
    return Tokenizer.from_file(path_of(version))


@functools.cache
def theirs(version: str, mode: str = "serving") -> Any:
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(path_of(version), mode=ValidationMode[mode])


def reference(
    version: str, messages: Any, tools: Any, prefix: bool, mode: str = "serving"
) -> list[int] | None:
    """mistral-common's ids, or None where it refuses (with whatever exception)."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    try:
        request = ChatCompletionRequest.from_openai(
            copy.deepcopy(messages), copy.deepcopy(tools), continue_final_message=prefix, model="m"
        )
        return theirs(version, mode).encode_chat_completion(request).tokens
    except Exception:
        return None


def native(version: str, messages: Any, tools: Any, prefix: bool) -> list[int] | None:
    """Our ids, or None where we refuse; any other exception is a failure."""
    try:
        return encode_chat(ours(version), messages, tools=tools, continue_final_message=prefix)
    except MixtralError as error:
        refusal = error
    assert refusal.code == BAD_DATA
    assert "\n" not in str(refusal)
    return None


TEXTS = [
    "Hello", "Hi there", "", " ", "   ", "\n", " leading", "trailing ", "trailing   ", "a  b",
    "\n\nlines\n\n", "tab\tand\r\nCRLF", "[INST]", "[/INST] x", "</s>", "<s>", "a<s>b</s>c",
    "[TOOL_CALLS] [AVAILABLE_TOOLS]", "<0x41>", "▁", "x▁y", "ﬁ ½ Å", "e\u0301", "<unk>", "12345 67",
    "你好世界。", "こんにちは", "مرحبا بالعالم", "😀", "\U0001f469\u200d\U0001f467", "naïve",
    "\x00nul", "\u200b\ufeff", "\U0010ffff", "def f(x):\n    return x\n", '{"a": 1}', "null", "NaN",
    "é" * 40,
]  # fmt: skip
IDS = ["abcdefghi", "ABC123xyz", "000000000"]
BAD_IDS = ["short", "toolonginput", "with-dash", "null", "", "é23456789", None, 123456789]
ARGUMENTS = [
    "{}", '{"city": "Paris"}', "", "not json", '{"a":1,"b":[1.50,1e5,null]}', '"text"', "12",
    {"city": "東京", "n": 1}, {}, None, '{"a": NaN}', "[1, 2", '{"k":"\\u00e9"}', '{"a":1,"a":2}',
]  # fmt: skip
BAD_ARGUMENTS = [["list"], 12, ...]
RESULTS = ["22", "22.0", "", '{"temp": 22, "unit":"C"}', "sunny ☀", "[1,2]", "true", '"q"', "{bad"]
SCHEMAS = [
    {}, None, {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    {"type": ["string", "null"], "enum": ["é", 1, None], "pattern": "^a+$", "x-own": 3},
    {"items": [{"minLength": 2.0}, True], "anyOf": [{}], "dependencies": {"a": ["b"], "c": {}}},
]  # fmt: skip
BAD_SCHEMAS = [
    {"type": "text"}, {"type": []}, {"required": "city"}, {"properties": []}, {"minLength": -1},
    {"properties": {"a": {"type": 3}}}, {"pattern": "("}, {"anyOf": []}, {"multipleOf": 0}, "x", [],
    {"required": ["a", "a"]}, {"items": 3}, {"not": []}, {"maximum": True}, {"title": 1},
    {"dependencies": {"a": [1]}}, {"patternProperties": {"(": {}}}, {"uniqueItems": 1},
    {"enum": "a"}, {"minItems": 1.5}, {"description": None}, {"allOf": [{"if": "x"}]},
]  # fmt: skip


class Generator:
    """Conversations, most of them as people write them, some with a planted fault."""

    def __init__(self, seed: int):
        self.r = random.Random(seed)

    def text(self) -> str:
        r = self.r
        if r.random() < 0.6:
            return r.choice(TEXTS)
        count = r.randrange(1, 4)
        return r.choice(["", " ", "\n", "  "]).join(r.choice(TEXTS) for _ in range(count))

    def content(self) -> Any:
        if self.r.random() < 0.85:
            return self.text()
        return [{"type": "text", "text": self.text()} for _ in range(self.r.randrange(4))]

    def call(self, call_id: str) -> dict[str, Any]:
        function = {"name": self.r.choice(["get_weather", "a-b"]), "arguments": "{}"}
        function["arguments"] = self.r.choice(ARGUMENTS)
        return {"id": call_id, "type": "function", "function": function}

    def tool(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.r.choice(["get_weather", "f_1"])}
        if self.r.random() < 0.7:
            function["description"] = self.r.choice(["Says  the weather", "é 天気", None])
        if self.r.random() < 0.8:
            function["parameters"] = self.r.choice(SCHEMAS)
        if self.r.random() < 0.2:
            function["strict"] = True
        return {"type": "function", "function": function}

    def conversation(self, version: str) -> tuple[list[Any], Any, bool]:
        r = self.r
        messages: list[dict[str, Any]] = []
        for _ in range(r.choice([0, 0, 0, 1, 1, 2])):
            messages.append({"role": "system", "content": self.content()})
        for turn in range(r.randrange(1, 4)):
            for _ in range(r.choice([1, 1, 1, 2])):
                messages.append({"role": "user", "content": self.content()})
                if r.random() < 0.1:
                    messages.append({"role": r.choice(["system", "developer"]), "content": "Brief"})
                    messages.append({"role": "user", "content": self.content()})
            if version == "v3" and r.random() < 0.4:
                ids = r.sample(IDS, r.randrange(1, 3))
                calls = [self.call(call_id) for call_id in ids]
                messages.append({"role": "assistant", "content": None, "tool_calls": calls})
                for call_id in ids:
                    result = {"role": "tool", "tool_call_id": call_id, "content": r.choice(RESULTS)}
                    if r.random() < 0.3:
                        result |= {"name": "get_weather", "content": self.content()}
                    messages.append(result)
            for _ in range(r.choice([1, 1, 1, 2])):
                content = self.content()
                messages.append({"role": "assistant", "content": content or "ok"})
            if turn and r.random() < 0.2:
                break
        prefix = r.random() < 0.25
        if not prefix:
            messages.append({"role": "user", "content": self.content()})
        if version == "v3" and r.random() < 0.1:
            while messages[-1]["role"] != "tool" and len(messages) > 1:
                messages.pop()
            prefix = False
        tools = [self.tool() for _ in range(r.randrange(3))] if r.random() < 0.4 else None
        if r.random() < 0.4:
            self.plant(messages, version)
        if tools and r.random() < 0.25:
            tools[0]["function"]["parameters"] = r.choice(BAD_SCHEMAS)
        return messages, tools, prefix

    def plant(self, messages: list[Any], version: str) -> None:
        r = self.r
        at = r.randrange(len(messages))
        fault = r.randrange(12)
        if fault == 0:
            messages[at]["role"] = r.choice(["function", "", None, "User", 3])
        elif fault == 1:
            messages[at]["content"] = r.choice([None, 12, {}, "\ud800", [{"type": "image_url"}]])
        elif fault == 2:
            messages[at].pop("content")
        elif fault == 3:
            r.shuffle(messages)
        elif fault == 4:
            del messages[at]
        elif fault == 5:
            messages.insert(at, {"role": r.choice(["tool", "assistant", "system"]), "content": "x"})
        elif fault == 6:
            messages[at]["content"] = [{"type": r.choice(["text", "other"]), "text": 1}, "x"]
        elif fault == 7:
            call = self.call(r.choice([*IDS, *BAD_IDS]))  # type: ignore[arg-type]
            messages.insert(at, {"role": "assistant", "tool_calls": [call]})
        elif fault == 8:
            messages[at]["tool_call_id"] = r.choice(BAD_IDS)
        elif fault == 9:
            messages[at]["tool_calls"] = r.choice([[], None, {}, "x", [self.call(IDS[0])]])
        elif fault == 10:
            messages[at] |= {"name": r.choice(["bad name", "ok", None]), "reasoning": "hm"}
        else:
            for message in messages:
                for call in message.get("tool_calls") or []:
                    call["function"] = r.choice(
                        [
                            {"name": "bad name", "arguments": "{}"},
                            {"name": "f", "arguments": r.choice(BAD_ARGUMENTS[:2])},
                            {"name": "f"},
                            {"name": "f", "arguments": "{}", "more": 1},
                        ]
                    )


@pytest.mark.parametrize("version", VERSIONS)
def test_generated_conversations_have_the_ids_of_mistral_common(version: str):
    generator = Generator(SEED)
    counts: Counter[str] = Counter()
    features: Counter[str] = Counter()
    for _ in range(CONVERSATIONS):
        messages, tools, prefix = generator.conversation(version)
        expected = reference(version, messages, tools, prefix)
        got = native(version, messages, tools, prefix)
        case = json.dumps([messages, tools, prefix], default=repr)
        assert got == expected, f"seed {SEED}: {case}"
        counts["refused" if expected is None else "accepted"] += 1
        if expected is not None:
            features["continued"] += prefix
            features["tools"] += bool(tools)
            features["system"] += any(message["role"] == "system" for message in messages)
            features["calls"] += any(message.get("tool_calls") for message in messages)
            features["ends with a result"] += messages[-1]["role"] == "tool"
    print(f"{version}: seed {SEED}, {dict(counts)}, among the accepted {dict(features)}")
    assert counts["accepted"] >= MIN_ACCEPTED
    assert counts["refused"] >= MIN_ACCEPTED / 4
    only_v3 = {"calls", "ends with a result"}
    for name in features:
        assert (features[name] >= 10) == (version == "v3" or name not in only_v3), features


USER = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_order_of_roles_agrees(version: str, length: int):
    kinds = [
        {"role": "system", "content": "S"},
        USER,
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "tool_calls": [Generator(0).call(IDS[0])]},
        {"role": "tool", "tool_call_id": IDS[0], "content": "R"},
    ]
    accepted = 0
    for code in range(len(kinds) ** length):
        messages = [
            copy.deepcopy(kinds[code // len(kinds) ** i % len(kinds)]) for i in range(length)
        ]
        for prefix in (False, True):
            expected = reference(version, messages, None, prefix)
            assert native(version, messages, None, prefix) == expected, (messages, prefix)
            accepted += expected is not None
    assert accepted >= 2


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("schema", [*SCHEMAS, *BAD_SCHEMAS], ids=json.dumps)
def test_tool_schemas_agree(version: str, schema: Any):
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    expected = reference(version, [USER], tools, False)
    assert native(version, [USER], tools, False) == expected
    assert (expected is None) == any(schema == bad for bad in BAD_SCHEMAS)


@pytest.mark.parametrize("arguments", [*ARGUMENTS, *BAD_ARGUMENTS], ids=repr)
@pytest.mark.parametrize("result", RESULTS)
def test_tool_calls_and_results_agree(arguments: Any, result: str):
    call = {"id": IDS[0], "function": {"name": "f", "arguments": arguments}}
    if arguments is ...:
        del call["function"]["arguments"]
    answer = {"role": "tool", "tool_call_id": IDS[0], "content": result}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, answer]
    expected = reference("v3", messages, None, False)
    assert native("v3", messages, None, False) == expected
    assert (expected is None) == any(arguments == bad for bad in BAD_ARGUMENTS)


@pytest.mark.parametrize("call_id", [*IDS, *BAD_IDS], ids=repr)
@pytest.mark.parametrize("where", ["call", "result"])
def test_tool_call_ids_agree(call_id: Any, where: str):
    call = {
        "id": call_id if where == "call" else IDS[0],
        "function": {"name": "f", "arguments": ""},
    }
    answer = {"role": "tool", "tool_call_id": call_id if where == "result" else IDS[0]}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, answer | {"content": "1"}]
    expected = reference("v3", messages, None, False)
    assert native("v3", messages, None, False) == expected
    assert (expected is not None) == (call_id in IDS)


def chat(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


THREE = chat("Hello", "Hi there", "Bye")
GOLDEN_V1 = "1 733 16289 28793 22557 733 28748 16289 28793"
GOLDEN: list[tuple[str, list[dict[str, Any]], str]] = [
    ("v1", chat("Hello"), GOLDEN_V1),
    ("v1", THREE, f"{GOLDEN_V1} 15359 736 2 733 16289 28793 2463 28706 733 28748 16289 28793"),
    (
        "v1",
        chat("Hello", system="Be brief"),
        "1 733 16289 28793 1739 6817 13 13 16230 733 28748 16289 28793",
    ),
    ("v3", chat("Hello"), "1 3 23325 4"),
    ("v3", THREE, "1 3 23325 4 16127 1504 2 3 3231 29474 4"),
    ("v3", chat("Hello", system="Be brief"), "1 3 2507 7585 781 781 16998 4"),
]


@pytest.mark.parametrize(("version", "messages", "token_ids"), GOLDEN)
def test_golden_ids(version: str, messages: list[dict[str, Any]], token_ids: str):
    assert native(version, messages, None, False) == [int(i) for i in token_ids.split()]
    assert reference(version, messages, None, False) == [int(i) for i in token_ids.split()]


RENDERED = {
    "v1": [
        "<s> [INST] Hello [/INST] Hi there</s> [INST] Bye [/INST]",
        " [INST] Hello [/INST] Hi there</s> [INST] Bye [/INST]",
        "<s>[INST] Hello [/INST] Hi there</s>[INST] Bye [/INST]",
    ],
    "v3": [
        "<s>[INST] Hello[/INST] Hi there</s>[INST] Bye[/INST]",
        "<s><s>[INST] Hello[/INST] Hi there</s>[INST] Bye[/INST]",
    ],
}


@pytest.mark.parametrize("version", VERSIONS)
def test_rendered_templates_have_the_golden_ids(version: str):
    golden = native(version, THREE, None, False)
    for text in RENDERED[version]:
        assert encode_rendered(ours(version), text) == golden, text


@pytest.mark.parametrize("version", VERSIONS)
def test_plain_text_agrees(version: str):
    tokenizer, other = ours(version), theirs(version).instruct_tokenizer.tokenizer
    assert tokenizer.version == version
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (other.n_words, 1, 2)
    assert set(tokenizer.control_ids.values()) == other.special_ids
    generator = Generator(SEED)
    for text in [*TEXTS, *(generator.text() for _ in range(500))]:
        token_ids = tokenizer.encode(text)
        assert token_ids == other.encode(text, bos=True, eos=False)
        assert tokenizer.decode(token_ids) == other.decode(token_ids)


@pytest.mark.parametrize("version", VERSIONS)
def test_incremental_text_is_the_decoding_of_the_whole(version: str):
    tokenizer, r = ours(version), random.Random(SEED)
    first_byte = next(i for i in range(tokenizer.vocab_size) if tokenizer.byte_of(i) == 0)
    smile = [first_byte + byte for byte in "😀é".encode()]
    for _ in range(3000):
        token_ids = [r.randrange(tokenizer.vocab_size) for _ in range(r.randrange(8))]
        for _ in range(r.randrange(3)):
            at = r.randrange(len(token_ids) + 1)
            token_ids[at:at] = r.choice([smile, smile[:2], smile[1:], [0], [1], [2]])
        cut = r.randrange(len(token_ids) + 1)
        prompt, rest = token_ids[:cut], token_ids[cut:]
        alone, after = IncrementalDetokenizer(tokenizer), IncrementalDetokenizer(tokenizer, prompt)
        assert "".join(map(alone.push, token_ids)) + alone.flush() == tokenizer.decode(token_ids)
        whole, before = tokenizer.decode(token_ids), tokenizer.decode(prompt)
        text = "".join(map(after.push, rest)) + after.flush()
        if whole.startswith(before):
            assert before + text == whole
        else:  # the continuation completes a character of the prompt
            begun = next(n for n in (1, 2, 3) if whole.startswith(before[:-n]))
            assert before[-begun:] == "\N{REPLACEMENT CHARACTER}" * begun
            assert whole == before[:-begun] + text
