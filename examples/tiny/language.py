"""The five languages of the embedded model: words and phrasings, from languages/*.toml."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from pathlib import Path

from num2words import num2words

CODES = ("en", "fr", "de", "es", "it")
LARGEST_IN_WORDS = 100
_FOLDER = Path(__file__).parent / "languages"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
    """One language file, and its number words from 0 to LARGEST_IN_WORDS.

    ``colours``, ``days``, ``months``, ``numbers`` and ``countries`` are parallel over the
    languages: the same index means the same thing.
    """

    code: str
    unknown: str
    capital_answer: str
    colours: tuple[str, ...]
    days: tuple[str, ...]
    months: tuple[str, ...]
    numbers: tuple[str, ...]
    systems: tuple[str, ...]
    nouns: tuple[str, ...]
    invented_of: tuple[str, ...]
    into: dict[str, str]
    source: dict[str, str]
    countries: tuple[tuple[str, str], ...]
    phrases: dict[str, tuple[str, ...]]
    chat: dict[str, tuple[str, tuple[str, ...]]]


@functools.cache
def languages() -> dict[str, Language]:
    """Every language by its code."""
    return {code: _read(code) for code in CODES}


def _read(code: str) -> Language:
    raw = tomllib.loads((_FOLDER / f"{code}.toml").read_text(encoding="utf-8"))
    phrases = {family: tuple(texts) for family, texts in raw["phrases"].items()}
    return Language(
        code=code,
        unknown=raw["unknown"],
        capital_answer=raw["capital_answer"],
        **{name: tuple(raw[name]) for name in ("colours", "days", "months", "systems", "nouns")},
        numbers=tuple(num2words(n, lang=code) for n in range(LARGEST_IN_WORDS + 1)),
        invented_of=tuple(raw["invented_of"]),
        into=raw["into"],
        source=raw["from"],
        countries=tuple((of, city) for of, city in raw["countries"].values()),
        phrases=phrases,
        chat={name: (answer, _combined(*parts)) for name, (answer, *parts) in raw["chat"].items()},
    )


def _combined(beginnings: list[str], continuations: list[str]) -> tuple[str, ...]:
    """Every beginning with every continuation."""
    return tuple(_capitalised(one + other) for one in beginnings for other in continuations)


def _capitalised(text: str) -> str:
    first = next((i for i, letter in enumerate(text) if letter.isalpha()), 0)
    return text[:first] + text[first].upper() + text[first + 1 :]
