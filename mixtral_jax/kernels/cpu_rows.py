"""One row times a quantized matrix on a CPU, its codes widened in registers: no weight is made.

XLA's compiler turns a sum of a few slices of the codes, each widened and multiplied, into one loop
of vector instructions over threads that reads every code once. What that rests on (docs/log.md):
no reduction in the loop (``lanes`` are summed by a product with ones after it), rows picked by an
array of indices (an index of its own would be read again in the loop, and end the vectors), and
nothing conditional around it, whose insides the compiler gives one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mixtral_jax.kernels.widen import code_values, split_inputs
from mixtral_jax.qtensor import SCHEMES, Nested, QTensor

MOST_TERMS = 14  # slices in a sum; with 16 the compiler no longer makes vectors of fp8's


class _View(NamedTuple):
    """The bytes of a row as ``terms`` runs of ``chunks`` groups; one group is cut into runs."""

    terms: int
    chunks: int


def _view(w: QTensor) -> _View:
    groups = w.scales.shape[-1]
    units = w.codes.shape[-1] if groups == 1 else groups
    terms = max(n for n in range(1, MOST_TERMS + 1) if units % n == 0)
    return _View(terms, 1 if groups == 1 else groups // terms)


class Picked(NamedTuple):
    """Rows of a matrix, with all but their codes taken out of its stack.

    ``rows`` counts over the stack of codes; None stands for all rows of a single matrix.
    """

    rows: Int[Array, " O"] | None
    scales: Float[Array, "O G"]
    zeros: Num[Array, "O G"] | None


def pick(w: QTensor, index: jax.Array, rows: Int[Array, " O"]) -> Picked:
    """Some rows of matrix ``index`` of a stack ``[E, O, I]``."""

    def of(part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(part, index, keepdims=False)

    if isinstance(w.scales, Nested):
        scales = jax.tree.map(of, w.scales).values()
    else:
        scales = of(w.scales).astype(jnp.float32)
    zeros = None if w.zeros is None else of(w.zeros)[rows]
    return Picked(index * w.shape[1] + rows, scales[rows], zeros)


def _take(codes: jax.Array, rows: jax.Array | None) -> jax.Array:
    """Rows ``[O, B]`` of a stack, by index over all of its matrices."""
    if rows is None:
        return codes
    flat = codes.reshape(-1, codes.shape[-1])
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.gather(flat, rows[:, None], numbers, (1, flat.shape[1]), mode=mode)


def row_product(x: Sequence[Float[Array, " B"]], w: QTensor, picked: Picked) -> Float[Array, " O"]:
    """One row times rows of a matrix.

    Args:
        x: the row in f32, as ``split_inputs`` gives it.
        w: the matrix or its stack, in codes that ``is_widened`` accepts; its order of inputs is
            not looked at.
        picked: which rows.

    Returns:
        The products; f32.
    """
    codes = w.codes
    if w.scheme == "fp8":  # the compiler has no fp8: it would be widened code by code
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    terms, chunks = _view(w)
    size = codes.shape[-1] // terms
    x = [part.reshape(terms, chunks, 1, -1) for part in x]
    one_group = w.scales.shape[-1] == 1

    def by_term(values: jax.Array) -> jax.Array:
        """``[O, G]`` as ``[terms, C, O, 1]``; a single group is every term's."""
        shape = (len(values), 1, 1) if one_group else (len(values), terms, chunks)
        spread = values.astype(jnp.float32).reshape(shape).transpose(1, 2, 0)[..., None]
        return jnp.broadcast_to(spread, (terms, *spread.shape[1:]))

    zeros = None if picked.zeros is None else by_term(picked.zeros)
    scales = by_term(picked.scales)
    lanes = jnp.zeros((), jnp.float32)
    for k in range(terms):
        zero = SCHEMES[w.scheme].zero if zeros is None else zeros[k]
        # Sliced, then picked: as one gather, used by so many terms, it would be made by itself.
        part = _take(jax.lax.slice_in_dim(codes, k * size, (k + 1) * size, axis=-1), picked.rows)
        values = code_values(w.scheme, part.reshape(len(part), chunks, -1).transpose(1, 0, 2), zero)
        term = sum(value * row[k] for value, row in zip(values, x, strict=True))
        lanes = lanes + (term if one_group else term * scales[k])
    # A barrier, else the sums are made with the library's reduction, which reads slices it copies.
    lanes = jax.lax.optimization_barrier(lanes)
    ones = jnp.ones(lanes.shape[-1], jnp.float32)
    sums = jnp.einsum("COL,L->CO", lanes, ones, precision=jax.lax.Precision.HIGHEST)
    total = sum(sums[1:], sums[0])
    return total * picked.scales[:, 0] if one_group else total


def rows_product(x: Float[Array, "N I"], w: QTensor) -> Float[Array, "N O"]:
    """Each row by ``row_product`` times one matrix ``[O, I]``, whose inputs are in order; f32."""
    picked = Picked(None, w.scale_values(), w.zeros)

    def one(row: jax.Array) -> jax.Array:
        return row_product(split_inputs(row.astype(jnp.float32), w), w, picked)

    return jax.vmap(one)(x)
