"""Which columns of a row count, as published sets have them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.finetune.data.columns import (
    Continuation,
    Conversation,
    Preference,
    Text,
    for_dpo,
    for_sft,
)

U = {"role": "user", "content": "u"}
A = {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
S = {"role": "system", "content": "s"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # ultrachat_200k
        ({"prompt": "u", "prompt_id": "4d1b", "messages": [U, A]}, Conversation([U, A], 0, None)),
        # ultrafeedback_binarized
        (
            {"prompt": "u", "chosen": [U, A], "rejected": [U, B], "messages": [U, A]},
            Conversation([U, A], 0, None),
        ),
        ({"messages": [U, A], "text": "t", "tools": TOOLS}, Conversation([U, A], 0, TOOLS)),
        ({"messages": None, "text": "t"}, Text("t")),
        ({"prompt": "u", "completion": "a", "text": "t"}, Continuation("u", "a")),
        ({"prompt": "u", "text": "t"}, Text("t")),
        ({"prompt": [S, U], "completion": [A]}, Conversation([S, U, A], 2, None)),
        ({"prompt": "u", "completion": [A, U, B]}, Conversation([U, A, U, B], 1, None)),
        ({"prompt": [U], "completion": "a"}, Conversation([U, A], 1, None)),
        (
            {"prompt": [U], "completion": [A], "tools": json.dumps(TOOLS)},
            Conversation([U, A], 1, TOOLS),
        ),
    ],
)
def test_the_first_that_is_there_counts(columns: dict[str, Any], expected: Any):
    assert for_sft(columns) == expected
    assert type(for_sft(columns)) is type(expected)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"prompt": "u"}, "expected messages, prompt with completion, or text, got prompt"),
        ({"question": "q", "answer": "a"}, "got answer, question; fix: rename the columns"),
        ({}, "got none"),
        ({"text": None}, "got none"),
        ({"chosen": [U, A], "rejected": [U, B]}, "fix: --method dpo"),
        ({"messages": "u"}, "messages: expected a list of messages, got a str"),
        ({"messages": U}, "got a dict"),
        ({"text": 3}, "text: expected a string, got a int"),
        ({"prompt": 3, "completion": "a"}, "prompt: expected a string or a list of messages"),
        ({"prompt": [U], "completion": 3}, "completion: expected a string or a list of messages"),
        ({"prompt": [U, A], "completion": [B]}, "prompt: expected messages that end with the user"),
        ({"prompt": [], "completion": [B]}, "prompt: expected messages that end with the user"),
        ({"prompt": "u", "completion": [U, A]}, "completion: expected messages that begin with"),
        ({"messages": [U, A], "tools": "{"}, "tools: expected a list or its JSON text"),
        ({"messages": [U, A], "tools": {}}, "tools: expected a list of functions"),
    ],
)
def test_other_columns_are_told(columns: dict[str, Any], told: str):
    with pytest.raises(MixtralError) as caught:
        for_sft(columns)
    assert caught.value.code == BAD_DATA
    assert told in str(caught.value)
    assert "; fix: " in str(caught.value)


def pair(chosen: list[Any], rejected: list[Any], num_prompt: int) -> Preference:
    return Preference(
        Conversation(chosen, num_prompt, None), Conversation(rejected, num_prompt, None)
    )


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        # ultrafeedback_binarized: the prompt is in the lists
        (
            {"prompt": "u", "chosen": [U, A], "rejected": [U, B], "messages": [U, A], "score": 1},
            pair([U, A], [U, B], 1),
        ),
        ({"chosen": [S, U, A], "rejected": [S, U, B]}, pair([S, U, A], [S, U, B], 2)),
        ({"chosen": [U, A, U, A], "rejected": [U, A, U, B]}, pair([U, A, U, A], [U, A, U, B], 3)),
        ({"chosen": [U, A, B], "rejected": [U, A, A]}, pair([U, A, B], [U, A, A], 1)),
        ({"chosen": [U, A], "rejected": [U, A]}, pair([U, A], [U, A], 1)),
        ({"prompt": [S, U], "chosen": [A], "rejected": [B]}, pair([S, U, A], [S, U, B], 2)),
        ({"prompt": [U], "chosen": "a", "rejected": "b"}, pair([U, A], [U, B], 1)),
        ({"prompt": "u", "chosen": [A], "rejected": [B]}, pair([U, A], [U, B], 1)),
        (
            {"prompt": "u", "chosen": "a", "rejected": "b"},
            Preference(Continuation("u", "a"), Continuation("u", "b")),
        ),
    ],
)
def test_pairs(columns: dict[str, Any], expected: Preference):
    assert for_dpo(columns) == expected


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"messages": [U, A]}, "columns: expected chosen and rejected, got messages"),
        ({"prompt": "u", "chosen": "a", "rejected": None}, "got chosen, prompt"),
        ({"chosen": "a", "rejected": "b"}, "expected prompt, or whole conversations"),
        ({"chosen": [A], "rejected": [B]}, "expected prompt, or whole conversations"),
        ({"prompt": "u", "chosen": "a", "rejected": [B]}, "two strings or two lists of messages"),
        ({"prompt": "u", "chosen": [U, A], "rejected": [B]}, "expected messages that begin with"),
        ({"prompt": "u", "chosen": [U, A], "rejected": []}, "chosen: expected messages that begin"),
        ({"chosen": [U, A], "rejected": [S, U, B]}, "expected the same messages at first"),
    ],
)
def test_pairs_that_are_none(columns: dict[str, Any], told: str):
    with pytest.raises(MixtralError) as caught:
        for_dpo(columns)
    assert caught.value.code == BAD_DATA
    assert told in str(caught.value)
