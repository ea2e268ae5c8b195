"""Token ids and marks of rows, beside ids put together by hand as mistral-common has them."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mixtral_jax.chat import encode_chat
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.finetune.data.encode import Example, encode_dpo, encode_sft
from tests.test_chat import (
    BOS,
    CALL_ID,
    END,
    EOS,
    INST,
    TOKENIZERS,
    V1,
    V3,
    assistant,
    call,
    result,
    system,
    user,
    v1,
    v3,
    versions,
)


def marked(*parts: tuple[list[int], bool]) -> tuple[list[int], list[bool]]:
    ids = [token_id for part, _ in parts for token_id in part]
    return ids, [is_target for part, is_target in parts for _ in part]


def lists(example: Example) -> tuple[list[int], list[bool]]:
    assert (example.ids.dtype, example.is_target.dtype) == ("int32", "bool")
    return example.ids.tolist(), example.is_target.tolist()


def test_v1_scores_every_answer_and_its_end():
    messages = [system("S"), user("a"), assistant("b"), user("c"), assistant("the cat")]
    assert lists(encode_sft({"messages": messages}, V1)) == marked(
        ([BOS, *v1("[INST] S\n\na [/INST]")], False),
        ([*v1("b"), EOS], True),
        (v1("[INST] c [/INST]"), False),
        ([*v1("the cat"), EOS], True),
    )


def test_v3_scores_every_answer_and_its_end():
    messages = [system("S"), user("a"), assistant("b  "), user("c"), assistant("the cat")]
    assert lists(encode_sft({"messages": messages}, V3)) == marked(
        ([BOS, INST, *v3("a"), END], False),
        ([*v3("b"), EOS], True),
        ([INST, *v3("S\n\nc"), END], False),
        ([*v3("the cat"), EOS], True),
    )


def test_v3_scores_tool_calls_but_not_tools_and_results():
    tools = [{"type": "function", "function": {"name": "f"}}]
    text = json.dumps([{"type": "function", "function": {"name": "f"}}])
    text = text.replace('"f"', '"f", "description": "", "parameters": {}')
    block = {name: V3.control_id(f"[{name}]") for name in ("AVAILABLE_TOOLS", "/AVAILABLE_TOOLS")}
    called = v3(f'[{{"name": "f", "arguments": {{}}, "id": "{CALL_ID}"}}]')
    told = v3(f'{{"content": 22, "call_id": "{CALL_ID}"}}')
    messages = [user("a"), call(), result(), assistant("b")]
    expected = marked(
        ([BOS, block["AVAILABLE_TOOLS"], *v3(text), block["/AVAILABLE_TOOLS"]], False),
        ([INST, *v3("a"), END], False),
        ([V3.control_id("[TOOL_CALLS]"), *called, EOS], True),
        ([V3.control_id("[TOOL_RESULTS]"), *told, V3.control_id("[/TOOL_RESULTS]")], False),
        ([*v3("b"), EOS], True),
    )
    assert lists(encode_sft({"messages": messages, "tools": tools}, V3)) == expected
    # A call without its result may be the last: many sets teach no more.
    ids, is_target = lists(encode_sft({"messages": [user("a"), call()]}, V3))
    assert (ids[-1], is_target[-1]) == (EOS, True)


@versions
def test_messages_of_one_role_in_a_row_are_one_turn(version: str):
    tokenizer = TOKENIZERS[version]
    apart = [user("a"), user("b"), assistant("c"), assistant("d"), user("e")]
    joined = [user("a\n\nb"), assistant("c\n\nd"), user("e")]
    found = encode_sft({"messages": apart}, tokenizer)
    assert lists(found) == lists(encode_sft({"messages": joined}, tokenizer))
    assert not found.is_target[-1]  # the user has the last word, and it is not scored


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@versions
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), system_text=st.text("S"))
def test_ids_are_those_of_sampling(version: str, turns: list[tuple[str, str]], system_text: str):
    tokenizer = TOKENIZERS[version]
    # v3 puts the system prompt at the last user turn: later turns move it.
    head = [system(system_text)] if version == "v1" or len(turns) == 1 else []
    messages = head + [one for asked, told in turns for one in (user(asked), assistant(told))]
    ids, is_target = lists(encode_sft({"messages": messages}, tokenizer))
    scored = 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_chat(tokenizer, messages[:i])
            answered = encode_chat(tokenizer, messages[: i + 1], continue_final_message=True)
            assert ids[: len(answered) + 1] == [*answered, EOS]
            assert is_target[len(prompt) - 1] is False
            answer = is_target[len(prompt) : len(answered) + 1]
            assert all(answer)
            scored += len(answer)
    assert sum(is_target) == scored


@versions
def test_a_prompt_of_messages_is_not_scored(version: str):
    tokenizer = TOKENIZERS[version]
    prompt = [user("a"), assistant("b"), user("c")]
    row = {"prompt": prompt, "completion": [assistant("d")]}
    before = encode_chat(tokenizer, prompt)
    answer = [*tokenizer.encode("d", bos=False), EOS]
    assert lists(encode_sft(row, tokenizer)) == marked((before, False), (answer, True))


@versions
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("the cat", " sat on the mat"),
        ("the cat", "s"),
        ("12 + 30 =", " 42"),
        ("a dog: ", "hello"),  # with the space, "▁hello" would be one piece
        ("the c", "at"),  # "▁the▁cat"
        ("", "hello"),
        ("é\n", "\nworld  "),
    ],
)
def test_a_completion_follows_the_ids_of_its_prompt(version: str, prompt: str, completion: str):
    tokenizer = TOKENIZERS[version]
    ids, is_target = lists(encode_sft({"prompt": prompt, "completion": completion}, tokenizer))
    before = tokenizer.encode(prompt)
    assert ids[: len(before)] == before
    assert ids[-1] == EOS
    assert is_target == [i >= len(before) for i in range(len(ids))]
    assert tokenizer.decode(ids) == prompt + completion


@versions
@given(prompt=st.text(st.sampled_from("the cat\né1▁")), completion=texts)
def test_a_continuation_decodes_to_its_text(version: str, prompt: str, completion: str):
    tokenizer = TOKENIZERS[version]
    ids, _ = lists(encode_sft({"prompt": prompt, "completion": completion}, tokenizer))
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(prompt + completion))


@versions
def test_a_text_is_scored_as_a_whole(version: str):
    tokenizer = TOKENIZERS[version]
    text = "the cat </s> [INST] hi"
    expected = marked(([BOS], False), ([*tokenizer.encode(text, bos=False), EOS], True))
    assert lists(encode_sft({"text": text}, tokenizer)) == expected


@versions
def test_a_text_out_of_a_template_has_its_control_pieces(version: str):
    tokenizer = TOKENIZERS[version]
    space = "" if version == "v3" else " "
    text = f"<s>{space}[INST] a{space}[/INST] the cat</s>"
    messages = [user("a"), assistant("the cat")]
    ids, is_target = lists(encode_sft({"text": text}, tokenizer))
    assert ids == lists(encode_sft({"messages": messages}, tokenizer))[0]
    assert is_target == [False, *[True] * (len(ids) - 1)]
    with pytest.raises(MixtralError, match="came out of a chat template") as caught:
        encode_sft({"prompt": text, "completion": "x"}, tokenizer)
    assert caught.value.code == BAD_DATA


@versions
@pytest.mark.parametrize("row", [{"text": ""}, {"prompt": "a", "completion": ""}])
def test_of_nothing_there_is_nothing_to_score(version: str, row: dict[str, str]):
    assert not encode_sft(row, TOKENIZERS[version]).is_target.any()


@versions
def test_pairs_score_their_answers_behind_the_same_prompt(version: str):
    tokenizer = TOKENIZERS[version]
    prompt = [system("S"), user("a"), assistant("b"), user("c")]
    row = {"chosen": [*prompt, assistant("yes")], "rejected": [*prompt, assistant("no, never")]}
    chosen, rejected = encode_dpo(row, tokenizer)
    before = encode_chat(tokenizer, prompt)
    for example, text in ((chosen, "yes"), (rejected, "no, never")):
        answer = [*tokenizer.encode(text, bos=False), EOS]
        assert lists(example) == marked((before, False), (answer, True))


@versions
@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([user("a")], "messages: expected an answer of the assistant to learn from, got none"),
        ([system("a"), user("b")], "expected an answer of the assistant"),
        ([user("a"), assistant("")], "messages[1]: expected content or tool_calls"),
        ([user("a"), {"role": "gpt", "content": "b"}], "messages[1] role: expected"),
        ([assistant("a")], "messages[0] role: expected user or system"),
        ([], "messages: expected a list of at least one message"),
        ([user("a"), assistant("\ud800")], "half of a surrogate pair"),
    ],
)
def test_refusals(version: str, messages: list[Any], told: str):
    with pytest.raises(MixtralError) as caught:
        encode_sft({"messages": messages}, TOKENIZERS[version])
    assert caught.value.code == BAD_DATA
    assert told in str(caught.value)


def test_a_pair_whose_answer_has_no_assistant():
    row = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), user("b")]}
    with pytest.raises(MixtralError, match="expected an answer of the assistant"):
        encode_dpo(row, V3)
