"""Collectives of the compiled prefill and decode_step are those of the formulas."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from mixtral_jax.plan.bill import make_bill
from mixtral_jax.plan.programs import Workload, compile_programs
from mixtral_jax.plan.step import between_devices, one_branch, traffic_of
from mixtral_jax.sharding.collectives import Collective
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.strategy import Strategy
from tests.slow import mostly_slow

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
        got = Counter(each for each in program.collectives if each.group_size > 1)
        want = Counter(itertools.chain.from_iterable(formulas[name]))
        if name == "decode" and work.rows < work.mesh.num_devices and method != "auto":
            assert got != want  # padded to divide, as only an explicit wish has it: see below
        else:
            assert (name, got - want, want - got) == (name, Counter(), Counter())


def few_rows(small_config, **dispatch) -> Workload:
    """Two rows on eight devices."""
    return Workload(
        config=small_config(),
        mesh=MeshSpec.parse("1x8"),
        batch=2,
        context=16,
        dtype="float32",
        dispatch=DispatchOptions(**dispatch),
    )


def billed(step) -> Counter:
    return Counter({Collective(s.kind, s.bytes, s.group_size, s.span): s.count for s in step})


@pytest.mark.parametrize("method", mostly_slow(["gathered", "all_to_all"], ["all_to_all"]))
def test_where_the_formula_does_not_hold_the_compiled_program_is_billed(small_config, method):
    work = few_rows(small_config, method=method)
    bill = make_bill(work, "h100")
    assert bill.differences
    assert all(line.startswith("decode: ") for line in bill.differences)
    assert bill.to_json()["differences"] == bill.differences
    program = compile_programs(one_branch(work, 1))["decode"]
    assert billed(bill.steps["decode"].collectives) == Counter(between_devices(program))
    kinds = {each.kind for each in bill.steps["decode"].collectives}
    assert ("reduce-scatter" in kinds) == (method == "gathered")


def test_ragged_is_not_compared_and_says_so(small_config):
    bill = make_bill(few_rows(small_config, method="ragged"), "h100")
    assert bill.differences == []
    assert "the CPU has no such operation" in bill.to_json()["not_compared"]
    assert any(each.kind.startswith("ragged") for each in bill.steps["prefill"].collectives)
