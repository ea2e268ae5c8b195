"""checkpoint.json: what a checkpoint holds beside its arrays, and a digest of every file of theirs.

Orbax does not notice a flipped bit: a checkpoint counts only if each of its files has the sha256
that was recorded when it was written, no file is missing and none was added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mixtral_jax.convert.manifest import file_sha256, write_durably
from mixtral_jax.errors import BAD_DATA, IO_ERROR, MixtralError, printable
from mixtral_jax.json_file import read_json

NAME = "checkpoint.json"
STATE = "state"
VERSION = 1
# Of all weights of 8x22B in shards for 64 devices: some 60 MB.
MAX_BYTES = 256_000_000
_FIX = "delete that folder"


class OtherVersionError(MixtralError):
    """A checkpoint is whole, but of another version of this program."""


Leaves = Mapping[str, tuple[tuple[int, ...], str]]  # shape and dtype name by the leaf's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """All of a run but its arrays.

    Attributes:
        step: updates that were made.
        total_steps: that the schedule was made for.
        data: state of the iterator over batches.
        log: where the log ends, and what its next line has gathered.
        options: those that a run is bound to (binding.py).
    """

    step: int
    total_steps: int
    data: Mapping[str, Any]
    log: Mapping[str, Any]
    options: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The content of checkpoint.json: what was saved, leaves, and sha256 (hex) of files by path."""

    saved: Saved
    leaves: Leaves
    files: Mapping[str, str]


def write_record(folder: Path, saved: Saved, leaves: Leaves) -> None:
    """Digests the files of ``folder/state`` and writes checkpoint.json, durably."""
    content = {
        "version": VERSION,
        **dataclasses.asdict(saved),
        "leaves": {name: [list(shape), dtype] for name, (shape, dtype) in leaves.items()},
        "files": digests(folder / STATE),
    }
    content["digest"] = _digest(content)
    write_durably(folder / NAME, json.dumps(content).encode())


def read_record(folder: Path) -> Record:
    """Reads checkpoint.json.

    Raises:
        FileNotFoundError: where there is none.
        OtherVersionError: exit code 65.
        MixtralError: exit code 65 if it does not have its own digest.
    """
    path = folder / NAME
    content = read_json(path, max_bytes=MAX_BYTES, fix=_FIX)
    digest = content.pop("digest", None)
    if digest != _digest(content):
        raise MixtralError(f"{path} was altered", fix=_FIX, code=BAD_DATA)
    got = content.get("version")
    if got != VERSION:
        fix = "use the version of mixtral_jax that wrote it, or choose another --output-dir"
        raise OtherVersionError(
            f"{path} version", expected=VERSION, got=got, fix=fix, code=BAD_DATA
        )
    fields = {field.name: content[field.name] for field in dataclasses.fields(Saved)}
    leaves = {name: (tuple(shape), dtype) for name, (shape, dtype) in content["leaves"].items()}
    return Record(saved=Saved(**fields), leaves=leaves, files=content["files"])


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, after reading all of it; None if it is sound.

    Raises:
        OtherVersionError: exit code 65.
        MixtralError: exit code 74 if it cannot be read, which tells nothing of what it holds.
    """
    try:
        recorded = read_record(folder).files
        found = digests(folder / STATE)
    except OtherVersionError:
        raise
    except (MixtralError, FileNotFoundError, NotADirectoryError) as error:
        return printable(str(error))
    except OSError as error:
        raise MixtralError(
            f"{folder} cannot be read: {error}",
            fix=f"run the same command again; if that does not help, {_FIX}",
            code=IO_ERROR,
        ) from error
    for path in sorted(recorded.keys() | found.keys()):
        if path not in found:
            return f"{STATE}/{path} is missing"
        if path not in recorded:
            return f"{STATE}/{path} was added"
        if found[path] != recorded[path]:
            return f"{STATE}/{path} does not have its digest"
    return None


def digests(folder: Path) -> dict[str, str]:
    """sha256 (hex) of each file in a folder and below, by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(file_sha256, paths))
    return {str(path.relative_to(folder)): each for path, each in zip(paths, found, strict=True)}


def _digest(content: Mapping[str, Any]) -> str:
    # As the file will be read again: tuples are lists there.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
