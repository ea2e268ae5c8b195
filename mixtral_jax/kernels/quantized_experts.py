"""Routed experts in packed codes on a GPU: ``decode_experts`` that widens codes in registers.

The same blocks of sorted rows, one expert to a block. A program reads a tile of codes and the
scales of its groups where they lie, widens it to the rows' dtype as ``QTensor.dequantize`` would,
and multiplies; no weight is ever made in memory. Where a byte holds several inputs, the rows come
apart into one array for each place in a byte, and a tile of bytes is as many products.

Tiles, not tuned on a GPU: ``BLOCK_OUT`` outputs, ``BLOCK_CODES`` elements of codes at a time.
Blocks hold up to 64 rows in decode and 128 in prefill, where each block reads its expert again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.decode_experts import BLOCK_OUT, LEAST_ROWS, MOST_ROWS, PARAMS, store
from mixtral_jax.kernels.experts import ExpertWeights, expert_blocks, visit_experts
from mixtral_jax.kernels.grouped_experts import Schedule, apply_schedule
from mixtral_jax.kernels.widen import code_values, split_inputs
from mixtral_jax.qtensor import NESTED_BLOCK, SCHEMES, Nested, QTensor, dynamic_map

BLOCK_CODES = 64
MOST_PREFILL_ROWS = 128


def block_rows(num_rows: int) -> int:
    """Rows of a block: all rows of a decode step, up to ``MOST_ROWS``; more of a prompt's."""
    most = MOST_ROWS if num_rows <= 8 * MOST_ROWS else MOST_PREFILL_ROWS
    return min(max(pl.next_power_of_2(num_rows), LEAST_ROWS), most)


def _scales(w: QTensor, table: Any, expert: jax.Array, at: tuple, shape: tuple, mask: Any) -> Any:
    """Scales by indices (output, group), f32; ``w`` has references in place of arrays."""

    def read(ref: Any, *index: Any) -> jax.Array:
        index = tuple(jnp.broadcast_to(i, shape) for i in index)
        return plgpu.load(ref.at[index], mask=mask, other=0)

    if not isinstance(w.scales, Nested):
        return read(w.scales, expert, *at).astype(jnp.float32)
    nested = w.scales
    codes = read(nested.codes, expert, *at).astype(jnp.int32)
    block = (at[0] * nested.codes.shape[-1] + at[1]) // NESTED_BLOCK
    factor = read(nested.absmax, expert, block)
    return read(table, codes) * factor + read(nested.offset, expert)


def _product(
    x_refs: tuple, w: QTensor, table: Any, block: jax.Array, expert: jax.Array, out: jax.Array
) -> jax.Array:
    """One block's rows times rows ``out`` .. of its expert's matrix; f32 [R, tile]."""
    rows, (outs, size) = x_refs[0].shape[1], w.codes.shape[1:]
    groups = w.scales.shape[-1]
    step = min(BLOCK_CODES, max(16, pl.next_power_of_2(size)))
    shape = (BLOCK_OUT, step)
    o = out + jnp.arange(BLOCK_OUT, dtype=jnp.int32)
    is_whole = size % step == 0 and outs % BLOCK_OUT == 0
    dtype = x_refs[0].dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        b = i * step + jnp.arange(step, dtype=jnp.int32)
        at = pl.ds(i * step, step)
        mask = None if is_whole else (o < outs)[:, None] & (b < size)[None, :]
        other = None if is_whole else 0
        codes = plgpu.load(w.codes.at[expert, pl.ds(out, BLOCK_OUT), at], mask=mask, other=other)
        place = o[:, None], (b // (size // groups))[None, :]
        zero: Any = SCHEMES[w.scheme].zero
        safe = jnp.full(shape, True) if mask is None else mask
        if w.zeros is not None:
            where = tuple(jnp.broadcast_to(n, shape) for n in (expert, *place))
            zero = plgpu.load(w.zeros.at[where], mask=safe, other=0).astype(jnp.float32)
        if codes.dtype == jnp.uint8:
            codes = codes.astype(jnp.int32)
        values = code_values(w.scheme, codes, zero)
        if groups > 1:
            scale = _scales(w, table, expert, place, shape, safe)
            values = [value * scale for value in values]
        x_mask = None if size % step == 0 else jnp.broadcast_to((b < size)[None, :], (rows, step))
        for x_ref, value in zip(x_refs, values, strict=True):
            x = plgpu.load(x_ref.at[block, :, at], mask=x_mask, other=None if x_mask is None else 0)
            tile = value.astype(w.dtype).astype(dtype)
            total = total + plgpu.dot(x, tile, trans_b=True, precision=precision)
        return total

    zeros = jnp.zeros((rows, BLOCK_OUT), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(size, step), add, zeros)
    if groups == 1:  # after the sums: one factor for each output
        scale = _scales(w, table, expert, (o, jnp.zeros_like(o)), o.shape, o < outs)
        total = total * scale[None, :]
    return total


def _kernel(*refs: Any, tree: Any) -> None:
    """``[blocks, R, I]`` times one matrix, or two with SiLU between, to ``[blocks, R, O]``."""
    *in_refs, out_ref = refs
    experts, table, xs, ws = jax.tree.unflatten(tree, in_refs)
    block, out = pl.program_id(0), pl.program_id(1) * BLOCK_OUT
    expert = experts[block]

    @pl.when(expert < ws[0].codes.shape[0])
    def _():
        products = (_product(x, w, table, block, expert, out) for x, w in zip(xs, ws, strict=True))
        store(products, out_ref, block, out)


def _inputs(x: jax.Array, w: QTensor, block_expert: jax.Array) -> tuple[jax.Array, ...]:
    """Blocks of rows as a matrix's codes want them: in its order, one array per place in a byte."""
    if w.order is not None:
        order = w.order.at[block_expert].get(mode="clip")
        x = jnp.take_along_axis(x, order[:, None, :], axis=-1)
    return tuple(split_inputs(x, w))


def _multiply(
    block_expert: jax.Array, x: jax.Array, ws: tuple[QTensor, ...], *, dtype: Any, interpret: bool
) -> jax.Array:
    blocks, rows, _ = x.shape
    num_outs = ws[0].shape[1]
    is_nested = any(isinstance(w.scales, Nested) for w in ws)
    table = jnp.asarray(dynamic_map()) if is_nested else None
    xs = tuple(_inputs(x, w, block_expert) for w in ws)
    ws = tuple(QTensor(w.codes, w.scales, w.scheme, w.dtype, zeros=w.zeros) for w in ws)
    operands, tree = jax.tree.flatten((block_expert, table, xs, ws))

    def like(x: jax.Array, ws: tuple[QTensor, ...]) -> jax.Array:
        x, _ = jax.lax.optimization_barrier((x, ws))  # varies over the mesh axes of all
        return jnp.broadcast_to(x[:, :, :1], (blocks, rows, num_outs)).astype(dtype)

    return pl.pallas_call(
        functools.partial(_kernel, tree=tree),
        grid=(blocks, pl.cdiv(num_outs, BLOCK_OUT)),
        out_shape=jax.eval_shape(like, x, ws),
        compiler_params=PARAMS,
        interpret=interpret,
        name="quantized_down" if len(ws) == 1 else "quantized_hidden",
    )(*operands)


def _feed_forward(
    x: jax.Array, block_expert: jax.Array, experts: Any, interpret: bool
) -> jax.Array:
    """Blocks ``[blocks, R, D]`` through their experts, f32."""
    gate, up, down = experts
    multiply = functools.partial(_multiply, block_expert, interpret=interpret)
    hidden = multiply(x, (gate, up), dtype=x.dtype)
    return multiply(hidden, (down,), dtype=jnp.float32)


def _run(interpret: bool, *operands: Any) -> jax.Array:
    def feed_forward(rows: jax.Array, experts: ExpertWeights, plan: Schedule) -> jax.Array:
        x = rows.reshape(len(plan.block_expert), -1, rows.shape[-1])
        return _feed_forward(x, plan.block_expert, experts, interpret).reshape(rows.shape)

    num_rows = operands[1].shape[0]
    return apply_schedule(feed_forward, *operands, block_rows=block_rows(num_rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed(interpret: bool, *operands: Any) -> jax.Array:
    return _run(interpret, *operands)


def _forward(interpret: bool, *operands: Any) -> tuple[jax.Array, tuple]:
    return _run(interpret, *operands), operands


def _backward(interpret: bool, operands: tuple, ct: jax.Array) -> tuple:
    """That of the reference, expert by expert: one expert's weights are made at a time."""
    del interpret
    num_rows = operands[1].shape[0]
    return jax.vjp(functools.partial(visit_experts, expected=num_rows), *operands)[1](ct)


_routed.defvjp(_forward, _backward)


def quantized_experts(
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
    """``visit_experts`` on stacked QTensors in codes that ``is_widened`` accepts; see the module.

    ``interpret`` as in ``decode_experts``.
    """
    del expected
    return _routed(interpret, out, x, expert_ids, expert_weights, valid, experts)


def _run_blocks(interpret: bool, x: jax.Array, experts: ExpertWeights) -> jax.Array:
    num_experts, num_rows, _ = x.shape
    size = block_rows(num_rows)
    padded = jnp.pad(x, ((0, 0), (0, -num_rows % size), (0, 0)))
    blocks = padded.reshape(-1, size, x.shape[-1])
    each = len(blocks) // num_experts
    block_expert = jnp.arange(len(blocks), dtype=jnp.int32) // each
    return _feed_forward(blocks, block_expert, experts, interpret).reshape(padded.shape)[
        :, :num_rows
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(interpret: bool, x: jax.Array, experts: ExpertWeights) -> jax.Array:
    return _run_blocks(interpret, x, experts)


def _blocks_forward(interpret: bool, x: jax.Array, experts: ExpertWeights) -> tuple:
    return _run_blocks(interpret, x, experts), (x, experts)


def _blocks_backward(interpret: bool, kept: tuple, ct: jax.Array) -> tuple:
    del interpret
    return jax.vjp(expert_blocks, *kept)[1](ct)


_blocks.defvjp(_blocks_forward, _blocks_backward)


def quantized_blocks(
    x: Float[Array, "E N D"], experts: ExpertWeights, *, interpret: bool = False
) -> Float[Array, "E N D"]:
    """``expert_blocks`` on stacked QTensors, as ``quantized_experts``."""
    return _blocks(interpret, x, experts)
