"""The test setup itself: that shapes are checked and that eight devices stand ready."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from mixtral_jax.model.rope import rotation
from tests.conftest import NUM_SIMULATED_DEVICES


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only the CPU simulates devices")
def test_devices_are_simulated():
    assert jax.device_count() == NUM_SIMULATED_DEVICES


def test_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError):
        rotation(jnp.zeros((3,), jnp.int32), head_dim=4, theta=1e4)


def test_wrong_dtype_is_refused():
    with pytest.raises(TypeCheckError):
        rotation(jnp.zeros((1, 3), jnp.float32), head_dim=4, theta=1e4)
