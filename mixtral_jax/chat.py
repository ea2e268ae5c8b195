"""Messages to token ids, in the two formats of the Mixtral family.

The reference is mistral-common: what it accepts gives the same ids here, what it refuses (in its
serving mode) is refused here, in one line that names the message. v1 spells [INST] as text and puts
the system prompt before the first user turn; v3 uses control pieces, puts the system prompt and the
tools at the last user turn, and knows tool calls. Also: templates of the user's own, in a sandbox.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from mixtral_jax.chat_template import chat_template_of, encode_rendered, render_template
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.json_schema import schema_fault

if TYPE_CHECKING:
    from mixtral_jax.tokenizer import Tokenizer

__all__ = [
    "EncodedTurn",
    "chat_template_of",
    "encode_chat",
    "encode_rendered",
    "encode_turns",
    "render_template",
]

_SEPARATOR = "\n\n"
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_FOLLOWERS = {
    "system": ("user", "assistant", "system"),
    "user": ("assistant", "system", "user"),
    "assistant": ("assistant", "user", "tool"),
    "tool": ("assistant", "tool", "user"),
}
_CALL_ID = re.compile(r"^[a-zA-Z0-9]{9}$")
_NAME = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")


class EncodedTurn(NamedTuple):
    """Token ids of a turn, and the index of the first message that it was made of."""

    role: str
    message_id: int
    token_ids: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Turn:
    """A message, or neighbouring messages of one role joined: ``text`` never holds markup."""

    role: str
    message_id: int = 0
    text: str = ""
    has_content: bool = False
    calls: tuple[dict[str, Any], ...] = ()
    call_id: str = ""


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    continue_final_message: bool = False,
) -> list[int]:
    """Token ids of a conversation, ready for the model to answer.

    Args:
        tokenizer: its version chooses the format.
        messages: mappings in OpenAI form. Content is a string or a list of text parts.
        tools: function definitions in OpenAI form; v1 models do not see them.
        continue_final_message: leave the last message, an assistant's, open to be continued.

    Raises:
        MixtralError: exit code 65, naming the message or tool that cannot be encoded.
    """
    turns = _turns(tokenizer, messages)
    _check_last(turns, continue_final_message)
    open_calls = _check_order(turns)
    _check_answered(open_calls, "at the end")
    parts = [turn.token_ids for turn in _encode(tokenizer, turns, tools)]
    if continue_final_message:
        parts[-1].pop()  # the </s> of the last message
    return [tokenizer.bos_id, *itertools.chain.from_iterable(parts)]


def encode_turns(
    tokenizer: Tokenizer, messages: Sequence[Any], *, tools: Sequence[Any] | None = None
) -> list[EncodedTurn]:
    """A whole conversation to learn from, turn by turn: <s> and all ids are its token ids.

    Every assistant turn ends with </s>, the last one too. Tool calls at the end need no results, as
    in the fine-tuning mode of mistral-common. Unlike there, anyone may have the last word, and a
    call always has an id.

    Raises:
        MixtralError: exit code 65, naming the message or tool that cannot be encoded.
    """
    turns = _turns(tokenizer, messages)
    open_calls = _check_order(turns)
    _check_answered(min(open_calls, 0), "at the end")
    return _encode(tokenizer, turns, tools)


def _turns(tokenizer: Tokenizer, messages: Sequence[Any]) -> list[_Turn]:
    if isinstance(messages, str) or not messages:
        _refuse("messages", "a list of at least one message", repr(messages), "add a user message")
    turns = [_turn(i, message, tokenizer.version) for i, message in enumerate(messages)]
    if len(turns) == 1 and turns[0].role not in ("user", "system"):
        _refuse("messages[0] role", "user or system", turns[0].role, "begin with a user message")
    return turns


def _encode(
    tokenizer: Tokenizer, turns: list[_Turn], tools: Sequence[Any] | None
) -> list[EncodedTurn]:
    definitions = [_tool(i, tool) for i, tool in enumerate(tools or ())]
    system = _SEPARATOR.join(
        turn.text for turn in turns if turn.role == "system" and turn.has_content
    )
    turns = _joined(turns)
    if tokenizer.version == "v1":
        parts = _encode_v1(tokenizer, turns, system)
    else:
        parts = _encode_v3(tokenizer, turns, system, definitions)
    return [
        EncodedTurn(turn.role, turn.message_id, part)
        for turn, part in zip(turns, parts, strict=True)
    ]


def _encode_v1(tokenizer: Tokenizer, turns: list[_Turn], system: str) -> list[list[int]]:
    parts = []
    for turn in turns:
        if turn.role == "user":
            text = f"{system}{_SEPARATOR}{turn.text}" if system else turn.text
            system = ""  # the first user turn has taken it
            parts.append(tokenizer.encode(f"[INST] {text} [/INST]", bos=False))
        else:
            parts.append([*tokenizer.encode(turn.text, bos=False), tokenizer.eos_id])
    return parts


def _encode_v3(
    tokenizer: Tokenizer, turns: list[_Turn], system: str, tools: list[dict[str, Any]]
) -> list[list[int]]:
    def block(start: str, text: str, end: str) -> list[int]:
        content = tokenizer.encode(text, bos=False)
        return [tokenizer.control_id(start), *content, tokenizer.control_id(end)]

    last_user = max(i for i, turn in enumerate(turns) if turn.role == "user")
    parts = []
    for i, turn in enumerate(turns):
        if turn.role == "user":
            text, definitions = turn.text, []
            if i == last_user and tools:
                definitions = block("[AVAILABLE_TOOLS]", _json(tools), "[/AVAILABLE_TOOLS]")
            if i == last_user and system:
                text = f"{system}{_SEPARATOR}{text}"
            parts.append([*definitions, *block("[INST]", text, "[/INST]")])
        elif turn.role == "tool":
            result = {"content": _parsed(turn.text or "{}"), "call_id": turn.call_id}
            parts.append(block("[TOOL_RESULTS]", _json(result), "[/TOOL_RESULTS]"))
        elif turn.calls:
            parts.append(block("[TOOL_CALLS]", _json(turn.calls), "</s>"))
        else:
            # Spaces at the end would ask the model to begin the next word without its space.
            text = turn.text.rstrip(" ")
            parts.append([*tokenizer.encode(text, bos=False), tokenizer.eos_id])
    return parts


def _joined(turns: list[_Turn]) -> list[_Turn]:
    """User turns in a row, and assistant turns in a row, become one; system turns are left out."""
    joined: list[_Turn] = []
    for role, group in itertools.groupby(turns, key=lambda turn: turn.role):
        members = list(group)
        if role == "tool":
            joined += members
        elif role != "system":
            text = _SEPARATOR.join(turn.text for turn in members if turn.text)
            calls = tuple(call for turn in members for call in turn.calls)
            if role == "assistant" and bool(text) == bool(calls):
                what = "assistant messages in a row"
                got = "both" if text else "neither"
                _refuse(what, "text or tool calls", got, "put a user or tool message between them")
            first = members[0].message_id
            joined.append(_Turn(role=role, message_id=first, text=text, calls=calls))
    if not joined or joined[0].role != "user":
        joined.insert(0, _Turn(role="user"))
    return joined


def _check_last(turns: list[_Turn], continue_final_message: bool) -> None:
    last = f"messages[{len(turns) - 1}] role"
    if continue_final_message and turns[-1].role != "assistant":
        _refuse(last, "assistant", turns[-1].role, "unset continue_final_message")
    if turns[-1].role == "assistant" and not continue_final_message:
        _refuse(last, "user or tool", "assistant", "drop it, or set continue_final_message")


def _check_order(turns: list[_Turn]) -> int:
    """Checks who follows whom; returns how many tool calls have no result at the end."""
    open_calls = 0
    for i, (before, turn) in enumerate(itertools.pairwise(turns), start=1):
        if turn.role not in _FOLLOWERS[before.role]:
            expected = f"{' or '.join(_FOLLOWERS[before.role])} after {before.role}"
            _refuse(f"messages[{i}] role", expected, turn.role, "reorder the messages")
        if turn.role == "tool":
            open_calls -= 1
        elif turn.role == "assistant":
            _check_answered(open_calls, f"before messages[{i}]")
            open_calls = len(turn.calls)
    return open_calls


def _check_answered(open_calls: int, where: str) -> None:
    if open_calls:
        got = f"{abs(open_calls)} too {'few' if open_calls > 0 else 'many'}"
        fix = "add or drop tool messages"
        _refuse(f"tool results {where}", "one for each tool call", got, fix)


def _turn(i: int, message: Any, version: str) -> _Turn:
    where = f"messages[{i}]"
    if not isinstance(message, Mapping):
        _refuse(where, "a mapping with role and content", type(message).__name__, "use OpenAI form")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        _refuse(f"{where} role", "system, user, assistant or tool", repr(role), "rename the role")
    role = "system" if role == "developer" else role
    content = message.get("content")
    text = _text(f"{where} content", content, optional=role == "assistant")
    if role == "tool":
        if version == "v1":
            _refuse_tools(where)
        call_id = message.get("tool_call_id")
        _match(f"{where} tool_call_id", _CALL_ID, call_id, "9 letters or digits")
        if message.get("name") is not None:
            _match(f"{where} name", _NAME, message["name"], "1 to 64 of a-z A-Z 0-9 _ -")
        return _Turn(role=role, message_id=i, text=text, call_id=str(call_id))
    calls: tuple[dict[str, Any], ...] = ()
    if role == "assistant":
        for key in ("reasoning", "reasoning_content"):
            if message.get(key) is not None:
                _refuse(f"{where} {key}", "none", "some", "drop it: Mixtral has no reasoning part")
        asked = message.get("tool_calls")
        asked = [] if asked is None else asked
        if not isinstance(asked, list):
            _refuse(f"{where} tool_calls", "a list", type(asked).__name__, "use OpenAI form")
        if asked and version == "v1":
            _refuse_tools(where)
        if bool(content) == bool(asked):
            got = "both" if asked else "neither"
            _refuse(where, "content or tool_calls", got, "give exactly one of them")
        calls = tuple(_call(f"{where} tool_calls[{n}]", call) for n, call in enumerate(asked))
    return _Turn(role=role, message_id=i, text=text, has_content=bool(content), calls=calls)


def _text(where: str, content: object, *, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if not isinstance(content, list):
        _refuse(where, "a string or a list of text parts", type(content).__name__, "make it a text")
    texts = []
    for n, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type") != "text":
            expected = '{"type": "text", "text": ...}'
            _refuse(f"{where}[{n}]", expected, repr(part)[:60], "Mixtral reads text only")
        texts.append(text)
    return _SEPARATOR.join(filter(None, texts))


def _call(where: str, call: Any) -> dict[str, Any]:
    function = _function(where, call)
    _match(f"{where} function name", _NAME, function.get("name"), "1 to 64 of a-z A-Z 0-9 _ -")
    _match(f"{where} id", _CALL_ID, call.get("id"), "9 letters or digits")
    arguments = function.get("arguments", ...)
    if arguments is None:
        arguments = "{}"
    elif isinstance(arguments, dict):
        arguments = _json(arguments)
    if not isinstance(arguments, str):
        _refuse(f"{where} arguments", "a JSON text or an object", "another type", "use OpenAI form")
    return {
        "name": function["name"],
        "arguments": _parsed(arguments or "{}"),
        "id": call["id"],
    }


def _tool(i: int, tool: Any) -> dict[str, Any]:
    where = f"tools[{i}]"
    function = _function(where, tool)
    name, description = function.get("name"), function.get("description")
    parameters = function.get("parameters")
    description = "" if description is None else description
    parameters = {} if parameters is None else parameters
    _match(f"{where} function name", _NAME, name, "1 to 64 of a-z A-Z 0-9 _ -")
    if not isinstance(description, str) or function.get("strict") not in (None, False, True):
        _refuse(where, "a text as description, strict a boolean", "otherwise", "use OpenAI form")
    if not isinstance(parameters, dict) or any(not isinstance(key, str) for key in parameters):
        _refuse(f"{where} parameters", "a JSON schema", repr(parameters)[:60], "use OpenAI form")
    try:
        fault = schema_fault(parameters, "parameters")
    except RecursionError:
        fault = "parameters (too deep)"
    if fault:
        _refuse(f"{where} {fault}", "a JSON schema (draft 7)", "otherwise", "correct the schema")
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _function(where: str, owner: Any) -> Mapping[str, Any]:
    function = owner.get("function") if isinstance(owner, Mapping) else None
    if not isinstance(function, Mapping) or owner.get("type", "function") != "function":
        expected = '{"type": "function", "function": {...}}'
        _refuse(where, expected, repr(owner)[:60], "use OpenAI form")
    return function


def _match(where: str, pattern: re.Pattern[str], value: object, expected: str) -> None:
    if not isinstance(value, str) or not pattern.match(value):
        _refuse(where, expected, repr(value)[:80], "choose another")


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise MixtralError(f"tools or tool calls are not JSON: {error}", code=BAD_DATA) from None


def _parsed(text: str) -> Any:
    """The JSON value of a text; the text itself where it is not JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise MixtralError(f"JSON in a tool message: {error}", code=BAD_DATA) from None


def _refuse_tools(where: str) -> NoReturn:
    _refuse(where, "no tool calls or results", "one", "use a v3 model (8x22B Instruct) for tools")


def _refuse(what: str, expected: str, got: str, fix: str) -> NoReturn:
    raise MixtralError(what, expected=expected, got=got, fix=fix, code=BAD_DATA)
