"""JSON as a server should read it: nothing ambiguous, nothing deep, nothing infinite."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import numpy as np

# Possessive, and an unclosed string reaches to the end: one pass, whatever the bytes are.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
# How far each byte leads into arrays and objects.
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


class BadJSONError(ValueError):
    """A body that is not JSON, or not in the form that is read here; one line says why."""


def parse(body: bytes, *, max_depth: int) -> Any:
    """The value of a JSON text.

    Args:
        body: UTF-8.
        max_depth: how deep arrays and objects may nest.

    Raises:
        BadJSONError: it is no JSON, nests deeper, has a key twice in one object, NaN, a number that
            is not finite, or half of a surrogate pair.
    """
    _check_depth(body, max_depth)
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise BadJSONError(f"body: expected UTF-8, got another byte at {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadJSONError(
            f"body: expected JSON, got: {error.msg} at character {error.pos}"
        ) from None
    except BadJSONError:
        raise
    except ValueError:  # an integer of more than 4,300 digits
        raise BadJSONError(
            "body: expected smaller numbers, got one of thousands of digits"
        ) from None
    if b"\\u" in body:
        _check_surrogates(value)
    return value


def _check_depth(body: bytes, max_depth: int) -> None:
    characters = np.frombuffer(_STRING.sub(b"", body), dtype=np.uint8)
    if np.cumsum(_STEPS[characters], dtype=np.int64).max(initial=0) > max_depth:
        raise BadJSONError(f"body: expected at most {max_depth} levels of nesting, got more")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        # ``add`` gives None: the first name that was seen before.
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise BadJSONError(f"body: expected each key once, got {twice[:60]!r} twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise BadJSONError(f"body: expected a number, got {name}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadJSONError(f"body: expected a finite number, got {text[:40]}")
    return value


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadJSONError("body: expected Unicode text, got half of a surrogate pair") from None
