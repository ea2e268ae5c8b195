"""``--config FILE``: the options of a run in one TOML or JSON file.

Names are those of the command line, with - or _. Tables of TOML and objects of JSON only group
them; how they are called is free. What the command line gives is not taken from the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.finetune.options import FinetuneOptions
from mixtral_jax.json_file import parse_json

_POSITIONAL = "model"
_NOT_IN_A_FILE = {"config", "process_id"}
_WITHOUT_NO = {"json", "debug"}  # have no --no-json beside them
_FIX = "mend the file"


class _Given(NamedTuple):
    """What a command line gives: names of options, with the value of ``--config``."""

    names: set[str]
    config: str | None


def arguments(argv: Sequence[str]) -> list[str]:
    """The command line, with what the file of ``--config`` adds to it.

    Args:
        argv: arguments, without the program's name.

    Raises:
        MixtralError: exit code 66 for a file that is not there, 65 for one that is no TOML or JSON,
            78 for a name that is no option, or a value that its option cannot have.
    """
    kinds = _kinds(FinetuneOptions)
    given = _given(argv, kinds)
    if given.config is None:
        return list(argv)
    path = Path(given.config)
    first: list[str] = []
    last: list[str] = []
    for name, value in _options(path, kinds).items():
        if name in given.names or value is None:
            continue
        _check(name, value, kinds[name], path)
        if name == _POSITIONAL:
            first = [value]
        else:
            last += _words(name, value)
    # A list on the command line ends where the first flag of the file begins.
    return [*first, *argv, *last]


def _kinds(options: type) -> dict[str, Any]:
    """Name of each option -> its type, those of groups included."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(options).items():
        found |= _kinds(kind) if dataclasses.is_dataclass(kind) else {name: kind}  # pyright: ignore
    return found


def _given(argv: Sequence[str], kinds: Mapping[str, Any]) -> _Given:
    names: set[str] = set()
    config = None
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            names.add(_POSITIONAL)
            continue
        flag, equals, value = word.partition("=")
        name = _name(flag)
        name = name if name in kinds else name.removeprefix("no_")
        names.add(name)
        if equals or kinds.get(name) is bool or name not in kinds:
            values = [value]
        elif _is_list(kinds[name]):
            values = []
            while words and not words[0].startswith("-"):
                values.append(words.pop(0))
        else:
            values = [words.pop(0)] if words else []
        if name == "config":
            config = values[0] if values else None
    return _Given(names, config)


def _name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _options(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in _flat(_read(path)):
        option = _name(name)
        if option in _NOT_IN_A_FILE:
            what = f"{path}: {name} is for the command line alone"
            raise MixtralError(what, fix=_FIX, code=BAD_CONFIG)
        if option not in kinds:
            near = difflib.get_close_matches(option, kinds, n=1)
            fix = f"write {near[0]}" if near else "python -m mixtral_jax.finetune --help lists all"
            raise MixtralError(f"{path}: {name} is no option", fix=fix, code=BAD_CONFIG)
        if option in found:
            raise MixtralError(f"{path}: {name} is given twice", fix=_FIX, code=BAD_CONFIG)
        found[option] = value
    return found


def _read(path: Path) -> dict[str, Any]:
    if path.suffix not in (".toml", ".json"):
        expected, fix = "a name that ends in .toml or .json", "--config options.toml"
        raise MixtralError("--config", expected=expected, got=str(path), fix=fix, code=USAGE)
    if not path.is_file():
        fix = "name a TOML or JSON file"
        raise MixtralError(f"--config: no file {path}", fix=fix, code=INPUT_NOT_FOUND)
    content = path.read_bytes()
    if path.suffix == ".json":
        return parse_json(content, path, fix=_FIX)
    try:
        return tomllib.loads(content.decode("utf-8"))
    except ValueError as error:  # of both
        what = f"{path}: unreadable TOML: {str(error)[:200]}"
        raise MixtralError(what, fix=_FIX, code=BAD_DATA) from None


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, value


def _check(name: str, value: Any, kind: Any, path: Path) -> None:
    """Refuses what the command line would take for something else, or drop."""
    expected = None
    if kind is bool and not isinstance(value, bool):
        expected = "true or false"
    elif _is_list(kind) and not isinstance(value, list):
        expected = "a list"
    elif kind is not bool and isinstance(value, bool):
        expected = "a value"
    elif not _is_list(kind) and isinstance(value, list):
        expected = "one value"
    elif name == _POSITIONAL and not _is_word(value):
        expected = "a text that does not begin with -"
    elif isinstance(value, list) and not (value and all(map(_is_word, value))):
        expected = "texts that do not begin with -, one at least"
    if expected is not None:
        what = f"{path}: {name}"
        raise MixtralError(what, expected=expected, got=repr(value), fix=_FIX, code=BAD_CONFIG)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and not value.startswith("-")


def _words(name: str, value: Any) -> list[str]:
    """An option as the command line spells it."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        off = [] if name in _WITHOUT_NO else [f"--no-{flag[2:]}"]
        return [flag] if value else off
    if isinstance(value, list):
        return [flag, *value]
    return [f"{flag}={value}"]
