"""One dtype for a model whose files mix them, and no cast that loses a number without a word."""

from __future__ import annotations

import re

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from mixtral_jax.config import read_config
from mixtral_jax.convert import convert, load_weights
from mixtral_jax.convert.orbax_leaves import OrbaxLeaves
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.model.transformer import leaf_specs
from tests.convert import checkpoints

W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def load(folder, config, dtype=None, note=lambda line: None):
    place = SingleDeviceSharding(jax.devices()[0])
    return load_weights(
        folder, config, sharding_of=lambda path: place, dtype=dtype, layout="stacked", note=note
    )


def mixed(tensors, dtype=np.float32):
    small = ("norm", "gate.weight")
    return {
        name: w.astype(dtype) if any(part in name for part in small) else w
        for name, w in tensors.items()
    }


@pytest.mark.parametrize(
    ("named", "expected", "cast"),
    [("bfloat16", "bfloat16", 7), ("float32", "float32", 16), ("float16", "bfloat16", 7)],
)
def test_mixed_dtypes_load_as_one_with_one_note(
    tmp_path, small_config, tensors, named, expected, cast
):
    config = small_config(dtype=named)
    written = mixed(tensors)
    src = checkpoints.write(tmp_path / "hf", config, written)
    convert(src, tmp_path / "out")
    for folder in (src, tmp_path / "out"):
        notes: list[str] = []
        loaded = load(folder, read_config(folder), note=notes.append)
        for leaf, w in checkpoints.leaves(written, config).items():
            assert checkpoints.same_bits(loaded[leaf], w.astype(checkpoints.DTYPES[expected])), leaf
        assert len(notes) == 1
        assert f"{cast} of {len(loaded)} tensors are cast to {expected}" in notes[0]


def test_conversion_keeps_mixed_dtypes_as_they_are(tmp_path, config, tensors):
    written = mixed(tensors)
    convert(checkpoints.write(tmp_path / "hf", config, written), tmp_path / "out")
    leaves = OrbaxLeaves(tmp_path / "out", leaf_specs(config))
    for leaf, w in checkpoints.leaves(written, config).items():
        assert leaves.dtype(leaf) == w.dtype, leaf


def test_one_dtype_throughout_is_loaded_without_a_note(original, small_config):
    notes: list[str] = []
    loaded = load(original, small_config(dtype="float32"), note=notes.append)
    assert {str(w.dtype) for w in loaded.values()} == {"bfloat16"}
    assert notes == []


@pytest.mark.parametrize("kind", ["published", "orbax"])
def test_cast_that_makes_an_infinity_is_refused_naming_the_tensor(tmp_path, config, tensors, kind):
    large = tensors | {W2: tensors[W2].copy()}
    large[W2][-1, -1] = LARGEST
    folder = checkpoints.write(tmp_path / "hf", config, large)
    if kind == "orbax":
        convert(folder, tmp_path / "out")
        folder = tmp_path / "out"
    name = r"layers\.1\.moe\.experts\.down\[3\]" if kind == "orbax" else re.escape(W2)
    words = f"^{name} has values too large for float16"
    with pytest.raises(MixtralError, match=words) as caught:
        load(folder, config, "float16")
    assert caught.value.code == BAD_DATA
    assert load(folder, config, "float32")


def test_infinity_that_is_stored_is_no_fault_of_the_cast(tmp_path, config, tensors):
    stored = tensors | {W2: tensors[W2].copy()}
    stored[W2][-1, -1] = np.inf
    folder = checkpoints.write(tmp_path / "hf", config, stored)
    assert load(folder, config, "float16")
