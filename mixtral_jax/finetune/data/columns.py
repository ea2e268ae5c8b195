"""What a row means: which of its columns count, and which part of it is scored.

The columns are those of TRL's dataset formats. A row often has more of them than are needed, so the
first that is there counts (a null is not there):

====== =================================================================================
SFT    ``messages``; ``prompt`` with ``completion``; ``text``
DPO    ``chosen`` with ``rejected``, and ``prompt`` where they do not hold it themselves
====== =================================================================================

A ``prompt`` and its answer are plain text where both are strings. Where one of them is a list of
messages, a string beside it is the user's or the assistant's message. ``tools`` (a list, or its
JSON text) goes along with messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mixtral_jax.errors import BAD_DATA, MixtralError

COLUMNS = ("messages", "prompt", "completion", "text", "chosen", "rejected", "tools")


class Conversation(NamedTuple):
    """Messages in OpenAI form. The assistant's are scored, but for the first ``num_prompt``."""

    messages: list[Any]
    num_prompt: int
    tools: list[Any] | None


class Continuation(NamedTuple):
    """A plain text, not of the chat format, whose end is scored."""

    prompt: str
    completion: str


class Text(NamedTuple):
    """A plain text that is scored as a whole."""

    text: str


class Preference(NamedTuple):
    """Two answers to one prompt, both of the same kind."""

    chosen: Conversation | Continuation
    rejected: Conversation | Continuation


def for_sft(columns: Mapping[str, Any]) -> Conversation | Continuation | Text:
    """What supervised fine-tuning learns from a row.

    Raises:
        MixtralError: exit code 65 if the columns are not there, or hold something else.
    """
    given = {name: value for name, value in columns.items() if value is not None}
    if "messages" in given:
        messages = given["messages"]
        if not isinstance(messages, list):
            raise _refusal("messages", "a list of messages", _kind(messages))
        return Conversation(messages, 0, _tools(given))
    if "prompt" in given and "completion" in given:
        return _answered(given, "completion")
    if "text" in given:
        if not isinstance(given["text"], str):
            raise _refusal("text", "a string", _kind(given["text"]))
        return Text(given["text"])
    fix = "--method dpo" if {"chosen", "rejected"} <= given.keys() else "rename the columns"
    raise _refusal("columns", "messages, prompt with completion, or text", _names(given), fix)


def for_dpo(columns: Mapping[str, Any]) -> Preference:
    """What preference optimization learns from a row.

    ``chosen`` and ``rejected`` are answers to ``prompt``, or whole conversations. Of those, the
    messages that both begin with are the prompt, less the assistant's at their end.

    Raises:
        MixtralError: exit code 65 if the columns are not there, or hold something else.
    """
    given = {name: value for name, value in columns.items() if value is not None}
    if not {"chosen", "rejected"} <= given.keys():
        raise _refusal("columns", "chosen and rejected", _names(given), "rename the columns")
    chosen, rejected = given["chosen"], given["rejected"]
    if _is_whole(chosen) and _is_whole(rejected):
        num_prompt, tools = _num_shared(chosen, rejected), _tools(given)
        return Preference(
            Conversation(chosen, num_prompt, tools), Conversation(rejected, num_prompt, tools)
        )
    if "prompt" not in given:
        expected = "prompt, or whole conversations as chosen and rejected"
        raise _refusal("columns", expected, _names(given), "add the prompt")
    pair = Preference(_answered(given, "chosen"), _answered(given, "rejected"))
    if type(pair.chosen) is not type(pair.rejected):
        got = f"{_kind(chosen)} and {_kind(rejected)}"
        raise _refusal("chosen and rejected", "two strings or two lists of messages", got)
    return pair


def _answered(given: Mapping[str, Any], answer: str) -> Conversation | Continuation:
    if isinstance(given["prompt"], str) and isinstance(given[answer], str):
        return Continuation(given["prompt"], given[answer])
    before = _messages("prompt", given["prompt"], "user")
    after = _messages(answer, given[answer], "assistant")
    if not before or _role(before[-1]) == "assistant":
        # Two messages in a row would be one turn, of which only a part were scored.
        raise _refusal("prompt", "messages that end with the user's or a tool's", "others")
    if not after or _role(after[0]) != "assistant":
        raise _refusal(answer, "messages that begin with the assistant's", "others")
    return Conversation([*before, *after], len(before), _tools(given))


def _messages(name: str, value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise _refusal(name, "a string or a list of messages", _kind(value))
    return value


def _is_whole(value: Any) -> bool:
    """Whether this is a conversation from its beginning, not just the answer."""
    return isinstance(value, list) and bool(value) and _role(value[0]) != "assistant"


def _num_shared(chosen: list[Any], rejected: list[Any]) -> int:
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    while shared and _role(chosen[shared - 1]) == "assistant":
        shared -= 1
    if not shared:
        raise _refusal("chosen and rejected", "the same messages at first", "two conversations")
    return shared


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _tools(given: Mapping[str, Any]) -> list[Any] | None:
    tools = given.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise _refusal("tools", "a list or its JSON text", "another text") from None
    if tools is not None and not isinstance(tools, list):
        raise _refusal("tools", "a list of functions", _kind(tools))
    return tools


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _names(given: Mapping[str, Any]) -> str:
    return ", ".join(sorted(given)) or "none"


def _refusal(what: str, expected: str, got: str, fix: str = "correct the row") -> MixtralError:
    return MixtralError(what, expected=expected, got=got, fix=fix, code=BAD_DATA)
