"""Writes Hugging Face safetensors: original names, shards with an index, bytes as in the leaves.

Every shard is laid out before the first byte of a tensor is written (its header depends on names,
dtypes and shapes alone), so leaves are written straight into their places and a killed run
resumes at the next leaf. Format: https://huggingface.co/docs/safetensors; index and names of
shards: ``save_pretrained`` of transformers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from mixtral_jax.convert.manifest import LeafRecord, write_durably
from mixtral_jax.convert.names import PUBLISHED, Chunk, pieces
from mixtral_jax.convert.reader import INDEX_NAME, SINGLE_NAME
from mixtral_jax.convert.safetensors_file import FLOATS, bytes_of, encode_header, read_exactly
from mixtral_jax.convert.transfer import sha256
from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.model.transformer import LeafSpec

_CODES = {dtype: code for code, dtype in FLOATS.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BLOCK_BYTES = 16 << 20


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number, as transformers reads them.

    Raises:
        MixtralError: exit code 64 for anything else, and for nothing.
    """
    match = re.fullmatch(r"(\d{1,15})\s*([A-Z]*)", text.strip().upper())
    size = int(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0
    if not size:
        raise MixtralError(
            "--max-shard-size", expected="a size as 5GB or 500MB", got=repr(text), code=USAGE
        )
    return size


class Place(NamedTuple):
    """Where a chunk lies: bytes ``[start, start + size)`` of a file."""

    file: str
    name: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file: all that precedes its tensors, and its size in bytes."""

    header: bytes
    size: int


class SafetensorsOutput:
    """A Hugging Face folder.

    Args:
        folder: where to write.
        specs: the leaves.
        dtypes: of each leaf, as it is written.
        max_shard_bytes: of the tensors in one file; a larger tensor has a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, LeafSpec],
        dtypes: Mapping[str, np.dtype],
        *,
        max_shard_bytes: int,
    ):
        self.folder, self._dtypes = folder, dtypes
        self.shards, self.places = _lay_out(specs, dtypes, max_shard_bytes)

    def prepare(self) -> None:
        """Makes every file in full size, header first; its tensors are holes until written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, shard in self.shards.items():
            fd = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                is_whole = os.fstat(fd).st_size == shard.size
                if not is_whole or os.pread(fd, len(shard.header), 0) != shard.header:
                    os.ftruncate(fd, shard.size)
                    _write_exactly(fd, memoryview(shard.header), 0)
                    os.fsync(fd)
            finally:
                os.close(fd)

    def write(self, leaf: str, value: np.ndarray) -> None:
        """Writes the tensors of a leaf into their places."""
        places = self._places(leaf)
        for name in dict.fromkeys(place.file for _, place in places):
            fd = os.open(self.folder / name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for chunk, place in places:
                    if place.file == name:
                        part = value if chunk.expert is None else value[chunk.expert]
                        _write_exactly(fd, bytes_of(part), place.start)
                os.fsync(fd)
            finally:
                os.close(fd)

    def is_intact(self, leaf: str, record: LeafRecord, pool: Executor) -> bool:
        """Compares the bytes in their places with their digests, and the headers."""
        if record.dtype != self._dtypes[leaf].name:
            return False
        places = [place for _, place in self._places(leaf)]
        if not all(self._is_sound(name) for name in {place.file for place in places}):
            return False
        return tuple(pool.map(self._digest, places)) == tuple(record.chunks)

    def _is_sound(self, name: str) -> bool:
        path, shard = self.folder / name, self.shards[name]
        if not path.is_file() or path.stat().st_size != shard.size:
            return False
        with open(path, "rb") as file:
            return file.read(len(shard.header)) == shard.header

    def _digest(self, place: Place) -> str:
        path, digest = self.folder / place.file, hashlib.sha256()
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start in range(0, place.size, _BLOCK_BYTES):
                block = bytearray(min(_BLOCK_BYTES, place.size - start))
                read_exactly(fd, memoryview(block), place.start + start, path)
                digest.update(block)
        finally:
            os.close(fd)
        return digest.hexdigest()

    def reads_back(self, leaf: str, record: LeafRecord, pool: Executor) -> bool:
        """Reads the tensors with the safetensors library."""

        def digest(place: Place) -> str:  # a handle of the library belongs to one thread
            with safe_open(self.folder / place.file, framework="np") as file:
                return sha256(np.ascontiguousarray(file.get_tensor(place.name)))

        try:
            digests = tuple(pool.map(digest, [place for _, place in self._places(leaf)]))
        except (OSError, SafetensorError):
            return False
        return digests == tuple(record.chunks)

    def finish(self, records: Mapping[str, LeafRecord]) -> None:
        """Writes the index, if there are several files."""
        assert records.keys() == {chunk.leaf for chunk in self.places}
        if len(self.shards) > 1:
            write_durably(self.folder / INDEX_NAME, self._index())

    def _index(self) -> bytes:
        places = self.places.items()
        parameters = sum(p.size // self._dtypes[chunk.leaf].itemsize for chunk, p in places)
        index = {
            "metadata": {
                "total_parameters": parameters,
                "total_size": sum(place.size for place in self.places.values()),
            },
            "weight_map": dict(sorted((p.name, p.file) for p in self.places.values())),
        }
        return json.dumps(index, indent=2).encode() + b"\n"

    def check(self) -> None:
        """Finds the index, and every file with its header and in its size."""
        index = self.folder / INDEX_NAME
        found = index.read_bytes() if index.is_file() else None
        if found != (self._index() if len(self.shards) > 1 else None):
            raise MixtralError(
                f"{index} is missing, was altered, or does not belong there",
                fix="delete that folder and convert again",
                code=BAD_DATA,
            )
        for name in self.shards:
            if not self._is_sound(name):
                raise MixtralError(
                    f"{self.folder / name} is missing, truncated or was altered",
                    fix="delete that folder and convert again",
                    code=BAD_DATA,
                )

    def num_tensors(self) -> int:
        """One per published name."""
        return len(self.places)

    def _places(self, leaf: str) -> list[tuple[Chunk, Place]]:
        return [item for item in self.places.items() if item[0].leaf == leaf]


def _lay_out(
    specs: Mapping[str, LeafSpec], dtypes: Mapping[str, np.dtype], max_shard_bytes: int
) -> tuple[dict[str, Shard], dict[Chunk, Place]]:
    """Deals the tensors out to files, in the order of the leaves."""
    groups, used = [[]], 0
    for piece in pieces(PUBLISHED, specs):
        size = math.prod(piece.tensor_shape) * dtypes[piece.chunk.leaf].itemsize
        if groups[-1] and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append((piece, size))
        used += size
    shards, places = {}, {}
    for k, group in enumerate(groups, 1):
        name = f"model-{k:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else SINGLE_NAME
        # Widest elements first, so that every tensor is aligned to its own.
        group.sort(key=lambda item: -dtypes[item[0].chunk.leaf].itemsize)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for piece, size in group:
            entries[piece.rows.tensor] = {
                "dtype": _CODES[dtypes[piece.chunk.leaf]],
                "shape": list(piece.tensor_shape),
                "data_offsets": [end, end + size],
            }
            end += size
        header = encode_header(entries)
        shards[name] = Shard(header=header, size=len(header) + end)
        for piece, size in group:
            start = len(header) + entries[piece.rows.tensor]["data_offsets"][0]
            places[piece.chunk] = Place(name, piece.rows.tensor, start, size)
    return shards, places


def _write_exactly(fd: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(fd, content, offset)
        content, offset = content[written:], offset + written
