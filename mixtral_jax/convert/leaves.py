"""Leaves of a checkpoint as rows of chunks, whatever the folder's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from mixtral_jax.config import NATIVE_NAME, ModelConfig, config_path, config_to_dict
from mixtral_jax.convert import manifest as manifests
from mixtral_jax.convert import names, transforms
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.orbax_leaves import WEIGHTS, OrbaxLeaves
from mixtral_jax.convert.parts import split_path
from mixtral_jax.convert.quantized.matrices import QuantizedMatrices, num_rows, origin
from mixtral_jax.convert.quantized.methods import read_method
from mixtral_jax.convert.reader import INDEX_NAME, PICKLES, Checkpoint
from mixtral_jax.convert.safetensors_file import FLOATS
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.json_file import read_json
from mixtral_jax.model.transformer import LeafSpec

Note = Callable[[str], None]


@runtime_checkable
class Leaves(Protocol):
    """A readable set of leaves; each chunk is a C-ordered ``[rows, ...]`` array."""

    @property
    def manifest(self) -> manifests.Manifest | None:
        """What the folder should hold; None where nothing of ours says."""
        ...

    @property
    def specs(self) -> Mapping[str, LeafSpec]:
        """What is stored: weights, and in place of a quantized one its parts (convert/parts.py)."""
        ...

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
        """The recorded sha256 of a chunk's bytes, None where there is no manifest."""
        ...

    def close(self) -> None:
        """Releases the files."""
        ...


class LeavesOf:
    """What leaves that are made of those of a ``source`` have in common with it.

    Args:
        source: an open checkpoint.
    """

    manifest = None  # of the source alone

    def __init__(self, source: Leaves):
        self.source = source

    @property
    def layout(self) -> str:
        """That of the source."""
        return self.source.layout

    @property
    def whereabouts(self) -> Any:
        """Of the source."""
        return self.source.whereabouts

    def check_unchanged(self) -> None:
        """See Leaves."""
        self.source.check_unchanged()

    def close(self) -> None:
        """Closes the source."""
        self.source.close()


@runtime_checkable
class Reporting(Protocol):
    """Leaves that are made while they are read, and can say how a leaf turned out."""

    def report(self, leaf: str) -> dict[str, Any] | None:
        """For JSON, of a leaf that has been read whole; kept in its record."""
        ...


class PublishedLeaves:
    """The leaves of a folder of published files, in any layout of ``names.LAYOUTS``.

    Where ``convert`` wrote them, its manifest lies beside them, and their bytes can be proved.

    Args:
        folder: where the files are.
        specs: what the model needs.
        head_dim: channels per head.
        note: called with one line for each thing a person should know.

    Raises:
        MixtralError: as ``Checkpoint``, ``names.plan``, ``read_method`` and ``QuantizedMatrices``;
            exit code 65 for a manifest of ours that is of other weights.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, LeafSpec],
        *,
        head_dim: int,
        note: Note = lambda line: None,
    ):
        self.specs, self._head_dim = specs, head_dim
        self.checkpoint = Checkpoint(folder)
        try:
            method = read_method(folder, note)
            self.plan = names.plan(
                self.checkpoint.tensors,
                specs,
                source=folder,
                problems=self.checkpoint.problems,
                method=method,
            )
            self._quantized = None
            if method is not None:
                self._quantized = QuantizedMatrices(
                    self.checkpoint, method, self.plan, specs, note=note
                )
                self.specs = self._quantized.specs
            for what in ("rotary_emb.inv_freq buffers", "scales of the cache"):
                is_buffer = what.startswith("rotary")
                found = [name for name in self.plan.ignored if ("inv_freq" in name) == is_buffer]
                if found:
                    note(f"{folder}: {len(found)} {what} are ignored")
            if self.checkpoint.unread:
                note(f"{folder}: not read: {', '.join(self.checkpoint.unread)}")
            if self.plan.tied_head:
                _same_tensor(self.checkpoint, *self.plan.tied_head)
            self.manifest = manifests.read_ours(folder)
            if self.manifest is not None:
                stored = {leaf: (spec.shape, self.dtype(leaf).name) for leaf, spec in specs.items()}
                self.manifest.check_describes(stored, folder)
        except BaseException:
            self.close()
            raise

    def dtype(self, leaf: str) -> np.dtype:
        """The stored dtype of a leaf; of one that is decoded, what it is decoded to."""
        if split_path(leaf) is not None:
            return np.dtype(self.specs[leaf].dtype)
        if self._quantized is not None and leaf in self._quantized.leaves:
            return self._quantized.dtype(leaf)
        chunk = chunks_of(leaf, self.specs[leaf].shape)[0]
        return FLOATS[self.checkpoint.tensors[self.source_name(chunk)].dtype]

    @property
    def layout(self) -> str:
        """The layout that the names told."""
        return self.plan.layout

    @property
    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Identifies the content of every file by little of it, and how it is decoded."""
        found = self.checkpoint.fingerprint
        if self._quantized is not None:
            found |= {"quantization": self._quantized.settings}
        return found

    @property
    def whereabouts(self) -> dict[str, dict[str, Any]]:
        """Which files they are."""
        return self.checkpoint.whereabouts

    def check_unchanged(self) -> None:
        """By size, time and file."""
        self.checkpoint.check_unchanged()

    def unit(self, chunk: Chunk) -> int:
        """More than 1 where rows are permuted, transposed or decoded together."""
        shape = self.specs[chunk.leaf].shape[0 if chunk.expert is None else 1 :]
        if self._is_decoded(chunk):
            return shape[0]
        return transforms.unit(self.plan.sources[chunk].transform, shape, self._head_dim)

    def _is_decoded(self, chunk: Chunk) -> bool:
        return self._quantized is not None and origin(chunk).leaf in self._quantized.leaves

    def read_rows(self, chunk: Chunk, start: int, stop: int, out: np.ndarray) -> None:
        """Reads rows of a chunk."""
        if self._quantized is not None and self._is_decoded(chunk):
            self._quantized.read(chunk, out)
            return
        piece = self.plan.sources[chunk]
        name, first, _ = piece.rows

        def rows(start: int, stop: int, into: np.ndarray) -> None:
            self.checkpoint.read_rows(name, first + start, first + stop, into)

        transforms.read(piece.transform, rows, start, stop, out, head_dim=self._head_dim)

    def source_name(self, chunk: Chunk) -> str:
        """The published tensor that a chunk lies in, or that its matrix stands for."""
        return self.plan.sources[origin(chunk)].rows.tensor

    def prefetch(self, leaf: str) -> None:
        """Asks for the rows of every chunk; with the codes of a matrix, for all of its parts."""
        part = split_path(leaf)
        if part is not None and part.part != "codes":
            return
        for chunk in chunks_of(leaf, self.specs[leaf].shape):
            piece = self.plan.sources[origin(chunk)]
            module = self.plan.modules.get(piece.rows.tensor)
            if module is None:
                self.checkpoint.prefetch(*piece.rows)
                continue
            for tensor in module.parts.values():
                self.checkpoint.prefetch(tensor.name, 0, num_rows(tensor))

    def digest(self, chunk: Chunk) -> str | None:
        """The sha256 that the conversion recorded, if one wrote these files."""
        return None if self.manifest is None else self.manifest.chunk_digest(chunk)

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
