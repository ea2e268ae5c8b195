"""Routed experts for few rows on a GPU: two Pallas (Triton) kernels over blocks of sorted rows.

Rows are sorted into blocks, one expert to a block (``grouped_experts.schedule``). A program reads
its block's expert id and then that expert's weights where they lie: none is gathered, an expert
that no row chose is not read, and with all rows of a step in one block each chosen expert is read
once. The first kernel makes ``silu(x gate^T) * (x up^T)`` of one tile of hidden channels, the
second multiplies by ``down^T``. Products accumulate in f32.

Tiles, none of them tuned on a GPU yet: ``BLOCK_OUT`` outputs, so that two experts of 8x7B make 896
programs (hidden) and 256 (down), and ``BLOCK_BYTES`` of each weight row at a time: with three
stages 60 KB of shared memory at 16 rows, 96 KB at 64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.grouped_experts import (
    Schedule,
    apply_schedule,
    grouped_feed_forward,
    stacks,
)

LEAST_ROWS, MOST_ROWS = 16, 64  # of a block; 16 is the least that a matrix unit takes
BLOCK_OUT = 32
BLOCK_BYTES = 256
PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=3)


def block_rows(num_rows: int) -> int:
    """Rows of a block: all rows of a decode step, up to ``MOST_ROWS``."""
    return min(max(pl.next_power_of_2(num_rows), LEAST_ROWS), MOST_ROWS)


def _products(
    x_ref: Any, w_refs: list[Any], block: jax.Array, expert: jax.Array, out: jax.Array
) -> list[jax.Array]:
    """One block's rows times rows ``out`` .. of several matrices of its expert; f32 [R, tile]."""
    rows, size = x_ref.shape[1:]
    num_outs = w_refs[0].shape[1]
    step = BLOCK_BYTES // x_ref.dtype.itemsize
    is_out = (out + jnp.arange(BLOCK_OUT) < num_outs)[:, None]
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def add(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        at = pl.ds(i * step, step)
        is_in = (i * step + jnp.arange(step) < size)[None, :]
        x_mask = jnp.broadcast_to(is_in, (rows, step)) if size % step else None
        x = plgpu.load(x_ref.at[block, :, at], mask=x_mask, other=None if x_mask is None else 0)
        is_whole = size % step == 0 and num_outs % BLOCK_OUT == 0
        mask, other = (None, None) if is_whole else (is_out & is_in, 0)
        ws = [
            plgpu.load(w_ref.at[expert, pl.ds(out, BLOCK_OUT), at], mask=mask, other=other)
            for w_ref in w_refs
        ]
        products = [plgpu.dot(x, w, trans_b=True, precision=precision) for w in ws]
        return [total + product for total, product in zip(sums, products, strict=True)]

    zeros = [jnp.zeros((rows, BLOCK_OUT), jnp.float32) for _ in w_refs]
    return jax.lax.fori_loop(0, pl.cdiv(size, step), add, zeros)


def store(products: Iterable[jax.Array], out_ref: Any, block: Any, out: Any) -> None:
    """Writes ``[R, BLOCK_OUT]``, one product or two with SiLU between, from column ``out`` on."""
    first, *others = products
    made = first if not others else first * jax.nn.sigmoid(first) * others[0]
    is_out = (out + jnp.arange(BLOCK_OUT) < out_ref.shape[2])[None, :]
    plgpu.store(
        out_ref.at[block, :, pl.ds(out, BLOCK_OUT)],
        made.astype(out_ref.dtype),
        mask=jnp.broadcast_to(is_out, made.shape),
    )


def _kernel(expert_ref: Any, x_ref: Any, *refs: Any) -> None:
    """``[blocks, R, I]`` times one matrix, or two with SiLU between, to ``[blocks, R, O]``."""
    *w_refs, out_ref = refs
    block, out = pl.program_id(0), pl.program_id(1) * BLOCK_OUT
    expert = expert_ref[block]

    @pl.when(expert < w_refs[0].shape[0])
    def _():
        store(_products(x_ref, w_refs, block, expert, out), out_ref, block, out)


def _multiply(
    block_expert: jax.Array, x: jax.Array, *ws: jax.Array, dtype: Any, interpret: bool
) -> jax.Array:
    blocks, rows, _ = x.shape
    num_outs = ws[0].shape[1]

    def like(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:, :, :1], (blocks, rows, num_outs)).astype(dtype)

    return pl.pallas_call(
        _kernel,
        grid=(blocks, pl.cdiv(num_outs, BLOCK_OUT)),
        out_shape=jax.eval_shape(like, x),  # varying over the mesh axes that x varies over
        compiler_params=PARAMS,
        interpret=interpret,
        name="experts_down" if len(ws) == 1 else "experts_hidden",
    )(block_expert, x, *ws)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _feed_forward(
    x: jax.Array, experts: ExpertWeights, plan: Schedule, interpret: bool
) -> jax.Array:
    """Slots ``[slots, D]`` through their blocks' experts, f32; unused blocks get anything."""
    blocks = plan.block_expert.shape[0]
    gate, up, down = stacks(experts)
    multiply = functools.partial(_multiply, plan.block_expert, interpret=interpret)
    hidden = multiply(x.reshape(blocks, -1, x.shape[-1]), gate, up, dtype=x.dtype)
    return multiply(hidden, down, dtype=jnp.float32).reshape(x.shape)


def _forward(x: jax.Array, experts: ExpertWeights, plan: Schedule, interpret: bool):
    return _feed_forward(x, experts, plan, interpret), (x, experts, plan)


def _backward(interpret: bool, kept: tuple[jax.Array, ExpertWeights, Schedule], ct: jax.Array):
    """By grouped products: each expert's blocks are one group, slots without a row are zeros."""
    del interpret
    x, experts, plan = kept
    sizes = plan.blocks_of_expert * (x.shape[0] // plan.block_expert.shape[0])
    _, transpose = jax.vjp(functools.partial(grouped_feed_forward, sizes=sizes), x, experts)
    return *transpose(ct), None


_feed_forward.defvjp(_forward, _backward)


def decode_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    expected: float,
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """``visit_experts`` on stacked arrays, for few rows; see the module.

    ``interpret`` runs the kernels on any platform, slowly; JAX cannot do that inside a shard_map
    with its replication check on.
    """
    del expected

    def feed_forward(rows: jax.Array, experts: ExpertWeights, plan: Schedule) -> jax.Array:
        return _feed_forward(rows, experts, plan, interpret)

    routed = functools.partial(apply_schedule, feed_forward, block_rows=block_rows(x.shape[0]))
    return routed(out, x, expert_ids, expert_weights, valid, experts)
