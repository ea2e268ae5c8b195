"""The expert feed-forward, for blocks of rows and for rows that chose their experts.

out = down(silu(gate(x)) * up(x)), as MixtralExperts of transformers (w2(silu(w1 x) * w3 x)).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.contract import Product, contract, rows_first
from mixtral_jax.weights import (
    Matrix,
    Weight,
    expert_matrices,
    expert_matrix,
    from_expert_matrices,
)

# Branches of `visit_experts` between no rows and all rows. A branch computes all of its rows,
# taken or not, so large blocks have many; small ones are bound by reading weights.
ONE_RUNG = 1.5  # in rows of a balanced expert, where that is less than LEAST_STEPPED
LEAST_STEPPED = 16
RUNGS = (0.5, 0.75, 0.875, 1.0, 1.125, 1.25, 1.5, 2.0)  # likewise, from there on
RUNG_ROWS = 8  # a multiple that matrix libraries like

# Up to so many rows the experts' outputs are summed at the end, so that experts may run side by
# side; beyond, one after another, so that no more than one output is held.
SIDE_BY_SIDE_ROWS = 64
_LEFT_OUT = (0,)  # the shape of what stands where a leaf is kept elsewhere


class ExpertWeights(NamedTuple):
    """One layer's experts: gate and up ``[E, F, D]``, down ``[E, D, F]``, of any weight kind."""

    gate: Weight
    up: Weight
    down: Weight


def feed_forward(
    x: Float[Array, "N D"], gate: Matrix, up: Matrix, down: Matrix, *, product: Product = rows_first
) -> Float[Array, "N D"]:
    """One expert applied to every row; f32."""
    hidden = gated(x, gate, up, product=product)
    return contract("NF,DF->ND", hidden, down, dtype=jnp.float32, product=product)


def gated(
    x: Float[Array, "N D"], gate: Matrix, up: Matrix, *, product: Product = rows_first
) -> Float[Array, "N F"]:
    """What ``down`` reads: silu(gate(x)) * up(x), computed in f32, in the dtype of ``x``."""
    f32 = functools.partial(contract, dtype=jnp.float32, product=product)
    hidden = jax.nn.silu(f32("ND,FD->NF", x, gate)) * f32("ND,FD->NF", x, up)
    return hidden.astype(x.dtype)


def _matrices(experts: ExpertWeights) -> list[tuple[Matrix, Matrix, Matrix]]:
    return list(zip(*map(expert_matrices, experts), strict=True))


def expert_blocks(
    x: Float[Array, "E N D"], experts: ExpertWeights, *, product: Product = rows_first
) -> Float[Array, "E N D"]:
    """Block e through expert e; f32. Shapes are static: an empty row costs as much as another."""
    outs = [
        feed_forward(x[e], *expert, product=product) for e, expert in enumerate(_matrices(experts))
    ]
    return jnp.stack(outs)


def dense_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    expected: float,
) -> Float[Array, "N D"]:
    """The reference of ``visit_experts``: every expert on every row, weighted by the routing."""
    del expected
    for e, expert in enumerate(_matrices(experts)):
        chosen = (expert_ids == e) & valid[:, None]
        share = jnp.where(chosen, expert_weights, 0.0).sum(axis=-1)
        out = out + share[:, None] * feed_forward(x, *expert)
    return out


def ladder(num_rows: int, expected: float) -> tuple[int, ...]:
    """Rows that the branches of ``visit_experts`` hold, ascending; the last holds all."""
    if expected >= num_rows:  # every row chooses every expert
        return (num_rows,)
    rungs = RUNGS if expected >= LEAST_STEPPED else (ONE_RUNG,)
    sizes = {min(num_rows, RUNG_ROWS * math.ceil(rung * expected / RUNG_ROWS)) for rung in rungs}
    return tuple(sorted(sizes | {num_rows}))


def visit_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    expected: float,
    product: Product = rows_first,
) -> Float[Array, "N D"]:
    """Adds each expert's share to the rows that chose it; experts that no row chose are not read.

    No shape depends on the routing: each expert runs one of a few compiled branches, for none of
    the rows, for as many as a rung of ``ladder`` or for all, so nothing is ever dropped. It can be
    differentiated in reverse mode only.

    Args:
        out: f32 accumulator, returned with the shares added.
        x: rows.
        expert_ids: chosen experts, counted from the first of ``experts``; others are ignored.
        expert_weights: f32 routing weights.
        valid: false for padding, which visits no expert.
        experts: the experts held here.
        expected: rows of an expert if all are chosen equally often.
        product: what multiplies rows with a matrix.

    Returns:
        The accumulator, f32.
    """
    sizes = ladder(x.shape[0], expected)
    chosen = (expert_ids[..., None] == jnp.arange(experts.gate.shape[0])) & valid[:, None, None]
    shares = jnp.where(chosen, expert_weights[..., None], 0.0).sum(axis=1)  # [N, E]
    is_chosen = chosen.any(axis=1)
    branch = (is_chosen.sum(axis=0)[:, None] > jnp.asarray((0, *sizes[:-1]))).sum(axis=1)
    # Rows that chose an expert first. Sorted once, not in every branch: sorts compile slowly.
    orders = jnp.argsort(~is_chosen, axis=0, stable=True) if len(sizes) > 1 else is_chosen
    return _visit_differentiably(sizes, product, out, x, shares, orders, branch, experts)


def _visit_all(
    sizes: tuple[int, ...],
    product: Product,
    out: jax.Array,
    x: jax.Array,
    shares: jax.Array,
    orders: jax.Array,
    branch: jax.Array,
    experts: ExpertWeights,
) -> jax.Array:
    """Expert e runs ``branch[e]``: none, or the first of ``orders[:, e]`` up to a rung."""
    num_rows = x.shape[0]
    run = functools.partial(feed_forward, product=product)

    def none(start: jax.Array, share: jax.Array, order: jax.Array) -> jax.Array:
        del share, order
        return start

    def visit(size: int, e: int, start: jax.Array, share: jax.Array, order: jax.Array) -> jax.Array:
        # Taken here: out of a stack it is a copy, which only a branch that runs should make.
        expert = [expert_matrix(w, e) for w in experts]
        take, add = _rung(order, size)
        return add(start, take(share)[:, None] * run(take(x), *expert))

    parts = []
    for e in range(shares.shape[1]):
        visits = [functools.partial(visit, size, e) for size in sizes]
        operands = shares[:, e], orders[:, e]
        if num_rows > SIDE_BY_SIDE_ROWS:
            out = jax.lax.switch(branch[e], [none, *visits], out, *operands)
        else:
            parts.append(jax.lax.switch(branch[e], [none, *visits], jnp.zeros_like(out), *operands))
    for part in parts:
        out = out + part
    return out


def _rung(order: jax.Array, size: int) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """How the rows of a branch are taken out of all rows, and added back to them."""
    if size == order.shape[0]:
        return lambda whole: whole, jnp.add
    rows = order[:size]
    return lambda whole: whole[rows], lambda into, part: into.at[rows].add(
        part, unique_indices=True
    )


def _forward(sizes: tuple[int, ...], product: Product, *primals: Any) -> tuple[Any, Any]:
    """Keeps what came in, and nothing that a branch made: experts' leaves as two trees, those that
    are trained and the others, each with an empty array for the other's.

    Not None, which is no leaf: a trace of one shape serves all that is asked for at that shape, and
    JAX reads what it kept as the tree of whoever asked last.
    """

    def leaves(keep: Callable[[Any], Any], tree: Any) -> Any:
        return jax.tree.map(keep, tree, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))

    operands = leaves(lambda leaf: leaf.value, primals)
    left_out = jnp.zeros(_LEFT_OUT)
    trained = leaves(lambda leaf: leaf.value if leaf.perturbed else left_out, primals[-1])
    frozen = leaves(lambda leaf: left_out if leaf.perturbed else leaf.value, primals[-1])
    return _visit_all(sizes, product, *operands), (*operands[1:-1], trained, frozen)


def _backward(sizes: tuple[int, ...], product: Product, kept: Any, ct: Any) -> tuple:
    """The branches that ran, run again for their gradients: left to JAX, each branch would keep
    what its gradient needs, and fill with zeros what the gradients of all others need."""
    x, shares, orders, branch, *both = kept
    trained, frozen = jax.tree.map(lambda leaf: None if leaf.shape == _LEFT_OUT else leaf, both)
    ct = jnp.zeros(x.shape, jnp.float32) if isinstance(ct, SymbolicZero) else ct

    def none(e: int, dx: jax.Array, share: jax.Array, order: jax.Array) -> tuple:
        del order
        moving = [expert_matrix(w, e) for w in trained]
        return dx, jnp.zeros_like(share), jax.tree.map(jnp.zeros_like, moving)

    def back(size: int, e: int, dx: jax.Array, share: jax.Array, order: jax.Array) -> tuple:
        moving, still = ([expert_matrix(w, e) for w in tree] for tree in (trained, frozen))
        take, add = _rung(order, size)

        def part(x: jax.Array, share: jax.Array, moving: Any) -> jax.Array:
            expert = jax.tree.map(
                lambda a, b: b if a is None else a, moving, still, is_leaf=lambda leaf: leaf is None
            )
            return share[:, None] * feed_forward(x, *expert, product=product)

        dx_rows, dshare, dmoving = jax.vjp(part, take(x), take(share), moving)[1](take(ct))
        dx = add(dx, dx_rows.astype(dx.dtype))
        return dx, add(jnp.zeros_like(share), dshare), dmoving

    dx, dshares, dexperts = jnp.zeros_like(ct), [], []
    for e in range(shares.shape[1]):
        backs = [functools.partial(back, size, e) for size in sizes]
        dx, dshare, dmoving = jax.lax.switch(
            branch[e], [functools.partial(none, e), *backs], dx, shares[:, e], orders[:, e]
        )
        dshares.append(dshare)
        dexperts.append(dmoving)
    gradients = (
        from_expert_matrices(w, parts) for w, *parts in zip(trained, *dexperts, strict=True)
    )
    dx = dx.astype(x.dtype)
    return ct, dx, jnp.stack(dshares, axis=1), None, None, ExpertWeights(*gradients)


_visited = jax.custom_vjp(_visit_all, nondiff_argnums=(0, 1))
_visited.defvjp(_forward, _backward, symbolic_zeros=True)
# Compiled as one even where shard_map runs eagerly, which knows no symbolic zeros.
_visit_differentiably = jax.jit(_visited, static_argnums=(0, 1), inline=True)
