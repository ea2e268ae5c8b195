"""The state of generation as shapes, for programs that are compiled and not run."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode.steps import DecodeState, empty_state
from mixtral_jax.model.placement import Placement


def shapes_of_state(
    config: ModelConfig, *, rows: int, slots: int, dtype: Any, placement: Placement
) -> DecodeState:
    """What ``empty_state`` makes of the same sizes, as shapes on its devices."""
    make = functools.partial(empty_state, config, slots=slots, dtype=dtype, placement=placement)
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    is_row = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    where = jax.jit(make).lower(row, is_row).compile().output_shardings
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(make, row, is_row),
        where,
    )
