"""How published matrices differ from canonical ones, undone while they are read.

``as_is``: they do not. ``rope``: the rows of a head are interleaved pairs, as in Mistral's own
code, and become two halves, as in transformers (its convert_mixtral_weights_to_hf.py).
``transpose``: stored ``[I, O]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np

Transform: TypeAlias = Literal["as_is", "rope", "transpose"]
# (start, stop, out): fills out with the published rows [start, stop) of one chunk.
ReadRows: TypeAlias = Callable[[int, int, np.ndarray], None]

_BLOCK_BYTES = 16 << 20
_TILE = 32, 128  # fits the nearest cache: a plain numpy transpose is three times slower


def unit(transform: Transform, shape: tuple[int, ...], head_dim: int) -> int:
    """Rows of a canonical chunk of ``shape`` that are read together."""
    return {"as_is": 1, "rope": head_dim, "transpose": shape[0]}[transform]


def read(
    transform: Transform, rows: ReadRows, start: int, stop: int, out: np.ndarray, *, head_dim: int
) -> None:
    """Reads canonical rows ``[start, stop)`` of a chunk, whole units, into ``out``."""
    if transform == "as_is":
        rows(start, stop, out)
    elif transform == "rope":
        _read_interleaved(rows, start, stop, out, head_dim)
    else:
        _read_transposed(rows, out)


def _read_interleaved(
    rows: ReadRows, start: int, stop: int, out: np.ndarray, head_dim: int
) -> None:
    pairs = np.empty(out.shape, out.dtype)
    rows(start, stop, pairs)
    halves = out.reshape(-1, 2, head_dim // 2, out.shape[-1])
    halves[...] = pairs.reshape(-1, head_dim // 2, 2, out.shape[-1]).swapaxes(1, 2)


def _read_transposed(rows: ReadRows, out: np.ndarray) -> None:
    num_outputs, num_inputs = out.shape
    step = max(1, _BLOCK_BYTES // (num_outputs * out.itemsize))
    block = np.empty((min(step, num_inputs), num_outputs), out.dtype)
    for start in range(0, num_inputs, step):
        stop = min(num_inputs, start + step)
        part = block[: stop - start]
        rows(start, stop, part)
        for i in range(0, stop - start, _TILE[0]):
            for o in range(0, num_outputs, _TILE[1]):
                tile = part[i : i + _TILE[0], o : o + _TILE[1]]
                out[o : o + _TILE[1], start + i : start + i + len(tile)] = tile.T
