"""`--kernels`: the devices choose; any row gives the same tokens; others are refused."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax import language_model
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.weights import ExpertSlots

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
LOGIT_TOLERANCE = 1e-4


@pytest.mark.parametrize("mesh", ["1x1", pytest.param("2x2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernels", ["gpu", pytest.param("tpu", marks=pytest.mark.slow)])
def test_rows_of_accelerators_give_the_same(kernels, mesh):
    """On a CPU the gpu row computes as the CPU's does, from stacked weights."""
    lm, asked = mj.load("tiny", mesh="1x1"), mj.load("tiny", mesh=mesh, kernels=kernels)
    gate = asked.model.layers[0].moe.experts.gate[...]
    assert isinstance(gate, jax.Array)
    assert isinstance(lm.model.layers[0].moe.experts.gate[...], ExpertSlots)
    tokens = [lm.encode("the red house"), lm.encode("der Fluss")]
    tokens = [row[:3] for row in tokens]
    np.testing.assert_allclose(asked.logits(tokens), lm.logits(tokens), atol=LOGIT_TOLERANCE)
    if mesh == "2x2":
        want, got = (m.generate(["le jour"], **GREEDY)[0].token_ids for m in (lm, asked))
        assert got == want


def test_the_devices_choose(monkeypatch):
    monkeypatch.setattr(language_model, "kernels_for", {"cpu": "tpu"}.__getitem__)
    assert mj.load("tiny", mesh="1x1").placement.kernels == "tpu"  # type: ignore[attr-defined]
    chosen = mj.load("tiny", mesh="1x1", kernels="visit").placement.kernels  # type: ignore[attr-defined]
    assert chosen == "visit"


def test_unknown_kernels_are_refused():
    with pytest.raises(MixtralError) as caught:
        mj.load("tiny", kernels="cuda")
    assert caught.value.code == USAGE
    assert str(caught.value) == f"--kernels: expected {', '.join(KERNELS)}, got 'cuda'"
