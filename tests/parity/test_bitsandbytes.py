"""NF4 and FP4 equal bitsandbytes byte for byte, and so do its nested scales."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.qtensor import dynamic_map
from mixtral_jax.quantize.makers import Recipe, nest, nest_around, quantize

pytestmark = pytest.mark.parity
SHAPES = [(64, 64), (48, 448), (33, 1024), (257, 128)]


@pytest.fixture(scope="module")
def bnb() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def matrices(shape: tuple[int, int]) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    gaussian = draw.standard_normal(shape).astype(np.float32)
    heavy = (gaussian * np.exp(2 * draw.standard_normal(shape))).astype(np.float32)
    sparse = gaussian * (draw.uniform(size=shape) < 0.1)
    sparse[0] = 0  # blocks of zeros
    return {"gaussian": gaussian * 0.02, "heavy": heavy, "sparse": sparse.astype(np.float32)}


def test_the_dynamic_map_is_the_same(bnb):
    np.testing.assert_array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())
    unsigned = bnb.create_dynamic_map(signed=False).numpy()
    np.testing.assert_array_equal(dynamic_map(is_signed=False), unsigned)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_codes_and_absmax_are_the_same_bytes(torch, bnb, scheme, shape, dtype):
    for name, w in matrices(shape).items():
        tensor = torch.from_numpy(w).to(getattr(torch, dtype))
        codes, state = bnb.quantize_4bit(tensor, blocksize=64, quant_type=scheme)
        ours = quantize(np.asarray(tensor.float().numpy()), Recipe(scheme=scheme))
        np.testing.assert_array_equal(ours.codes.reshape(-1), codes.numpy().reshape(-1), name)
        assert ours.scales.tobytes() == state.absmax.numpy().tobytes(), name
        theirs = bnb.dequantize_4bit(codes, state).float().numpy()
        got = jax.tree.map(jnp.asarray, ours).dequantize().astype(dtype).astype(jnp.float32)
        np.testing.assert_array_equal(got, theirs, name)


@pytest.mark.parametrize("shape", SHAPES)
def test_nested_tables_are_the_same_bytes(torch, bnb, shape):
    """Against its portable operator: its CPU library rounds a scale by a table of 65,536 entries,
    and is off by one code in some hundreds."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    operator = torch.ops.bitsandbytes.quantize_blockwise.default
    for name, w in matrices(shape).items():
        _, state = bnb.quantize_4bit(
            torch.from_numpy(w), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        scales = np.asarray(quantize(w, Recipe(scheme="nf4")).scales)
        offset = np.float32(state.offset.item())
        shifted = torch.from_numpy(scales.reshape(-1)) - state.offset
        codes, absmax = operator.redispatch(keys, shifted, bnb.create_dynamic_map(), 256)
        ours = nest_around(scales, offset)
        assert ours.codes.tobytes() == codes.numpy().tobytes(), name
        assert ours.absmax.tobytes() == absmax.numpy().tobytes(), name
        assert ours.absmax.tobytes() == state.state2.absmax.numpy().tobytes(), name
        library = state.absmax.numpy().astype(int)
        assert np.abs(library - ours.codes.reshape(-1)).max() <= 1, name
        assert abs(nest(scales).offset - offset) <= np.spacing(offset), name
