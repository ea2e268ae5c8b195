"""Grouped-query attention with RoPE and a causal or sliding-window mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.scaled_kv import KV
from mixtral_jax.model.cache import Window, write_kv
from mixtral_jax.model.placement import Placement, constrain_kv
from mixtral_jax.model.rope import Rotation, rotate
from mixtral_jax.weights import weight


class LayerKV(NamedTuple):
    """Keys and values of one layer's cache."""

    keys: KV
    values: KV


class Attention(nnx.Module):
    """Projections ``[out, in]`` as published, heads flattened with their channels."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, dtype: Any):
        D, C = config.hidden_size, config.head_dim
        HC, KC = config.num_attention_heads * C, config.num_key_value_heads * C
        self.head_dim, std = C, config.initializer_range
        self.sliding_window = config.sliding_window
        k = jax.random.split(key, 4)
        self.q_proj = weight(k[0], (HC, D), ("heads", "embed"), dtype=dtype, std=std)
        self.k_proj = weight(k[1], (KC, D), ("kv_heads", "embed"), dtype=dtype, std=std)
        self.v_proj = weight(k[2], (KC, D), ("kv_heads", "embed"), dtype=dtype, std=std)
        self.o_proj = weight(k[3], (D, HC), ("embed", "heads"), dtype=dtype, std=std)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        by: Rotation,
        window: Window,
        cache: LayerKV | None,
        placement: Placement,
    ) -> tuple[Float[Array, "B T D"], LayerKV | None]:
        """Attends to the cache with these tokens written in, or, without one, to the tokens.

        Args:
            x: normalised residual stream.
            by: rotations of the tokens' positions.
            window: where the tokens stand and what they may attend to.
            cache: this layer's keys and values, or None to attend within ``x``.
            placement: where it runs.

        Returns:
            The layer's output and the cache with the tokens' keys and values.
        """
        out, cache = self.mix(x, by=by, window=window, cache=cache, placement=placement)
        return placement.contract("BTO,DO->BTD", out, self.o_proj[...]), cache

    def mix(
        self,
        x: Float[Array, "B T D"],
        *,
        by: Rotation,
        window: Window,
        cache: LayerKV | None,
        placement: Placement,
    ) -> tuple[Float[Array, "B T O"], LayerKV | None]:
        """What the last projection reads: the heads' values, mixed and joined. As ``__call__``."""

        def heads(w: nnx.Param, name: str) -> jax.Array:
            flat = placement.contract("BTD,OD->BTO", x, w[...])
            split = flat.reshape(*flat.shape[:-1], -1, self.head_dim)
            return placement.constrain(split, ("batch", "length", name, "channels"))

        q = rotate(heads(self.q_proj, "heads"), by)
        k = rotate(heads(self.k_proj, "kv_heads"), by).swapaxes(1, 2)
        v = heads(self.v_proj, "kv_heads").swapaxes(1, 2)
        if cache is not None:
            k = constrain_kv(write_kv(cache.keys, k, window.slots), placement)
            v = constrain_kv(write_kv(cache.values, v, window.slots), placement)
            cache = LayerKV(k, v)
        out = placement.attention(
            q, k, v, window.positions, window.key_positions, window=self.sliding_window
        )
        return out.reshape(*out.shape[:2], -1), cache
