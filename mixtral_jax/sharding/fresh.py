"""Weights to begin training with, drawn where they lie: no host ever holds the model."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.sharding.place import DEFAULT, weight_shardings
from mixtral_jax.sharding.rules import kind_specs
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.weights import Layout, Weight, slots_of

# What a block adds to the residual stream: two of these in each.
_RESIDUAL = (".o_proj", ".experts.down")


def fresh_leaves(
    config: ModelConfig,
    seed: int,
    *,
    mesh: Mesh,
    dtype: Any,
    layout: Layout = "slots",
    strategy: Strategy = DEFAULT,
) -> dict[str, Weight]:
    """Random weights on a mesh, by path, laid out as ``load`` lays them out.

    Matrices and embeddings are normal with a standard deviation of ``config.initializer_range``, as
    in MixtralPreTrainedModel of transformers; those that write to the residual stream have it
    divided by sqrt(2 * layers), so that the stream does not grow with depth at first (GPT-2,
    Radford et al. 2019, section 2.3). Norms are ones. A number depends on the seed and its place in
    the model alone: it is the same on every mesh.

    Args:
        config: sizes.
        seed: in [0, 2^31).
        mesh: where they lie.
        dtype: of the weights; drawn in f32.
        layout: of experts.
        strategy: see ``weight_shardings``.
    """
    specs = leaf_specs(config)
    shardings = weight_shardings(specs, mesh, strategy)
    key, residual = jax.random.key(seed), (2 * config.num_hidden_layers) ** -0.5
    leaves: dict[str, Weight] = {}
    for path, spec in specs.items():
        std = config.initializer_range * (residual if path.endswith(_RESIDUAL) else 1.0)
        shards = mesh.shape["expert"] if layout == "slots" and len(spec.shape) == 3 else None
        draw = _drawing(spec.shape, std, jnp.dtype(dtype), shards, shardings[path])
        leaves[path] = draw(jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF))
    return leaves


@functools.cache
def _drawing(
    shape: tuple[int, ...], std: float, dtype: Any, shards: int | None, sharding: NamedSharding
) -> Any:
    """Draws a weight from a key. Compiled once for the leaves of one kind, of all layers."""

    def draw(key: jax.Array) -> Any:
        if len(shape) == 1:
            return jnp.ones(shape, dtype)
        whole = (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)
        # Each device draws its own part; without this it would draw all of it.
        whole = jax.lax.with_sharding_constraint(whole, sharding)
        return whole if shards is None else slots_of(whole, shards)

    specs = kind_specs(jax.eval_shape(draw, jax.random.key(0)), sharding.spec)
    return jax.jit(
        draw, out_shardings=jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), specs)
    )
