"""Moves one leaf from a checkpoint into one host array: read, prove, cast, digest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Executor

import ml_dtypes
import numpy as np

from mixtral_jax.convert.leaves import HuggingFaceLeaves
from mixtral_jax.convert.manifest import LeafRecord
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.reader import bytes_of
from mixtral_jax.errors import BAD_DATA, MixtralError

# Bytes of the source in flight per thread.
BLOCK_BYTES = 16 << 20

# dtype -> (unsigned view, all bits but the sign, exponent all ones): NaN and Inf have the exponent
# full, so the largest magnitude tells.
_EXPONENTS: dict[np.dtype, tuple[type, int, int]] = {
    np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7FFF, 0x7F80),
}
_CHECK_ELEMENTS = 1 << 20


def all_finite(values: np.ndarray) -> bool:
    """True if no element is NaN or infinite; uses little memory beyond ``values``."""
    unsigned, magnitude, full = _EXPONENTS[values.dtype]
    bits = values.view(unsigned).reshape(-1)
    scratch = np.empty(min(len(bits), _CHECK_ELEMENTS), unsigned)
    for start in range(0, len(bits), _CHECK_ELEMENTS):
        part = bits[start : start + _CHECK_ELEMENTS]
        masked = np.bitwise_and(part, unsigned(magnitude), out=scratch[: len(part)])
        if masked.max() >= full:
            return False
    return True


def sha256(values: np.ndarray) -> str:
    """The digest of a contiguous array's bytes."""
    return hashlib.sha256(bytes_of(values)).hexdigest()


def fetch_leaf(
    leaves: HuggingFaceLeaves,
    leaf: str,
    out: np.ndarray,
    *,
    allow_nonfinite: bool,
    pool: Executor,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> LeafRecord:
    """Fills ``out`` with a leaf in ``out``'s dtype, chunks in parallel.

    Args:
        leaves: the source.
        leaf: its path.
        out: C-ordered, of the canonical shape.
        allow_nonfinite: accept NaN and Inf.
        pool: runs one chunk per task.
        progress: called with the bytes of the source that were read.

    Returns:
        The record of what ``out`` now holds.

    Raises:
        MixtralError: exit code 65 naming the tensor with NaN or Inf, or one that a cast made Inf.
    """

    def fetch(chunk: Chunk) -> str:
        part = out if chunk.expert is None else out[chunk.expert]
        for start, stop in _blocks(part.shape, leaves.dtype(leaf).itemsize):
            rows = part[start:stop]
            if leaves.dtype(leaf) == out.dtype:
                leaves.read_rows(chunk, start, stop, rows)
            else:
                stored = np.empty(rows.shape, leaves.dtype(leaf))
                leaves.read_rows(chunk, start, stop, stored)
                if not allow_nonfinite and not all_finite(stored):
                    raise _not_finite(leaves, chunk)
                with np.errstate(over="ignore", invalid="ignore"):
                    rows[...] = stored.astype(out.dtype)
            if not allow_nonfinite and not all_finite(rows):
                raise _not_finite(leaves, chunk, dtype=out.dtype)
            progress(math.prod(rows.shape) * leaves.dtype(leaf).itemsize)
        return sha256(part)

    digests = tuple(pool.map(fetch, chunks_of(leaf, out.shape)))
    return LeafRecord(shape=tuple(out.shape), dtype=out.dtype.name, chunks=digests)


def digest_leaf(leaf: str, value: np.ndarray, pool: Executor) -> LeafRecord:
    """The record of a leaf in memory."""

    def digest(chunk: Chunk) -> str:
        return sha256(value if chunk.expert is None else value[chunk.expert])

    digests = tuple(pool.map(digest, chunks_of(leaf, value.shape)))
    return LeafRecord(shape=tuple(value.shape), dtype=value.dtype.name, chunks=digests)


def _blocks(shape: tuple[int, ...], itemsize: int) -> list[tuple[int, int]]:
    row_bytes = math.prod(shape[1:]) * itemsize
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    return [(start, min(shape[0], start + step)) for start in range(0, shape[0], step)]


def _not_finite(
    leaves: HuggingFaceLeaves, chunk: Chunk, dtype: np.dtype | None = None
) -> MixtralError:
    name = leaves.source_name(chunk)
    stored = leaves.dtype(chunk.leaf)
    if dtype is not None and dtype != stored:
        return MixtralError(
            f"{name} has values too large for {dtype.name}",
            fix="choose --dtype bfloat16 or float32, or pass --allow-nonfinite",
            code=BAD_DATA,
        )
    return MixtralError(
        f"{name} has NaN or infinite values",
        fix="download the checkpoint again, or pass --allow-nonfinite to keep them",
        code=BAD_DATA,
    )
