"""Collectives of the compiled prefill and decode_step are those of the formulas."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from mixtral_jax.plan.programs import Workload, compile_programs
from mixtral_jax.plan.step import traffic_of
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.strategy import Strategy

DATA, TENSOR = Strategy(), Strategy(attention="tensor")
CASES = [
    ("1x8", DATA, "auto", "exact", 16),
    ("2x2x2", DATA, "auto", "exact", 16),
    ("1x8", TENSOR, "auto", "exact", 1),
    ("2x2x2", TENSOR, "auto", "exact", 4),
    ("1x8", DATA, "all_to_all", "exact", 2),
]
MORE = [
    ("1x8", DATA, "auto", "exact", 1),
    ("2x4", DATA, "auto", "drop", 16),
    ("2x2x2", DATA, "auto", "exact", 3),
    ("1x4", DATA, "all_to_all_once", "exact", 8),
    ("1x4", DATA, "gathered", "exact", 8),
    ("1x8", DATA, "replicated", "exact", 16),
    ("8x1", DATA, "auto", "exact", 16),
    ("2x4", DATA, "all_to_all_once", "exact", 4),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("mesh", "strategy", "method", "overflow", "batch"), CASES + SLOW, ids=str)
def test_compiled_programs_send_what_the_formulas_say(
    small_config, mesh, strategy, method, overflow, batch
):
    config = small_config(num_attention_heads=8, num_key_value_heads=8, head_dim=4, vocab_size=96)
    options = DispatchOptions(method=method, overflow=overflow)
    work = Workload(
        config=config,
        mesh=MeshSpec.parse(mesh),
        batch=batch,
        context=16,
        dtype="float32",
        strategy=strategy,
        dispatch=options,
    )
    formulas = traffic_of(work, 4)
    for name, program in compile_programs(work).items():
        if name == "decode" and work.rows < work.mesh.num_devices and method != "auto":
            continue  # fewer rows than devices, padded: nothing but an explicit wish comes here
        got = Counter(each for each in program.collectives if each.group_size > 1)
        want = Counter(itertools.chain.from_iterable(formulas[name]))
        assert (name, got - want, want - got) == (name, Counter(), Counter())
