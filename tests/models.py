"""Random models for tests: drawn by numpy, which compiles nothing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.placement import LocalPlacement, Placement
from mixtral_jax.model.transformer import Mixtral, assemble, leaf_specs

REFERENCE = LocalPlacement("reference")


def random_leaves(config: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Gaussian matrices of standard deviation ``initializer_range``, norms near one."""
    draw = np.random.default_rng(seed)
    leaves = {}
    for name, spec in leaf_specs(config).items():
        drawn = draw.standard_normal(spec.shape, np.float32) * config.initializer_range
        leaves[name] = jnp.asarray(drawn + (len(spec.shape) == 1), spec.dtype)
    return leaves


def random_model(config: ModelConfig, seed: int = 0) -> Mixtral:
    """A model of ``random_leaves``."""
    return assemble(config, random_leaves(config, seed))


def random_tokens(config: ModelConfig, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Distinct random ids (identical rows would collapse to two experts)."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def bytes_held(tree: Any, device: Any) -> int:
    """Bytes of the arrays of a tree that lie on a device."""
    parts = [part for array in jax.tree.leaves(tree) for part in array.addressable_shards]
    return sum(part.data.nbytes for part in parts if part.device == device)


@functools.partial(jax.jit, static_argnames=("placement",))
def forward(
    model: Mixtral,
    tokens: jax.Array,
    valid: jax.Array | None = None,
    *,
    placement: Placement = REFERENCE,
) -> jax.Array:
    """Teacher-forced logits, compiled."""
    return model(tokens, valid, placement=placement)
