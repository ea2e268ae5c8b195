"""Moves one leaf from a checkpoint into one host array: read, prove, merge, cast, digest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from mixtral_jax.convert.finite import all_finite
from mixtral_jax.convert.leaves import Leaves, Reporting
from mixtral_jax.convert.manifest import AGAIN, LeafRecord
from mixtral_jax.convert.merge import LeafMerge
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.safetensors_file import bytes_of
from mixtral_jax.errors import BAD_DATA, MixtralError

# Bytes of the source in flight per thread; small enough to stay in the processor's cache.
BLOCK_BYTES = 4 << 20


def sha256(values: np.ndarray) -> str:
    """The digest of a contiguous array's bytes."""
    return hashlib.sha256(bytes_of(values)).hexdigest()


def fetch_leaf(
    leaves: Leaves,
    leaf: str,
    out: np.ndarray,
    *,
    allow_nonfinite: bool,
    pool: Executor,
    merge: LeafMerge | None = None,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> LeafRecord:
    """Fills ``out`` with a leaf in ``out``'s dtype, chunks in parallel.

    Args:
        leaves: the source.
        leaf: its path.
        out: C-ordered, of the canonical shape.
        allow_nonfinite: accept NaN and Inf.
        pool: runs one chunk per task.
        merge: the part of an adapter that is added to this leaf.
        progress: called with the bytes of the source that were read.

    Returns:
        The record of what ``out`` now holds.

    Raises:
        MixtralError: exit code 65 naming the tensor with NaN or Inf, or one that a cast made Inf,
            or one whose bytes are not those that its folder recorded, or one that the adapter
            leaves as it was.
    """
    stored_dtype = leaves.dtype(leaf)
    is_copy = stored_dtype == out.dtype and merge is None
    nonfinite: set[Chunk] = set()

    def fetch(chunk: Chunk) -> str:
        part = out if chunk.expert is None else out[chunk.expert]
        recorded, source, digest = leaves.digest(chunk), hashlib.sha256(), hashlib.sha256()
        for start, stop in _blocks(part.shape, stored_dtype.itemsize, leaves.unit(chunk)):
            rows = part[start:stop]
            stored = rows if is_copy else np.empty(rows.shape, stored_dtype)
            leaves.read_rows(chunk, start, stop, stored)
            if not is_copy:
                if recorded is not None:
                    source.update(bytes_of(stored))
                if not allow_nonfinite and not all_finite(stored):
                    raise _not_finite(leaves, chunk)
                with np.errstate(over="ignore", invalid="ignore"):
                    if merge is None:
                        rows[...] = stored.astype(out.dtype)
                    else:
                        merge.add(chunk, start, stored, rows)
            if not all_finite(rows):
                if not allow_nonfinite:
                    raise _not_finite(leaves, chunk, dtype=out.dtype, merged=merge is not None)
                nonfinite.add(chunk)
            digest.update(bytes_of(rows))  # while the rows are in the processor's cache
            progress(math.prod(rows.shape) * stored_dtype.itemsize)
        if recorded is not None and recorded != (digest if is_copy else source).hexdigest():
            raise altered(leaves, chunk)
        if merge is not None:
            merge.check(chunk, leaves.source_name(chunk), out.dtype)
        return digest.hexdigest()

    digests = tuple(pool.map(fetch, chunks_of(leaf, out.shape)))
    return LeafRecord(
        shape=tuple(out.shape),
        dtype=out.dtype.name,
        chunks=digests,
        nonfinite=bool(nonfinite),
        report=leaves.report(leaf) if isinstance(leaves, Reporting) else None,
    )


def digest_leaf(leaf: str, value: np.ndarray, pool: Executor) -> LeafRecord:
    """The record of a leaf in memory."""

    def digest(chunk: Chunk) -> str:
        return sha256(value if chunk.expert is None else value[chunk.expert])

    digests = tuple(pool.map(digest, chunks_of(leaf, value.shape)))
    return LeafRecord(shape=tuple(value.shape), dtype=value.dtype.name, chunks=digests)


def altered(leaves: Leaves, chunk: Chunk) -> MixtralError:
    """The error of a chunk whose bytes are not those that its manifest records."""
    name = leaves.source_name(chunk)
    return MixtralError(
        f"{name}: its bytes are not those that were written (its sha256 differs)",
        fix=f"{AGAIN}; the disk may be failing",
        code=BAD_DATA,
    )


def _blocks(shape: tuple[int, ...], itemsize: int, unit: int) -> list[tuple[int, int]]:
    unit_bytes = unit * math.prod(shape[1:]) * itemsize
    step = unit * max(1, BLOCK_BYTES // max(1, unit_bytes))
    return [(start, min(shape[0], start + step)) for start in range(0, shape[0], step)]


def _not_finite(
    leaves: Leaves, chunk: Chunk, dtype: np.dtype | None = None, *, merged: bool = False
) -> MixtralError:
    name = leaves.source_name(chunk)
    stored = leaves.dtype(chunk.leaf)
    if dtype is not None and (merged or dtype != stored):
        sums = "merged with the adapter " if merged else ""
        return MixtralError(
            f"{name} {sums}has values too large for {dtype.name}",
            fix="choose --dtype bfloat16 or float32, or pass --allow-nonfinite",
            code=BAD_DATA,
        )
    return MixtralError(
        f"{name} has NaN or infinite values",
        fix="download the checkpoint again, or pass --allow-nonfinite to keep them",
        code=BAD_DATA,
    )
