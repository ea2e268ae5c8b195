"""Which weights are widened byte by byte, and that they become what they stand for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mixtral_jax.kernels.widen import is_widened
from mixtral_jax.qtensor import SCHEMES, QTensor
from tests.kernels.quantized import GPTQ, RECIPES, in_codes

STACK = np.random.default_rng(0).standard_normal((2, 64, 128)).astype(np.float32)


@pytest.mark.parametrize("name", [*RECIPES, *GPTQ])
def test_codes_within_bytes_are_widened(name):
    assert is_widened(in_codes(name, STACK))


def test_three_bits_code_words_and_arrays_are_not():
    gptq3 = in_codes("gptq4", STACK)
    assert not is_widened(dataclasses.replace(gptq3, scheme="gptq3"))
    assert not is_widened(STACK)
    assert {name for name, row in SCHEMES.items() if row.is_coded} == {"qmoe"}
    assert not is_widened(dataclasses.replace(gptq3, scheme="qmoe"))


def test_groups_that_end_within_a_byte_are_not():
    w = in_codes("gptq2", STACK)
    scales = np.repeat(np.asarray(w.scales), 32, axis=-1)[..., :64]  # two codes, half a byte
    assert not is_widened(QTensor(w.codes, scales, "gptq2", w.dtype, zeros=scales.astype(np.uint8)))
