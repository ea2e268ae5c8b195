"""One layer's matrices on their way to few bits, or back from an earlier run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.convert.names import Chunk
from mixtral_jax.convert.parts import take_apart
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.qtensor import QTensor, pack
from mixtral_jax.quantize import qmoe
from mixtral_jax.quantize.errors import MatrixError, error_of
from mixtral_jax.quantize.gptq import Solved, output_error, round_to_nearest, solve
from mixtral_jax.quantize.gptq_recipe import SCALES, GptqRecipe
from mixtral_jax.quantize.gptq_report import OutputError
from mixtral_jax.quantize.qmoe import QmoeRecipe

Sum = Callable[[], jax.Array]
Calibrated = GptqRecipe | QmoeRecipe


@runtime_checkable
class Matrices(Protocol):
    """Gives each matrix of a layer as the quantized model will have it."""

    def matrix(self, chunk: Chunk, hessian: Sum) -> jax.Array:
        """The dequantized matrix, f32 ``[O, I]``.

        Args:
            chunk: which.
            hessian: computes 2 X X^T of its inputs ``[I, I]``; called where it is needed.
        """
        ...


class NewMatrices:
    """Quantizes matrices.

    Args:
        read: the float matrix of a chunk.
        recipe: how.
        heed: called before each matrix; may raise to end the work there.
        note: called with one line where a Hessian needed more damping than was asked for.

    Attributes:
        parts: what was made, by part and expert.
        errors: of each matrix against its source.
        outputs: of each weight.
    """

    def __init__(
        self,
        read: Callable[[Chunk], np.ndarray],
        recipe: Calibrated,
        heed: Callable[[], None],
        note: Callable[[str], None] = lambda line: None,
    ):
        self._read, self._recipe, self._heed, self._note = read, recipe, heed, note
        self.parts: dict[tuple[Chunk, str], np.ndarray] = {}
        self.errors: dict[Chunk, MatrixError] = {}
        self.outputs: dict[str, OutputError] = {}
        # gate and up of an expert, or q, k and v, read the same inputs.
        self._last: tuple[Sum, jax.Array] | None = None

    def matrix(self, chunk: Chunk, hessian: Sum) -> jax.Array:
        """See Matrices."""
        self._heed()
        if chunk.expert is None and isinstance(self._recipe, QmoeRecipe):  # attention stays
            return jnp.asarray(self._read(chunk).astype(np.float32))
        if self._last is None or self._last[0] is not hessian:
            self._last = None  # its memory, before more is asked for
            self._last = hessian, hessian()
        sums, recipe = self._last[1], self._recipe
        w = jnp.asarray(self._read(chunk).astype(np.float32))
        for damp in _damps(recipe.damp):
            q, nearest = _made(w, sums, dataclasses.replace(recipe, damp=damp))
            if np.isfinite(np.asarray(q.scales, np.float32)).all():
                break
        else:
            raise MixtralError(
                f"{_named(chunk)}: the Hessian of its inputs cannot be factored",
                fix="use another checkpoint: its activations overflow",
                code=BAD_DATA,
            )
        if damp != recipe.damp:
            self._note(f"{_named(chunk)}: its Hessian needed --damp {damp:g} to be factored")
        found = q.dequantize()
        self._measure(chunk, w, found, nearest, sums)
        self.errors[chunk] = _error(np.asarray(w), q)
        for name, part in take_apart(q).items():
            self.parts[chunk, name] = np.asarray(part)
        return found

    def _measure(
        self, chunk: Chunk, w: jax.Array, made: jax.Array, nearest: jax.Array, sums: jax.Array
    ) -> None:
        squares = (output_error(change, sums) for change in (w - made, w - nearest, w))
        error = OutputError(*map(float, squares))
        self.outputs[chunk.leaf] = self.outputs.get(chunk.leaf, OutputError()) + error


class OldMatrices:
    """Matrices that an earlier run has written.

    Args:
        weights: the quantized weights of the layer, by path.
        read: the float matrix of a chunk; of those that are not quantized.
    """

    def __init__(self, weights: dict[str, QTensor], read: Callable[[Chunk], np.ndarray]):
        self._weights, self._read = weights, read

    def matrix(self, chunk: Chunk, hessian: Sum) -> jax.Array:
        """See Matrices."""
        del hessian
        if chunk.leaf not in self._weights:
            return jnp.asarray(self._read(chunk).astype(np.float32))
        q: Any = self._weights[chunk.leaf]
        if chunk.expert is not None:
            q = jax.tree.map(lambda part: part[chunk.expert], q)
        return dataclasses.replace(q, dtype=jnp.dtype("float32")).dequantize()


def _damps(asked: float) -> Iterator[float]:
    """The damping that was asked for, then ever more of it."""
    yield asked
    for damp in (1e-6, 1e-4, 1e-2, 1.0, 10.0):
        if damp > asked:
            yield damp


def _made(w: jax.Array, sums: jax.Array, recipe: Calibrated) -> tuple[QTensor, jax.Array]:
    """A matrix in few bits, and what rounding to nearest would make of it."""
    if isinstance(recipe, QmoeRecipe):
        made = qmoe.solve_rows(w, sums, qmoe.room(w.shape[1]), recipe)
        return qmoe.tensor_of(made), qmoe.rounded_to_nearest(w)
    grid = {"bits": recipe.bits, "group": recipe.group, "symmetric": recipe.symmetric}
    grid["scale_dtype"] = SCALES
    damp = jnp.float32(recipe.damp)
    solved = solve(w, sums, act_order=recipe.act_order, damp=damp, **grid)
    return tensor_of(solved, recipe), round_to_nearest(w, **grid)


def tensor_of(solved: Solved, recipe: GptqRecipe) -> QTensor:
    """A solved matrix as numpy parts; it stands for f32."""
    codes, order = np.asarray(solved.codes), np.asarray(solved.order)
    if not recipe.keeps_order:
        codes = codes[:, np.argsort(order)]
    return QTensor(
        pack(recipe.scheme, codes),
        np.asarray(solved.scales).astype(jnp.dtype(SCALES)),
        recipe.scheme,
        jnp.dtype("float32"),
        zeros=None if recipe.symmetric else np.asarray(solved.zeros),
        order=order if recipe.keeps_order else None,
    )


def _error(w: np.ndarray, q: QTensor) -> MatrixError:
    """Of a matrix against its source, both with columns in the order of the groups."""
    if q.order is None:
        return error_of(w, q)
    return error_of(w[:, q.order], dataclasses.replace(q, order=None))


def _named(chunk: Chunk) -> str:
    return chunk.leaf if chunk.expert is None else f"{chunk.leaf}[{chunk.expert}]"
