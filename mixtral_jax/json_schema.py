"""JSON schema, draft 7: where a schema is not one. Keywords that it does not know are let pass."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# What the value of a keyword has to be.
_KEYWORDS = {
    keyword: kind
    for kind, keywords in {
        "schema": "additionalItems contains additionalProperties propertyNames if then else not",
        "schemas": "allOf anyOf oneOf",
        "map": "definitions properties patternProperties dependencies",
        "text": "$id $schema $ref $comment title description format contentMediaType "
        "contentEncoding pattern",
        "number": "maximum exclusiveMaximum minimum exclusiveMinimum multipleOf",
        "count": "maxLength minLength maxItems minItems maxProperties minProperties",
        "flag": "readOnly uniqueItems",
        "array": "examples enum",
        "names": "required",
        "type": "type",
        "items": "items",
    }.items()
    for keyword in keywords.split()
}
_TYPES = {"array", "boolean", "integer", "null", "number", "object", "string"}


def schema_fault(schema: object, where: str) -> str | None:
    """Where a JSON schema breaks draft 7, or None."""
    if not isinstance(schema, Mapping):
        return None if isinstance(schema, bool) else where
    for keyword, value in schema.items():
        at = f"{where}.{keyword}"
        kind = _KEYWORDS.get(keyword)
        if kind == "items":
            kind = "schemas" if isinstance(value, list) else "schema"
        inner: list[tuple[object, str]] = []
        if kind == "schema":
            inner = [(value, at)]
        elif kind == "schemas" and isinstance(value, list) and value:
            inner = [(item, f"{at}[{i}]") for i, item in enumerate(value)]
        elif kind == "map" and isinstance(value, Mapping):
            inner = [
                (item, f"{at}.{key}")
                for key, item in value.items()
                if not (keyword == "dependencies" and _are_names(item))
            ]
            if keyword == "patternProperties" and not all(map(_is_pattern, value)):
                return at
        elif kind is not None and not _fits(kind, keyword, value):
            return at
        for item, path in inner:
            fault = schema_fault(item, path)
            if fault:
                return fault
    return None


def _fits(kind: str, keyword: str, value: Any) -> bool:
    number = type(value) in (int, float)
    if kind == "text":
        return isinstance(value, str) and (keyword != "pattern" or _is_pattern(value))
    if kind == "number":
        return number and (keyword != "multipleOf" or value > 0)
    if kind == "count":
        return number and value >= 0 and float(value).is_integer()
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "type" and isinstance(value, str):
        return value in _TYPES
    if kind == "type":
        return _are_names(value) and 0 < len(value) == len(_TYPES.intersection(value))
    return _are_names(value) if kind == "names" else kind == "array" and isinstance(value, list)


def _are_names(value: Any) -> bool:
    is_texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return is_texts and len(set(value)) == len(value)


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False
