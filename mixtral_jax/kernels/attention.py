"""Grouped-query attention over absolute positions; no mask is an input, none is held whole."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.scaled_kv import KV, ScaledKV

EMPTY = -1  # the position of a cache slot that holds nothing

# `blocked_attention` holds scores of at most so many bytes at a time, and of a ScaledKV as many
# codes as take so many bytes where a product widens them.
SCORE_BYTES = 32 * 2**20
WIDENED_BYTES = 2**20


def attends(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"], window: int | None
) -> Bool[Array, "B T S"]:
    """Causal mask from absolute positions; a window of W sees itself and W - 1 tokens before."""
    distance = queries[:, :, None] - keys[:, None, :]
    mask = (distance >= 0) & (keys[:, None, :] != EMPTY)
    return mask if window is None else mask & (distance < window)


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    # HIGHEST: f32 means f32 (a GPU would round the operands to TF32).
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _scores(
    q: Float[Array, "B K G T C"], k: KV, mask: Bool[Array, "B T S"]
) -> Float[Array, "B K G T S"]:
    """Scaled scores in f32, the least number where the mask is false."""
    scale: jax.Array | float = q.shape[-1] ** -0.5
    if isinstance(k, ScaledKV):
        scale *= _by_head(k.scales)
        k = k.widened(q.dtype)
    scores = jnp.einsum(
        "BKGTC,BKSC->BKGTS", q, k, precision=_precision(q), preferred_element_type=jnp.float32
    )
    scores = scores * scale
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _by_head(scales: Float[Array, "B K S"]) -> Float[Array, "B K 1 1 S"]:
    return scales[:, :, None, None]


def _grouped(q: Float[Array, "B T H C"], num_kv_heads: int) -> Float[Array, "B K G T C"]:
    B, T, _, C = q.shape
    return q.reshape(B, T, num_kv_heads, -1, C).transpose(0, 2, 3, 1, 4)


def _ungrouped(out: Float[Array, "B K G T C"], dtype: jnp.dtype) -> Float[Array, "B T H C"]:
    B, _, _, T, C = out.shape
    return out.astype(dtype).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, C)


def _mix(shares: Float[Array, "B K G T S"], v: KV, dtype: jnp.dtype) -> Float[Array, "B K G T C"]:
    """Values weighted by shares, f32; ``dtype`` is that of the activations."""
    if isinstance(v, ScaledKV):
        shares = shares * _by_head(v.scales)
        # A share of a scale is too small a number for float16.
        v = v.widened(jnp.float32 if dtype == jnp.float16 else dtype)
    else:
        shares = shares.astype(dtype)  # also where a cache of such numbers is held in f32
    return jnp.einsum(
        "BKGTS,BKSC->BKGTC",
        shares.astype(v.dtype),
        v,
        precision=_precision(v),
        preferred_element_type=jnp.float32,
    )


def attention(
    q: Float[Array, "B T H C"],
    k: KV,
    v: KV,
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"],
    *,
    window: int | None,
) -> Float[Array, "B T H C"]:
    """Softmax attention, scores and softmax in f32; the reference of every faster path.

    Query heads ``g = 0 .. G - 1`` of key/value head k are ``k * G + g``, as in transformers'
    ``repeat_kv``. A query that sees nothing gets some finite value.

    Args:
        q: queries, rotated.
        k: keys, rotated, ``[B, K, S, C]``: every head's keys lie together, as products want them.
        v: values; like keys, an array or a ScaledKV.
        queries: absolute position of each query.
        keys: absolute position of each key; EMPTY is seen by nobody.
        window: the sliding window in tokens, or None.
    """
    scores = _scores(_grouped(q, k.shape[1]), k, attends(queries, keys, window))
    return _ungrouped(_mix(jax.nn.softmax(scores, axis=-1), v, q.dtype), q.dtype)


class _Running(NamedTuple):
    """Softmax over the keys seen so far: its maximum, its sum, and the values weighted by it."""

    most: Float[Array, "B K G T"]
    total: Float[Array, "B K G T"]
    mixed: Float[Array, "B K G T C"]


def blocked_attention(
    q: Float[Array, "B T H C"],
    k: KV,
    v: KV,
    queries: Int[Array, "B T"],
    keys: Int[Array, "B S"],
    *,
    window: int | None,
) -> Float[Array, "B T H C"]:
    """``attention`` over blocks of keys, with a running softmax (Milakov & Gimelshein 2018).

    Never holds more than about ``SCORE_BYTES`` of scores, nor widens more than ``WIDENED_BYTES`` of
    codes, and leaves out blocks that no query sees: a half-empty cache costs half. A gradient keeps
    no scores either. Small products take the plain path.
    """
    B, T, H, C = q.shape
    K, S = k.shape[1:3]
    size = SCORE_BYTES // (4 * B * H * T)
    if isinstance(k, ScaledKV):
        size = min(size, WIDENED_BYTES // (4 * B * K * C))
    size = max(128, size // 128 * 128)
    if size >= S:
        return attention(q, k, v, queries, keys, window=window)
    grouped = _grouped(q, K)

    def see(start: jax.Array | int, size: int, so_far: _Running | None) -> _Running:
        block_k, block_v = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=2), (k, v)
        )
        block_keys = jax.lax.dynamic_slice_in_dim(keys, start, size, axis=1)
        mask = attends(queries, block_keys, window)

        def add(so_far: _Running | None) -> _Running:
            scores = _scores(grouped, block_k, mask)
            most = scores.max(axis=-1)
            most = most if so_far is None else jnp.maximum(so_far.most, most)
            shares = jnp.where(mask[:, None, None], jnp.exp(scores - most[..., None]), 0.0)
            total, mixed = shares.sum(axis=-1), _mix(shares, block_v, q.dtype)
            if so_far is not None:
                keep = jnp.exp(so_far.most - most)
                total += so_far.total * keep
                mixed += so_far.mixed * keep[..., None]
            return _Running(most, total, mixed)

        if so_far is None:
            return add(None)
        return jax.lax.cond(mask.any(), add, lambda so_far: so_far, so_far)

    # Where gradients need them, the scores of a block are computed again, not kept.
    again = jax.checkpoint(see, static_argnums=1)
    in_loop = jax.checkpoint(see, static_argnums=1, prevent_cse=False)
    so_far = again(0, size, None)
    so_far, _ = jax.lax.scan(
        lambda so_far, i: (in_loop(i * size, size, so_far), None), so_far, jnp.arange(1, S // size)
    )
    if S % size:
        so_far = again(S - S % size, S % size, so_far)
    total = jnp.maximum(so_far.total, jnp.finfo(jnp.float32).tiny)
    return _ungrouped(so_far.mixed / total[..., None], q.dtype)
