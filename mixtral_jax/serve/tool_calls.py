"""Tools of v3 models: how a choice is put to the model, and how its calls are read."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import string
from typing import Any

from mixtral_jax.serve.failures import Failure
from mixtral_jax.serve.plan import schema_grammar
from mixtral_jax.serve.request import Grammar
from mixtral_jax.serve.schema.openai import ChatRequest, ToolChoice
from mixtral_jax.tokenizer import REPLACEMENT

MARK = "[TOOL_CALLS]"
_ID = re.compile(r"[a-zA-Z0-9]{9}")
_LETTERS = string.ascii_letters + string.digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a request wants of its tools.

    Attributes:
        tools: definitions that the prompt tells.
        may_call: whether an answer that begins with [TOOL_CALLS] is read as calls.
        grammar: what forced calls obey; the prompt then ends with [TOOL_CALLS].
    """

    tools: list[dict[str, Any]]
    may_call: bool
    grammar: Grammar | None = None

    @property
    def is_forced(self) -> bool:
        """Whether the answer has to be calls."""
        return self.grammar is not None


def choice_of(request: ChatRequest, *, is_v3: bool) -> Choice:
    """Reads ``tools`` and ``tool_choice``.

    Raises:
        Failure: the model knows no tools, or the choice names none of them.
    """
    tools = [_as_openai(tool) for tool in request.tools or []]
    asked = request.tool_choice or ("auto" if tools else "none")
    if asked == "none" or (asked == "auto" and not tools):
        # A model that is told of tools may call one all the same.
        return Choice(tools=[], may_call=False)
    if not is_v3:
        message = "tools: this model's format (v1) has none; fix: serve a v3 model (8x22B Instruct)"
        raise Failure("tool_error", message, param="tools")
    if asked == "auto":
        return Choice(tools=tools, may_call=True)
    functions = [tool.get("function") for tool in tools]
    named = [function for function in functions if isinstance(function, dict)]
    if isinstance(asked, ToolChoice):
        named = [function for function in named if function.get("name") == asked.function.name]
    if not named:
        wanted = asked.function.name if isinstance(asked, ToolChoice) else "any"
        message = f"tool_choice: expected a function of tools, got {wanted!r}"
        raise Failure("tool_error", message, param="tool_choice")
    return Choice(tools=tools, may_call=True, grammar=schema_grammar(_calls_schema(named)))


def _as_openai(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with ``parameters``, which TGI also calls ``arguments``."""
    function = tool.get("function")
    if not isinstance(function, dict) or "arguments" not in function:
        return tool
    rest = {name: value for name, value in function.items() if name != "arguments"}
    return tool | {"function": {"parameters": function["arguments"], **rest}}


def _calls_schema(functions: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a list of calls, as the model writes it."""
    one = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function.get("name")},
                "arguments": _moved(
                    function.get("parameters") or {"type": "object"},
                    f"#/items/anyOf/{index}/properties/arguments",
                ),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, function in enumerate(functions)
    ]
    return {"type": "array", "items": {"anyOf": one}, "minItems": 1, "maxItems": 16}


def _moved(schema: Any, root: str) -> Any:
    """A schema that now lies at ``root``: what it says of its own parts (#/$defs/...) follows."""
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, root) for name, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        moved["$ref"] = root + target[1:]
    return moved


def read_calls(text: str) -> list[dict[str, Any]] | None:
    """OpenAI's form of the calls in an answer, or None where it is no list of calls.

    Args:
        text: what follows [TOOL_CALLS].
    """
    try:
        found = json.loads(text.removeprefix(MARK))
        json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError):  # of NaN too, which JSON has not
        return None
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not found:
        return None
    calls = []
    for call in found:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(
            {
                "id": _call_id(call.get("id")),
                "type": "function",
                "function": {"name": _whole(call["name"]), "arguments": _whole(arguments)},
            }
        )
    return calls


def _whole(text: str) -> str:
    """The text with U+FFFD for half of a surrogate pair, which UTF-8 cannot hold."""
    return re.sub("[\ud800-\udfff]", REPLACEMENT, text)


def _call_id(given: object) -> str:
    """The model's own id where it has the form that the format asks for."""
    if isinstance(given, str) and _ID.fullmatch(given):
        return given
    return "".join(secrets.choice(_LETTERS) for _ in range(9))
