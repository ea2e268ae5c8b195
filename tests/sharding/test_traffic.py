"""Collectives of the compiled programs are those of the formulas: kinds, counts and bytes."""

from __future__ import annotations

import re
from collections import Counter

import jax
import numpy as np
import pytest
from jax import export

from mixtral_jax.sharding.collectives import Collective, read_collectives
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import AXES, MeshSpec
from mixtral_jax.sharding.place import gather_weights, place
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.report import weight_report
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.sharding.traffic import Pass, forward_traffic
from tests.models import random_model, random_tokens

DATA, TENSOR = Strategy(), Strategy(attention="tensor")
FSDP, BOTH = Strategy(fsdp=True), Strategy(attention="tensor", fsdp=True)
CASES = [
    ("1x8", DATA, "all_to_all"),
    ("2x2x2", DATA, "all_to_all"),
    ("2x4", DATA, "all_to_all_once"),
    ("2x2x2", DATA, "gathered"),
    ("1x8", DATA, "replicated"),
    ("1x8", TENSOR, "replicated"),
    ("2x4", FSDP, "all_to_all"),
    ("2x2x2", BOTH, "all_to_all"),
]
MORE = [
    ("2x4", DATA, "all_to_all"),
    ("1x8", DATA, "all_to_all_once"),
    ("1x8", DATA, "gathered"),
    ("2x2x2", DATA, "replicated"),
    ("8x1", DATA, "auto"),
    ("2x4", TENSOR, "all_to_all"),
    ("2x2x2", TENSOR, "all_to_all_once"),
    ("8x1", FSDP, "auto"),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.fixture(scope="module")
def model(small_config):
    fields = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}
    return random_model(small_config(intermediate_size=80, **fields))


def forward(model, text: str, strategy: Strategy, options: DispatchOptions):
    """The program of a forward pass on a mesh, and its arguments."""
    mesh = MeshSpec.parse(text).build()
    placement = MeshPlacement(mesh, options, strategy=strategy)

    def program(model, tokens):
        return gather_weights(model, mesh, strategy).hidden(tokens, placement=placement).x

    placed = place(model, mesh, strategy=strategy)
    everywhere = jax.NamedSharding(mesh, jax.P())  # else the compiler splits the tokens too
    tokens = jax.device_put(random_tokens(model.config, (16, 16)), everywhere)
    return jax.jit(program), (placed, tokens)


def compiled(model, text: str, strategy: Strategy, options: DispatchOptions):
    program, arguments = forward(model, text, strategy, options)
    return program.lower(*arguments).compile()


def formula(model, text: str, strategy: Strategy, options: DispatchOptions):
    return forward_traffic(
        Pass(
            config=model.config,
            mesh=MeshSpec.parse(text),
            strategy=strategy,
            options=options,
            batch=16,
            length=16,
            itemsize=4,
        )
    )


@pytest.mark.parametrize(("text", "strategy", "method"), CASES + SLOW, ids=str)
def test_compiled_collectives_are_those_of_the_formula(model, text, strategy, method):
    overflow = "drop" if method.startswith("all") else "exact"
    options = DispatchOptions(method=method, overflow=overflow)
    found = read_collectives(compiled(model, text, strategy, options).as_text() or "")
    want = formula(model, text, strategy, options)
    got = Counter(each for each in found if each.group_size > 1)
    assert (got - Counter(want), Counter(want) - got) == (Counter(), Counter())


@pytest.mark.parametrize(
    ("text", "method"),
    [("1x8", "all_to_all"), pytest.param("2x4", "all_to_all_once", marks=pytest.mark.slow)],
)
def test_rows_in_two_chunks_send_what_the_formula_says(model, text, method):
    options = DispatchOptions(method=method, overflow="drop", chunks=2)
    found = read_collectives(compiled(model, text, DATA, options).as_text() or "")
    got, want = (
        Counter(each for each in part if each.kind == "all-to-all")
        for part in (found, formula(model, text, DATA, options))
    )
    layers, each = model.config.num_hidden_layers, 2 if method == "all_to_all" else 3
    assert got == want
    assert got.total() == layers * each * 2


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("platform", "text"), [("cuda", "1x8"), ("tpu", "2x4"), ("cuda", "1x4x2")])
def test_ragged_sends_what_the_formula_says(model, platform, text, chunks):
    """Read from the program for the accelerator: the CPU has no such operation."""
    options = DispatchOptions(method="ragged", overflow="drop", chunks=chunks)
    program, arguments = forward(model, text, DATA, options)
    unchecked = [export.DisabledSafetyCheck.custom_call("ragged_all_to_all")]
    lower = export.export(program, platforms=[platform], disabled_checks=unchecked)
    hlo = lower(*arguments).mlir_module()
    calls = re.findall(r"@ragged_all_to_all\(.* -> tensor<(\d+)x(\d+)xf32>", hlo)
    counts = re.findall(r'"?stablehlo\.all_gather"?\(.* -> tensor<(\d+)x(\d+)xi32>', hlo)
    want = formula(model, text, DATA, options)
    assert Counter(int(rows) * int(width) * 4 for rows, width in calls) == Counter(
        each.bytes for each in want if each.kind == "ragged-all-to-all"
    )
    shards = MeshSpec.parse(text).expert
    told = [each for each in want if each[:2] == ("all-gather", shards * shards * 4)]
    assert len(told) == len(counts) == model.config.num_hidden_layers * chunks
    assert {(int(rows), int(width)) for rows, width in counts} == {(shards, shards)}


@pytest.mark.parametrize("strategy", [DATA, TENSOR, FSDP, BOTH], ids=str)
@pytest.mark.parametrize("text", ["2x2x2"])
def test_argument_bytes_are_those_of_the_report(model, text, strategy):
    spec = MeshSpec.parse(text)
    program = compiled(model, text, strategy, DispatchOptions(method="gathered"))
    weights = sum(r.bytes_per_device for r in weight_report(model.config, spec, strategy))
    memory = program.memory_analysis()
    # The head is no argument of this program; tokens are int32, whole on every device.
    head = [r for r in weight_report(model.config, spec, strategy) if r.weight == "lm_head"]
    assert memory is not None
    assert memory.argument_size_in_bytes == weights - head[0].bytes_per_device + 16 * 16 * 4


def test_parses_what_xla_prints():
    hlo = """
      %a = (f32[16,32]{1,0}, f32[16,32]{1,0}, /*index=2*/f32[16,32]{1,0}) all-to-all(%x, %y, %z), replica_groups={{0,1,2},{3,4,5}}
      %b = bf16[8,4]{1,0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}
      %c = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}
      %d = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[4,2]<=[2,4]T(1,0)
      %g = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}
      %e = pred[7]{0} all-reduce(%x), replica_groups={{0},{1}}
      %h = f32[3]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}, use_global_device_ids=true
      %i = f32[4]{0} collective-permute(%x), channel_id=4, source_target_pairs={{0,3},{3,0}}
      %f = f32[7]{0} add(%x, %all-reduce.1)
    """  # noqa: E501
    assert read_collectives(hlo) == [
        Collective("all-to-all", 3 * 16 * 32 * 4, 3, 3),
        Collective("all-gather", 64, 8, 8),
        Collective("reduce-scatter", 4 * 32, 4, 4),
        Collective("all-gather", 32, 2, 5),
        Collective("all-gather", 32, 2, 5),
        Collective("all-reduce", 7, 1, 1),
        Collective("all-reduce", 12, 2, 2),
        Collective("collective-permute", 16, 2, 4),
    ]
    assert Collective("collective-permute", 16, 2, 2).wire_bytes == 16
    with pytest.raises(ValueError, match="replica_groups"):
        read_collectives("%a = f32[4]{0} all-reduce(%x), replica_groups=<unheard of>")
    assert Collective("all-reduce", 80, 4, 4).wire_bytes == 120


def test_groups_reach_as_far_as_the_mesh_lays_them_out():
    mesh = MeshSpec.parse("2x4x2")
    numbers = np.arange(16).reshape(mesh.shape)
    for axes in (("tensor",), ("expert",), ("data",), ("expert", "tensor"), ("data", "expert")):
        group = numbers[tuple(slice(None) if axis in axes else 0 for axis in AXES)]
        assert mesh.group(*axes) == (group.size, group.max() - group.min() + 1)


def test_exact_adds_the_gathered_path_and_a_count(model):
    exact = DispatchOptions(method="all_to_all")
    found = read_collectives(compiled(model, "2x4", DATA, exact).as_text() or "")
    common, gathered = (
        formula(model, "2x4", DATA, DispatchOptions(method=method))
        for method in ("all_to_all", "gathered")
    )
    # The count, and (no constant any more, inside the branch) which rows are valid.
    more = [Collective("all-reduce", 4, 8, 8), Collective("all-gather", 128, 4, 4)]
    counts = more * model.config.num_hidden_layers
    got = Counter(each for each in found if each.group_size > 1)
    assert got == Counter(common) + Counter(gathered) + Counter(counts)
