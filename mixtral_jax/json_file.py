"""Small JSON files that may lie: regular, of bounded size, without duplicate keys, an object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixtral_jax.errors import BAD_DATA, MixtralError

MAX_BYTES = 1_000_000
AGAIN = "download or convert it again"


def read_json(path: Path, *, max_bytes: int = MAX_BYTES, fix: str = AGAIN) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: the file.
        max_bytes: a larger file is refused unread.
        fix: what the reader can do about a file that is not sound.

    Raises:
        FileNotFoundError: as ``Path.stat`` does.
        MixtralError: exit code 65 naming the file if it is anything but such a file.
    """
    size = path.stat().st_size
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise MixtralError(f"{path} is {kind}", fix=fix, code=BAD_DATA)
    if size > max_bytes:
        raise MixtralError(f"{path}: larger than {max_bytes} bytes", fix=fix, code=BAD_DATA)
    return parse_json(path.read_bytes(), path, fix=fix)


def parse_json(text: bytes, path: Path, *, fix: str = AGAIN) -> dict[str, Any]:
    """Parses a JSON object; duplicate keys and deep nesting are refused (exit code 65)."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        what = f"{path}: unreadable JSON: {str(error)[:200]}"
        raise MixtralError(what, fix=fix, code=BAD_DATA) from None
    if not isinstance(found, dict):
        got = type(found).__name__
        raise MixtralError(f"{path}", expected="a JSON object", got=got, fix=fix, code=BAD_DATA)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name!r}")
        found[name] = value
    return found
