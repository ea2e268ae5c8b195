"""The leaves of a folder that ``convert`` wrote as Orbax checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.convert import manifest as manifests
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.parts import stored_specs
from mixtral_jax.convert.safetensors_file import STORED, bytes_of, prefetch, read_exactly
from mixtral_jax.errors import BAD_DATA, MixtralError, listing
from mixtral_jax.json_file import read_json
from mixtral_jax.model.transformer import LeafSpec

WEIGHTS = "weights"


class OrbaxLeaves:
    """The leaves of a folder that ``convert`` wrote.

    Each leaf is one Orbax checkpoint in ``weights/<leaf>``, which any Orbax reads. Here the chunk
    files of its zarr v2 array (raw C-ordered bytes, no compression:
    https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html) are read directly, so that a device
    costs the rows it holds, and bytes are proved before they are used.

    A quantized weight lies there in its parts (convert/parts.py), each a leaf of its own.

    Raises:
        MixtralError: exit code 65 listing leaves that are missing, extra, misshapen or truncated.
    """

    layout = "orbax"

    def __init__(self, folder: Path, specs: Mapping[str, LeafSpec]):
        self.folder = folder
        self.manifest = manifests.read_manifest(folder)
        records = self.manifest.leaves
        self.specs = specs = stored_specs(specs, records)
        problems = [f"missing {leaf}" for leaf in specs.keys() - records.keys()]
        problems += [f"extra {leaf}" for leaf in records.keys() - specs.keys()]
        for leaf in specs.keys() & records.keys():
            problems += check_leaf(folder, leaf, specs[leaf].shape, records[leaf])
        if problems:
            raise MixtralError(
                f"{folder}: {len(problems)} problem(s) with its weights: {listing(problems)}",
                fix="convert the checkpoint again",
                code=BAD_DATA,
            )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The digest of the weights."""
        return {manifests.NAME: {"digest": self.manifest.digest}}

    @property
    def whereabouts(self) -> dict[str, Any]:
        """Nothing more: the digest is of all the content, and is proved while it is read."""
        return {}

    def check_unchanged(self) -> None:
        """Its digests are proved while it is read."""

    def unit(self, chunk: Chunk) -> int:
        """Any row can be read."""
        return 1

    def source_name(self, chunk: Chunk) -> str:
        """The leaf, and the expert if it has some."""
        return chunk.leaf if chunk.expert is None else f"{chunk.leaf}[{chunk.expert}]"

    def dtype(self, leaf: str) -> np.dtype:
        """The stored dtype of a leaf."""
        return STORED[self.manifest.leaves[leaf].dtype]

    def read_rows(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """Reads rows of a chunk."""
        shape = self.manifest.leaves[chunk.leaf].shape
        path = chunk_path(self.folder, chunk, len(shape))
        view = bytes_of(out)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_exactly(fd, view, start * (len(view) // (stop - start)), path)
        finally:
            os.close(fd)

    def prefetch(self, leaf: str) -> None:
        """Asks for every chunk file."""
        shape = self.manifest.leaves[leaf].shape
        for chunk in chunks_of(leaf, shape):
            fd = os.open(chunk_path(self.folder, chunk, len(shape)), os.O_RDONLY | os.O_CLOEXEC)
            try:
                prefetch(fd, 0, os.fstat(fd).st_size)
            finally:
                os.close(fd)

    def digest(self, chunk: Chunk) -> str | None:
        """The sha256 that the conversion recorded."""
        return self.manifest.chunk_digest(chunk)

    def close(self) -> None:
        """Nothing is held open."""


def array_folder(folder: Path, leaf: str) -> Path:
    """The zarr array of a leaf inside its Orbax checkpoint."""
    return folder / WEIGHTS / leaf / "state" / leaf


def chunk_path(folder: Path, chunk: Chunk, ndim: int) -> Path:
    """The file of one chunk."""
    index = [chunk.expert or 0] + [0] * (ndim - 1)
    return array_folder(folder, chunk.leaf) / ".".join(map(str, index))


def check_leaf(
    folder: Path, leaf: str, shape: tuple[int, ...], record: manifests.LeafRecord
) -> list[str]:
    """What is wrong with a leaf on disk, without reading its data."""
    shape = tuple(shape)
    if tuple(record.shape) != shape:
        return [f"{leaf}: expected shape {list(shape)}, got {list(record.shape)}"]
    chunks = chunks_of(leaf, shape)
    if record.dtype not in STORED or len(record.chunks) != len(chunks):
        return [f"{leaf}: manifest entry is unusable"]
    path = array_folder(folder, leaf) / ".zarray"
    try:
        array = read_json(path)
    except OSError:
        return [f"{leaf}: no array in {path.parent}"]
    chunk_shape = shape if chunks[0].expert is None else (1, *shape[1:])
    raw = array.get("compressor") is None and not array.get("filters") and array.get("order") == "C"
    expected = (list(shape), list(chunk_shape), ".")
    if not raw or expected != tuple(map(array.get, ("shape", "chunks", "dimension_separator"))):
        return [f"{leaf}: {path} does not describe raw chunks {list(chunk_shape)}"]
    num_bytes = int(np.prod(chunk_shape)) * STORED[record.dtype].itemsize
    problems = []
    for chunk in chunks:
        file = chunk_path(folder, chunk, len(shape))
        size = file.stat().st_size if file.is_file() else -1
        if size != num_bytes:
            got = "no file" if size < 0 else f"{size} bytes"
            problems.append(f"{leaf}: {file.name}: expected {num_bytes} bytes, got {got}")
    return problems
