"""manifest.json: what a converted folder holds, with a digest per chunk and one for the whole.

``digest`` covers, for each leaf in order of its path, the path, the shape, the dtype and the sha256
of each chunk's bytes, and nothing else: checkpoints that differ in names, layout or number of files
but hold the same weights have the same digest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.json_file import read_json

NAME = "manifest.json"
VERSION = 1
AGAIN = f"convert again; for weights that were changed on purpose, delete {NAME}"
MAX_BYTES = 32_000_000  # of 8x22B: 0.3 MB


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafRecord:
    """A finished leaf: its shape, dtype name, and the sha256 (hex) of each chunk in order.

    ``nonfinite``: it holds NaN or infinite values, which were asked to be kept. ``report``: what
    its maker had to say of it, where it was made on the way.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[str, ...]
    nonfinite: bool = dataclasses.field(default=False, compare=False)
    report: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> LeafRecord:
        """From JSON; KeyError or TypeError for what is none."""
        found = cls(
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            chunks=tuple(entry["chunks"]),
            nonfinite=bool(entry.get("nonfinite", False)),
            report=entry.get("report"),
        )
        is_sound = all(map(_is_count, found.shape)) and _are_texts(found.dtype, *found.chunks)
        if not is_sound or not isinstance(found.report, dict | None):
            raise TypeError("a field of another type")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A finished conversion.

    Attributes:
        fingerprint: the content of the source and the options that it was made from.
        leaves: by path.
        parameters: number of weights.
        bytes: of all leaves.
        companions: sha256 (hex) of each small file by name; no part of ``digest``.
        source: what it was made from: name, layout, and repository and commit on the Hub.
    """

    fingerprint: Mapping[str, Any]
    leaves: Mapping[str, LeafRecord]
    parameters: int
    bytes: int
    companions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The digest of the weights, whatever they were read from."""
        return fold(self.leaves)

    def chunk_digest(self, chunk: Chunk) -> str:
        """The sha256 (hex) of a chunk's bytes."""
        return self.leaves[chunk.leaf].chunks[chunk.expert or 0]

    def check_describes(
        self, stored: Mapping[str, tuple[tuple[int, ...], str]], folder: Path
    ) -> None:
        """Refuses weights of other leaves, shapes or dtype names (exit code 65)."""
        described = {path: (leaf.shape, leaf.dtype) for path, leaf in self.leaves.items()}
        counts = {path: len(chunks_of(path, leaf.shape)) for path, leaf in self.leaves.items()}
        is_complete = all(len(self.leaves[path].chunks) == counts[path] for path in counts)
        if described != dict(stored) or not is_complete:
            raise MixtralError(f"{folder / NAME} is of other weights", fix=AGAIN, code=BAD_DATA)

    def write(self, folder: Path) -> None:
        """Writes manifest.json, durably."""
        content = {
            "version": VERSION,
            "digest": self.digest,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "fingerprint": self.fingerprint,
            "companions": self.companions,
            "source": self.source,
            "leaves": {path: dataclasses.asdict(leaf) for path, leaf in self.leaves.items()},
        }
        write_durably(folder / NAME, json.dumps(content, indent=1).encode())


def fold(leaves: Mapping[str, LeafRecord]) -> str:
    """One sha256 (hex) over all leaves."""
    total = hashlib.sha256()
    for path in sorted(leaves):
        leaf = leaves[path]
        line = json.dumps([path, list(leaf.shape), leaf.dtype, list(leaf.chunks)])
        total.update(line.encode() + b"\n")
    return total.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Reads and proves manifest.json.

    Raises:
        MixtralError: exit code 65 if it is of another version, unreadable or altered.
    """
    path = folder / NAME
    raw = read_json(path, max_bytes=MAX_BYTES)
    if raw.get("version") != VERSION:
        raise MixtralError(
            f"{path} version",
            expected=VERSION,
            got=raw.get("version"),
            fix="convert the checkpoint again",
            code=BAD_DATA,
        )
    try:
        leaves = {name: LeafRecord.of(leaf) for name, leaf in raw["leaves"].items()}
        manifest = Manifest(
            fingerprint=raw["fingerprint"],
            leaves=leaves,
            parameters=raw["parameters"],
            bytes=raw["bytes"],
            companions=dict(raw.get("companions", {})),
            source=dict(raw.get("source", {})),
        )
        intact = _is_sound(manifest) and manifest.digest == raw["digest"]
    except (KeyError, TypeError, ValueError, AttributeError):
        intact = False
    if not intact:
        raise MixtralError(
            f"{path} does not agree with its own digest: it was altered",
            fix="convert the checkpoint again",
            code=BAD_DATA,
        )
    return manifest


def read_ours(folder: Path) -> Manifest | None:
    """The manifest of a folder that may be any.

    None where there is none, or a file of that name by another tool.

    Raises:
        MixtralError: as ``read_manifest``.
    """
    path = folder / NAME
    if not path.exists():
        return None
    ours = {"version", "digest", "fingerprint", "leaves"}
    if not ours <= read_json(path, max_bytes=MAX_BYTES).keys():
        return None
    return read_manifest(folder)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_texts(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_sound(manifest: Manifest) -> bool:
    """The types of what no digest covers; companions are plain names."""
    names, source = manifest.companions, manifest.source
    return (
        isinstance(manifest.fingerprint, dict)
        and _is_count(manifest.parameters)
        and _is_count(manifest.bytes)
        and _are_texts(*names, *names.values(), *source, *source.values())
        and all(Path(name).name == name != ".." and "\0" not in name for name in names)
    )


def file_sha256(path: Path) -> str:
    """The digest of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file so that it survives a crash right after."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes the entries of a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
