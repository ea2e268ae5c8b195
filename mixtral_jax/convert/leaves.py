"""Leaves of a checkpoint as rows of chunks, whatever the folder's format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mixtral_jax.convert import manifest as manifests
from mixtral_jax.convert import names
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.reader import (
    FLOATS,
    INDEX_NAME,
    PICKLES,
    Checkpoint,
    bytes_of,
    parse_json,
    read_exactly,
)
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.model.transformer import LeafSpec

Note = Callable[[str], None]
WEIGHTS = "weights"
_DTYPES = {dtype.name: dtype for dtype in FLOATS.values()}


@runtime_checkable
class Leaves(Protocol):
    """A readable set of leaves; each chunk is a C-ordered ``[rows, ...]`` array."""

    def dtype(self, leaf: str) -> np.dtype:
        """The stored dtype of a leaf."""
        ...

    def read_rows(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """Reads rows ``[start, stop)`` of a chunk into a contiguous array of the stored dtype."""
        ...

    def digest(self, chunk: Chunk) -> str | None:
        """The recorded sha256 of a chunk's bytes, None where the format records none."""
        ...

    def close(self) -> None:
        """Releases the files."""
        ...


class HuggingFaceLeaves:
    """The leaves of a Hugging Face folder, in the original or the fused layout.

    Raises:
        MixtralError: as ``Checkpoint`` and ``names.plan``.
    """

    def __init__(
        self, folder: Path, specs: Mapping[str, LeafSpec], *, note: Note = lambda line: None
    ):
        self._specs = specs
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
            if self.plan.tied_head:
                _same_tensor(self.checkpoint, names.EMBEDDING, names.HEAD)
        except BaseException:
            self.close()
            raise

    def dtype(self, leaf: str) -> np.dtype:
        """The stored dtype of a leaf."""
        chunk = chunks_of(leaf, self._specs[leaf].shape)[0]
        return FLOATS[self.checkpoint.tensors[self.plan.sources[chunk].tensor].dtype]

    def read_rows(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """Reads rows of a chunk."""
        rows = self.plan.sources[chunk]
        self.checkpoint.read_rows(rows.tensor, rows.start + start, rows.start + stop, out)

    def source_name(self, chunk: Chunk) -> str:
        """The published tensor that a chunk lies in, for error lines."""
        return self.plan.sources[chunk].tensor

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
                f"{folder}: {len(problems)} problem(s) with its weights: "
                f"{'; '.join(sorted(problems))}",
                fix="convert the checkpoint again",
                code=BAD_DATA,
            )

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
        array = parse_json(path.read_bytes(), path)
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


def is_checkpoint(folder: str | Path) -> Literal["orbax", "huggingface"] | None:
    """Tells what a folder is by the files in it; None if it is no checkpoint.

    A folder of pickles counts as Hugging Face: reading it says why they are refused.
    """
    folder = Path(folder)
    if (folder / manifests.NAME).is_file() and (folder / WEIGHTS).is_dir():
        return "orbax"
    if (folder / INDEX_NAME).is_file() or (folder / "config.json").is_file():
        return "huggingface"
    suffixes = {".safetensors", *PICKLES}
    if folder.is_dir() and any(path.suffix in suffixes for path in folder.iterdir()):
        return "huggingface"
    return None


def open_leaves(
    folder: str | Path, specs: Mapping[str, LeafSpec], *, note: Note = lambda line: None
) -> Leaves:
    """Opens a checkpoint folder of any known format.

    Raises:
        MixtralError: exit code 66 if it is no checkpoint, 65 if it is not sound.
    """
    kind = is_checkpoint(folder)
    if kind == "orbax":
        return OrbaxLeaves(Path(folder), specs)
    if kind == "huggingface":
        return HuggingFaceLeaves(Path(folder), specs, note=note)
    raise MixtralError(
        f"no checkpoint in {folder}",
        fix="name a folder that convert wrote, or a Hugging Face folder",
        code=INPUT_NOT_FOUND,
    )


def config_content(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a folder, as it stands."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
