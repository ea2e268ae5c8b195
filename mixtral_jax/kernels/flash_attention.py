"""Attention on a GPU: one Pallas (Triton) kernel over blocks of keys, for prefill and for decode.

Flash attention (Dao 2023) with positions in place of a mask, so that a ring cache needs nothing
special. The query heads of a key/value head are rows of one tile (a decode step reads its keys
once, not G times), keys are split over programs where rows alone would leave most of the GPU idle
(flash decoding), and keys that no query of the tile sees are not read.

Tiles, none of them tuned on a GPU yet: 16 to ``BLOCK_ROWS`` rows, ``BLOCK_KEYS`` keys (half as many
of 4 bytes), all channels; split until there are about ``PROGRAMS`` programs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.attention import EMPTY, blocked_attention

BLOCK_ROWS, BLOCK_KEYS = 64, 64
PROGRAMS = 256
PARAMS = plgpu.CompilerParams(num_warps=4, num_stages=2)


class _Tiles(NamedTuple):
    """What is static: rows, keys and channels of a tile; blocks of keys in a split; the window."""

    rows: int
    keys: int
    channels: int
    blocks: int
    window: int | None


def _kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, at_ref: Any, keys_ref: Any, *outs: Any, tiles: _Tiles
) -> None:
    """q ``[B, K, R, C]``, k and v ``[B, K, S, C]``, positions ``[B, R]`` and ``[B, S]``.

    Gives of each split the values weighted by shares, the maximum and the sum of its softmax.
    """
    mixed_ref, most_ref, total_ref = outs
    num_heads, num_rows, num_channels = q_ref.shape[1:]
    num_keys = k_ref.shape[2]
    b, head = pl.program_id(1) // num_heads, pl.program_id(1) % num_heads
    split, first_row = pl.program_id(2), pl.program_id(0) * tiles.rows
    rows, channels = pl.ds(first_row, tiles.rows), pl.ds(0, tiles.channels)
    is_row = first_row + jnp.arange(tiles.rows) < num_rows
    is_channel = (jnp.arange(tiles.channels) < num_channels)[None, :]
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    row_mask = is_row[:, None] & is_channel
    q = plgpu.load(q_ref.at[b, head, rows, channels], mask=row_mask, other=0)
    at = plgpu.load(at_ref.at[b, rows], mask=is_row, other=EMPTY)  # no key is so early

    def see(i: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        first = (split * tiles.blocks + i) * tiles.keys
        block = pl.ds(first, tiles.keys)
        is_key = first + jnp.arange(tiles.keys) < num_keys
        keys = plgpu.load(keys_ref.at[b, block], mask=is_key, other=EMPTY)
        distance = at[:, None] - keys[None, :]
        sees = (distance >= 0) & (keys != EMPTY)[None, :]
        if tiles.window is not None:
            sees &= distance < tiles.window

        def add(so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            mixed, most, total = so_far
            mask = is_key[:, None] & is_channel
            k = plgpu.load(k_ref.at[b, head, block, channels], mask=mask, other=0)
            v = plgpu.load(v_ref.at[b, head, block, channels], mask=mask, other=0)
            scores = plgpu.dot(q, k, trans_b=True, precision=precision) * num_channels**-0.5
            scores = jnp.where(sees, scores, jnp.finfo(jnp.float32).min)
            new = jnp.maximum(most, scores.max(axis=1))
            shares = jnp.where(sees, jnp.exp(scores - new[:, None]), 0.0)
            keep = jnp.exp(most - new)
            mixed = mixed * keep[:, None]
            mixed += plgpu.dot(shares.astype(v.dtype), v, precision=precision)
            return mixed, new, total * keep + shares.sum(axis=1)

        is_seen = jnp.max(sees.astype(jnp.int32)) > 0
        return jax.lax.cond(is_seen, add, lambda so_far: so_far, so_far)

    start = (
        jnp.zeros((tiles.rows, tiles.channels), jnp.float32),
        jnp.full((tiles.rows,), jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros((tiles.rows,), jnp.float32),
    )
    mixed, most, total = jax.lax.fori_loop(0, tiles.blocks, see, start)
    plgpu.store(mixed_ref.at[split, b, head, rows, channels], mixed, mask=row_mask)
    plgpu.store(most_ref.at[split, b, head, rows], most, mask=is_row)
    plgpu.store(total_ref.at[split, b, head, rows], total, mask=is_row)


def _tiles(num_rows: int, num_keys: int, programs: int, q: Any, window: int | None) -> _Tiles:
    """``programs`` is how many there are for each tile of rows and split of keys."""
    rows = min(max(pl.next_power_of_2(num_rows), 16), BLOCK_ROWS)
    keys = BLOCK_KEYS // 2 if q.dtype == jnp.float32 else BLOCK_KEYS
    blocks = pl.cdiv(num_keys, keys)
    splits = min(max(PROGRAMS // (programs * pl.cdiv(num_rows, rows)), 1), blocks)
    channels = max(pl.next_power_of_2(q.shape[-1]), 16)
    return _Tiles(rows, keys, channels, pl.cdiv(blocks, splits), window)


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    B, T, H, C = q.shape
    K, S = k.shape[1:3]
    G = H // K
    R = T * G
    tiles = _tiles(R, S, B * K, q, window)
    splits = pl.cdiv(pl.cdiv(S, tiles.keys), tiles.blocks)
    rows = q.reshape(B, T, K, G, C).transpose(0, 2, 1, 3, 4).reshape(B, K, R, C)

    def shapes(rows: jax.Array) -> tuple[jax.Array, ...]:
        mixed = jnp.broadcast_to(rows, (splits, *rows.shape)).astype(jnp.float32)
        return mixed, mixed[..., 0], mixed[..., 0]

    mixed, most, total = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles),
        grid=(pl.cdiv(R, tiles.rows), B * K, splits),
        out_shape=jax.eval_shape(shapes, rows),  # varying over the mesh axes that q varies over
        compiler_params=PARAMS,
        interpret=interpret,
        name="flash_attention",
    )(rows, k, v, jnp.repeat(queries, G, axis=1), keys)
    keep = jnp.exp(most - most.max(axis=0))
    total = jnp.maximum((total * keep).sum(axis=0), jnp.finfo(jnp.float32).tiny)
    out = ((mixed * keep[..., None]).sum(axis=0) / total[..., None]).astype(q.dtype)
    return out.reshape(B, K, T, G, C).transpose(0, 2, 1, 3, 4).reshape(B, T, H, C)


_differentiable = jax.custom_vjp(_attend, nondiff_argnums=(5, 6))


def _forward(*operands: Any):
    return _attend(*operands), operands[:5]


def _backward(window: int | None, interpret: bool, kept: tuple[jax.Array, ...], ct: jax.Array):
    """That of ``blocked_attention``, from the operands."""
    del interpret
    q, k, v, queries, keys = kept

    def again(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return blocked_attention(q, k, v, queries, keys, window=window)

    return *jax.vjp(again, q, k, v)[1](ct), None, None


_differentiable.defvjp(_forward, _backward)


def flash_attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B K S C"],
    v: Float[Array, "B K S C"],
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"],
    *,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """``kernels.attention.attention`` without holding scores; arguments as there.

    A query that sees nothing gets zeros. ``interpret`` runs the kernel on any platform, slowly; JAX
    cannot do that inside a shard_map with its replication check on.
    """
    return _differentiable(q, k, v, queries, keys, window, interpret)
