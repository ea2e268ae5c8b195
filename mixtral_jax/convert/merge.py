"""Adds an adapter to the weights it was trained for: W + scale * B A, in f32, rounded once.

peft computes the same in its ``merge_and_unload`` (tuners/lora/layer.py). That a merge changed each
tensor it should is checked, not assumed: a change too small for the dtype would be lost in silence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mixtral_jax.convert.adapter import Adapter, Factors
from mixtral_jax.convert.names import Chunk
from mixtral_jax.errors import BAD_DATA, MixtralError

_BLOCK_ELEMENTS = 1 << 16  # of a matrix at a time: f32 in the processor's cache


class LeafMerge:
    """The adapter's part of one leaf; chunks may be added from several threads."""

    def __init__(self, factors: Factors):
        self.factors = factors
        self._changed: set[Chunk] = set()

    def add(self, chunk: Chunk, start: int, base: np.ndarray, out: np.ndarray) -> None:
        """Writes rows of a chunk, from ``start`` on, with the adapter added.

        Args:
            chunk: which matrix.
            start: its first row here.
            base: rows ``[n, I]`` as stored.
            out: where they go, in the dtype to store.
        """
        e = chunk.expert or 0
        a, b = self.factors.a[e], self.factors.b[e][start : start + len(base)]
        if not self._is_wanted(chunk):  # not even the sign of a zero may change
            out[...] = base.astype(out.dtype)
            return
        step = max(1, _BLOCK_ELEMENTS // base.shape[1])
        for first in range(0, len(base), step):
            part = slice(first, first + step)
            delta = product(b[part], a) * np.float32(self.factors.scale)
            out[part] = (base[part].astype(np.float32) + delta).astype(out.dtype)
            if not np.array_equal(out[part], base[part].astype(out.dtype)):
                self._changed.add(chunk)

    def _is_wanted(self, chunk: Chunk) -> bool:
        """Whether the adapter has an update for a chunk that is not zero by its factors."""
        e = chunk.expert or 0
        return not _is_zero(self.factors, e)

    def check(self, chunk: Chunk, name: str, dtype: np.dtype) -> None:
        """Refuses a chunk that the adapter should have changed, and did not (exit code 65)."""
        if self._is_wanted(chunk) and chunk not in self._changed:
            raise MixtralError(
                f"{name}: the adapter changes nothing; its B A is zero, or lost when rounded to "
                f"{dtype.name}",
                fix="merge with --dtype float32, or apply the adapter unmerged when sampling",
                code=BAD_DATA,
            )


def _is_zero(factors: Factors, e: int) -> bool:
    return not (factors.scale and factors.a[e].any() and factors.b[e].any())


def product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """B A, f32, rank after rank: the same bits on every machine, as no BLAS promises.

    Args:
        b: ``[n, R]``.
        a: ``[R, I]``.
    """
    out = np.zeros((len(b), a.shape[1]), np.float32)
    term = np.empty_like(out)
    for r in range(len(a)):
        np.multiply(b[:, r, None], a[r], out=term)
        np.add(out, term, out=out)
    return out


class Merge:
    """An open adapter, leaf by leaf.

    Args:
        adapter: proved to fit the model.
        factors: what ``adapter.open()`` gives.
        note: called with one line if some tensors of the adapter are zero.

    Raises:
        MixtralError: exit code 65 for an adapter that changes nothing at all.
    """

    def __init__(
        self,
        adapter: Adapter,
        factors: Callable[[str], Factors],
        note: Callable[[str], None],
    ):
        self._adapter, self._factors = adapter, factors
        zero = total = 0
        for leaf, parts in adapter.parts.items():
            found = factors(leaf)
            present = [e for e, part in enumerate(parts) if part is not None]
            total += len(present)
            zero += sum(_is_zero(found, e) for e in present)
        if zero == total:
            raise MixtralError(
                f"{adapter.folder}: every update of the adapter is zero, merging changes nothing",
                fix="use an adapter that was trained",
                code=BAD_DATA,
            )
        for line in adapter.notes:
            note(line)
        if zero:
            note(f"{adapter.folder}: {zero} of {total} updates are zero and change nothing")

    def leaf(self, leaf: str) -> LeafMerge | None:
        """The part for one leaf, None where the adapter has none."""
        return LeafMerge(self._factors(leaf)) if leaf in self._adapter.parts else None
