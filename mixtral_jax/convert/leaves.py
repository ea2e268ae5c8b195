"""Leaves of a checkpoint as rows of chunks, whatever the folder's format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mixtral_jax.config import NATIVE_NAME, ModelConfig, config_path, config_to_dict
from mixtral_jax.convert import manifest as manifests
from mixtral_jax.convert import names, transforms
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.reader import INDEX_NAME, PICKLES, Checkpoint
from mixtral_jax.convert.safetensors_file import (
    FLOATS,
    bytes_of,
    prefetch,
    read_exactly,
)
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError, listing
from mixtral_jax.json_file import read_json
from mixtral_jax.model.transformer import LeafSpec

Note = Callable[[str], None]
WEIGHTS = "weights"
_DTYPES = {dtype.name: dtype for dtype in FLOATS.values()}


@runtime_checkable
class Leaves(Protocol):
    """A readable set of leaves; each chunk is a C-ordered ``[rows, ...]`` array."""

    @property
    def layout(self) -> str:
        """A key of ``names.LAYOUTS``; ``orbax`` for a folder of ours."""
        ...

    @property
    def fingerprint(self) -> Any:
        """Identifies the content."""
        ...

    @property
    def whereabouts(self) -> Any:
        """Which files they are, on this machine."""
        ...

    def check_unchanged(self) -> None:
        """Refuses a source that changed since it was opened (exit code 65)."""
        ...

    def unit(self, chunk: Chunk) -> int:
        """Reads begin and end at multiples of so many rows, or at the chunk's end."""
        ...

    def source_name(self, chunk: Chunk) -> str:
        """What a chunk is called in the files, for error lines."""
        ...

    def dtype(self, leaf: str) -> np.dtype:
        """The stored dtype of a leaf."""
        ...

    def read_rows(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """Reads rows ``[start, stop)`` of a chunk into a contiguous array of the stored dtype."""
        ...

    def prefetch(self, leaf: str) -> None:
        """Asks the system to read a leaf ahead, into no memory of this process."""
        ...

    def digest(self, chunk: Chunk) -> str | None:
        """The recorded sha256 of a chunk's bytes, None where the format records none."""
        ...

    def close(self) -> None:
        """Releases the files."""
        ...


class PublishedLeaves:
    """The leaves of a folder of published files, in any layout of ``names.LAYOUTS``.

    Args:
        folder: where the files are.
        specs: what the model needs.
        head_dim: channels per head.
        note: called with one line for each thing a person should know.

    Raises:
        MixtralError: as ``Checkpoint`` and ``names.plan``.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, LeafSpec],
        *,
        head_dim: int,
        note: Note = lambda line: None,
    ):
        self._specs, self._head_dim = specs, head_dim
        self.checkpoint = Checkpoint(folder)
        try:
            self.plan = names.plan(
                self.checkpoint.tensors,
                specs,
                source=folder,
                problems=self.checkpoint.problems,
            )
            if self.plan.ignored:
                note(f"{folder}: {len(self.plan.ignored)} rotary_emb.inv_freq buffers are ignored")
            if self.checkpoint.unread:
                note(f"{folder}: not read: {', '.join(self.checkpoint.unread)}")
            if self.plan.tied_head:
                _same_tensor(self.checkpoint, *self.plan.tied_head)
        except BaseException:
            self.close()
            raise

    def dtype(self, leaf: str) -> np.dtype:
        """The stored dtype of a leaf."""
        chunk = chunks_of(leaf, self._specs[leaf].shape)[0]
        return FLOATS[self.checkpoint.tensors[self.source_name(chunk)].dtype]

    @property
    def layout(self) -> str:
        """The layout that the names told."""
        return self.plan.layout

    @property
    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Identifies the content of every file by little of it."""
        return self.checkpoint.fingerprint

    @property
    def whereabouts(self) -> dict[str, dict[str, Any]]:
        """Which files they are."""
        return self.checkpoint.whereabouts

    def check_unchanged(self) -> None:
        """By size, time and file."""
        self.checkpoint.check_unchanged()

    def unit(self, chunk: Chunk) -> int:
        """More than 1 where rows are permuted or transposed."""
        shape = self._specs[chunk.leaf].shape[0 if chunk.expert is None else 1 :]
        return transforms.unit(self.plan.sources[chunk].transform, shape, self._head_dim)

    def read_rows(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """Reads rows of a chunk."""
        piece = self.plan.sources[chunk]
        name, first, _ = piece.rows

        def rows(start: int, stop: int, into: np.ndarray) -> None:
            self.checkpoint.read_rows(name, first + start, first + stop, into)

        transforms.read(piece.transform, rows, start, stop, out, head_dim=self._head_dim)

    def source_name(self, chunk: Chunk) -> str:
        """The published tensor that a chunk lies in."""
        return self.plan.sources[chunk].rows.tensor

    def prefetch(self, leaf: str) -> None:
        """Asks for the rows of every chunk."""
        for chunk in chunks_of(leaf, self._specs[leaf].shape):
            self.checkpoint.prefetch(*self.plan.sources[chunk].rows)

    def digest(self, chunk: Chunk) -> str | None:
        """None: published files record no digests."""
        return None

    def close(self) -> None:
        """Closes the files."""
        self.checkpoint.close()


def _same_tensor(checkpoint: Checkpoint, one: str, other: str) -> None:
    """Refuses a head that differs from the embedding where the config ties the two."""
    tensor = checkpoint.tensors[one]
    total, step = tensor.shape[0], max(1, (16 << 20) // max(1, tensor.row_bytes))
    same = checkpoint.tensors[other].dtype == tensor.dtype
    for start in range(0, total if same else 0, step):
        stop = min(total, start + step)
        parts = [np.empty((stop - start) * tensor.row_bytes, np.uint8) for _ in range(2)]
        for name, part in zip((one, other), parts, strict=True):
            checkpoint.read_rows(name, start, stop, part)
        same = same and np.array_equal(parts[0], parts[1])
    if not same:
        raise MixtralError(
            f"{checkpoint.folder}: {other} differs from {one}, but config.json ties them",
            fix="set tie_word_embeddings to false in config.json to use the head",
            code=BAD_DATA,
        )


class OrbaxLeaves:
    """The leaves of a folder that ``convert`` wrote.

    Each leaf is one Orbax checkpoint in ``weights/<leaf>``, which any Orbax reads. Here the chunk
    files of its zarr v2 array (raw C-ordered bytes, no compression:
    https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html) are read directly, so that a device
    costs the rows it holds, and bytes are proved before they are used.

    Raises:
        MixtralError: exit code 65 listing leaves that are missing, extra, misshapen or truncated.
    """

    layout = "orbax"

    def __init__(self, folder: Path, specs: Mapping[str, LeafSpec]):
        self.folder = folder
        self.manifest = manifests.read_manifest(folder)
        records = self.manifest.leaves
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
        return _DTYPES[self.manifest.leaves[leaf].dtype]

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
        return self.manifest.leaves[chunk.leaf].chunks[chunk.expert or 0]

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
    if record.dtype not in _DTYPES or len(record.chunks) != len(chunks):
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
    num_bytes = int(np.prod(chunk_shape)) * _DTYPES[record.dtype].itemsize
    problems = []
    for chunk in chunks:
        file = chunk_path(folder, chunk, len(shape))
        size = file.stat().st_size if file.is_file() else -1
        if size != num_bytes:
            got = "no file" if size < 0 else f"{size} bytes"
            problems.append(f"{leaf}: {file.name}: expected {num_bytes} bytes, got {got}")
    return problems


def common_dtype(
    specs: Mapping[str, LeafSpec], stored: Mapping[str, np.dtype], *, preferred: str
) -> np.dtype:
    """The one dtype for leaves that may differ: ``preferred`` if some leaf has it, else that of
    most bytes."""
    sizes: dict[np.dtype, int] = {}
    for leaf, dtype in stored.items():
        num_bytes = int(np.prod(specs[leaf].shape)) * dtype.itemsize
        sizes[dtype] = sizes.get(dtype, 0) + num_bytes
    return max(sizes, key=lambda dtype: (dtype.name == preferred, sizes[dtype]))


def is_checkpoint(folder: str | Path) -> Literal["orbax", "published"] | None:
    """Tells what a folder is by the files in it; None if it is no checkpoint.

    A folder of pickles counts as published: reading it says why they are refused.
    """
    folder = Path(folder)
    if (folder / manifests.NAME).is_file() and (folder / WEIGHTS).is_dir():
        return "orbax"
    if (folder / INDEX_NAME).is_file() or config_path(folder).is_file():
        return "published"
    suffixes = {".safetensors", *PICKLES}
    if folder.is_dir() and any(path.suffix in suffixes for path in folder.iterdir()):
        return "published"
    return None


def open_leaves(
    folder: str | Path,
    specs: Mapping[str, LeafSpec],
    *,
    head_dim: int,
    note: Note = lambda line: None,
) -> Leaves:
    """Opens a checkpoint folder of any known format.

    Raises:
        MixtralError: exit code 66 if it is no checkpoint, 65 if it is not sound.
    """
    kind = is_checkpoint(folder)
    if kind == "orbax":
        return OrbaxLeaves(Path(folder), specs)
    if kind == "published":
        return PublishedLeaves(Path(folder), specs, head_dim=head_dim, note=note)
    raise MixtralError(
        f"no checkpoint in {folder}",
        fix="name a folder that convert wrote, a Hugging Face folder, or a native Mistral folder",
        code=INPUT_NOT_FOUND,
    )


def config_content(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """The parsed config.json of a folder as it stands; made of ``config`` where it has none."""
    path = config_path(folder)
    if path.name == NATIVE_NAME:
        return config_to_dict(config)
    return read_json(path)
