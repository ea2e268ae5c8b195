"""How far quantized matrices are from what they were made of."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from mixtral_jax.convert.names import Chunk
from mixtral_jax.qtensor import QTensor


@dataclasses.dataclass(frozen=True)
class MatrixError:
    """Sums over one or more matrices.

    Attributes:
        squared_error: of all values.
        squared: of all values of the source.
        worst: the largest relative error of any group.
    """

    squared_error: float = 0.0
    squared: float = 0.0
    worst: float = 0.0

    @property
    def relative(self) -> float:
        """Frobenius norm of the error over that of the source; 0 where that is zero."""
        return math.sqrt(self.squared_error / self.squared) if self.squared else 0.0

    def __add__(self, other: MatrixError) -> MatrixError:
        return MatrixError(
            self.squared_error + other.squared_error,
            self.squared + other.squared,
            max(self.worst, other.worst),
        )


def error_of(w: np.ndarray, q: QTensor) -> MatrixError:
    """The error of a quantized matrix ``[O, I]``, whose dtype is float32."""
    w = w.astype(np.float32)
    groups = (*w.shape[:-1], q.scales.shape[-1], -1)
    errors = np.square(w - np.asarray(q.dequantize())).reshape(groups).sum(-1, dtype=np.float64)
    squares = np.square(w).reshape(groups).sum(-1, dtype=np.float64)
    relative = errors[squares > 0] / squares[squares > 0]
    worst = math.sqrt(relative.max(initial=0))
    return MatrixError(float(errors.sum()), float(squares.sum()), worst)


def by_weight(errors: Mapping[Chunk, MatrixError]) -> dict[str, MatrixError]:
    """The experts of a leaf together."""
    found: dict[str, MatrixError] = {}
    for chunk, error in errors.items():
        found[chunk.leaf] = found.get(chunk.leaf, MatrixError()) + error
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(leaf: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", leaf)]


def lines(errors: Mapping[str, MatrixError]) -> Iterator[str]:
    """A table: each weight, its relative error, and that of its worst group."""
    width = max((len(leaf) for leaf in errors), default=0)
    yield f"{'weight':<{width}}  relative error  worst group"
    for leaf, error in errors.items():
        yield f"{leaf:<{width}}  {error.relative:>14.5f}  {error.worst:>11.5f}"
