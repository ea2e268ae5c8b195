"""Schemes with their options as one word: ``int4:group-size=32``, ``gptq3:asymmetric:act-order``.

The options are those of the quantize command, without their dashes; rtn and gptq have their bits in
the name. Every scheme that the command knows has a name here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.quantize.makers import DataFree
from mixtral_jax.quantize.options import (
    BITS,
    CALIBRATED,
    MAY_BE_CALIBRATED,
    WITH_BITS,
    Options,
    Scheme,
)

# What belongs to a run, and not to a scheme.
_OF_THE_RUN = {
    "src", "dst", "scheme", "bits", "calibration", "samples", "length", "verify", "format", "json",
    "debug", "processes",
}  # fmt: skip


def names() -> tuple[str, ...]:
    """Every scheme, without options."""
    return tuple(_words())


def _words() -> dict[str, tuple[str, int | None]]:
    """Scheme and bits by name."""
    found: dict[str, tuple[str, int | None]] = {}
    for scheme in _literals(Scheme):
        if scheme in WITH_BITS:
            found |= {f"{scheme}{bits}": (scheme, bits) for bits in BITS}
        else:
            found[scheme] = scheme, None
    return found


def _literals(kind: Any) -> Iterator[str]:
    """The words of a Literal, or of a union of them."""
    for each in get_args(kind):
        yield from (each,) if isinstance(each, str) else _literals(each)


def is_calibrated(word: str, *, has_text: bool) -> bool:
    """Whether it is fitted to text, where there is some or none."""
    return _split(word)[0] in (MAY_BE_CALIBRATED if has_text else CALIBRATED)


def is_made_at_load(word: str, *, has_text: bool) -> bool:
    """Whether ``load(quantize=...)`` makes it; the others are made as folders."""
    return word in get_args(DataFree) and not is_calibrated(word, has_text=has_text)


def options_of(word: str, src: str | Path = "", dst: str | Path = "", **run: Any) -> Options:
    """What the quantize command would be asked.

    Args:
        word: a name, and options after colons.
        src: what to quantize.
        dst: the folder to make.
        **run: other fields of Options, of a run: ``calibration``, ``samples``, ``length``.

    Raises:
        MixtralError: exit code 64 for an unknown name or option, or what the scheme refuses.
    """
    scheme, bits, given = _split(word)
    fields: dict[str, Any] = {} if bits is None else {"bits": bits}
    for option in given:
        name, has_value, value = option.partition("=")
        fields |= {name.replace("-", "_"): _value(word, name, value if has_value else None)}
    try:
        return Options(src=str(src), dst=Path(dst), scheme=scheme, **fields, **run)
    except MixtralError as error:
        raise MixtralError(f"{word}: {error}", code=error.code) from None


def _split(word: str) -> tuple[Any, Any, list[str]]:
    """(scheme, bits, options)."""
    name, *given = word.split(":")
    if name not in _words():
        raise MixtralError("scheme", expected=", ".join(names()), got=repr(name), code=USAGE)
    return *_words()[name], given


def _value(word: str, name: str, value: str | None) -> Any:
    kinds = {
        field.name.replace("_", "-"): get_type_hints(Options)[field.name]
        for field in dataclasses.fields(Options)
        if field.name not in _OF_THE_RUN
    }
    kind = kinds.get(name)
    if kind is None:
        expected, got = f"options among {', '.join(kinds)}", repr(name)
        raise MixtralError(f"scheme {word}", expected=expected, got=got, code=USAGE)
    if kind is bool:
        if value is None:
            return True
        expected, got = f"{name} alone", f"{name}={value}"
        raise MixtralError(f"scheme {word}", expected=expected, got=repr(got), code=USAGE)
    number = next(each for each in get_args(kind) if each in (int, float))
    try:
        return number(value or "")
    except ValueError:
        expected, got = f"{name}={'64' if number is int else '0.1'}", f"{name}={value or ''}"
        raise MixtralError(f"scheme {word}", expected=expected, got=repr(got), code=USAGE) from None
