"""Conversations to learn from have the ids that mistral-common's fine-tuning mode gives them."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_jax.errors import MixtralError
from mixtral_jax.finetune.data.encode import encode_sft
from tests.parity.test_mistral_common import SEED, VERSIONS, Generator, ours, reference

pytestmark = pytest.mark.parity

CONVERSATIONS = 900
MIN_ACCEPTED = 150


def native(version: str, messages: Any, tools: Any) -> list[int] | None:
    try:
        row = {"messages": messages, "tools": tools}
        return encode_sft(row, ours(version)).ids.tolist()
    except MixtralError:
        return None


def lacks_an_id(calls: Any) -> bool:
    calls = calls if isinstance(calls, list) else []
    return any(call.get("id") in (None, "null") for call in calls)


@pytest.mark.parametrize("version", VERSIONS)
def test_whole_conversations_have_the_ids_of_mistral_common(version: str):
    generator, accepted, with_calls = Generator(SEED), 0, 0
    for _ in range(CONVERSATIONS):
        messages, tools, _ = generator.conversation(version)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()  # there anyone but the assistant may not have the last word
        if not messages:
            continue
        if lacks_an_id(messages[-1].get("tool_calls")):
            continue  # accepted there and left out of the text; here a call always has an id
        expected = reference(version, messages, tools, False, "finetuning")
        assert native(version, messages, tools) == expected, f"seed {SEED}: {messages} {tools}"
        accepted += expected is not None
        with_calls += expected is not None and bool(messages[-1].get("tool_calls"))
    print(f"{version}: seed {SEED}, accepted {accepted}, of them {with_calls} end with a call")
    assert accepted >= MIN_ACCEPTED
