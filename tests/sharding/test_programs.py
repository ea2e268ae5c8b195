"""What the compiler was asked for, and what it made of it: collectives of the expert layers."""

from __future__ import annotations

import re

import jax
import pytest

from mixtral_jax.decode import steps
from mixtral_jax.decode.generate import Generation, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from tests.models import forward, random_model, random_tokens
from tests.slow import in_turn

DROP = DispatchOptions(method="all_to_all", overflow="drop")
EXACT = DispatchOptions(method="all_to_all")


@pytest.fixture(scope="module")
def model(small_config):
    return random_model(small_config(num_hidden_layers=3, intermediate_size=80))


def lowered(model, text: str, options: DispatchOptions):
    mesh = MeshSpec.parse(text).build()
    tokens = random_tokens(model.config, (16, 16))
    return forward.lower(place(model, mesh), tokens, placement=MeshPlacement(mesh, options))


@pytest.mark.parametrize("options", [EXACT, DROP], ids=["exact", "drop"])
@pytest.mark.parametrize("text", ["1x8", "2x4", "1x4x2"])
def test_two_payload_all_to_alls_per_layer(model, text, options):
    hlo = lowered(model, text, options).as_text()
    assert hlo.count("stablehlo.all_to_all") == 2 * model.config.num_hidden_layers


def test_once_needs_a_small_third_for_ids_and_weights(model):
    for text in ("1x8", "1x4"):
        options = DispatchOptions(method="all_to_all_once")
        hlo = lowered(model, text, options).as_text()
        assert hlo.count("stablehlo.all_to_all") == 3 * model.config.num_hidden_layers


def test_replicated_needs_one_sum_and_nothing_else(model):
    hlo = lowered(model, "1x8", DispatchOptions(method="replicated")).as_text()
    assert hlo.count("stablehlo.all_reduce") == model.config.num_hidden_layers
    assert "stablehlo.all_to_all" not in hlo
    assert "stablehlo.all_gather" not in hlo


def gathered_shapes(compiled: str | None) -> list[tuple[int, ...]]:
    """Result shapes of every all-gather of a compiled program."""
    assert compiled, "this backend shows no HLO"
    found = re.findall(r"= \(?\w+\[([\d,]*)\][^=\n]* all-gather(?:-start)?\(", compiled)
    return [tuple(int(n) for n in shape.split(",") if n) for shape in found]


def is_expert_weight(shape: tuple[int, ...], model) -> bool:
    F = model.config.intermediate_size
    return any(size in (F, F // 2) for size in shape)


@pytest.mark.parametrize(
    ("options", "text"),
    in_turn([EXACT, DROP, DispatchOptions()], ["1x8", "2x4", "1x4x2"]),
    ids=lambda value: value if isinstance(value, str) else f"{value.method}-{value.overflow}",
)
def test_expert_weights_are_never_gathered(model, text, options):
    shapes = gathered_shapes(lowered(model, text, options).compile().as_text())
    assert not [shape for shape in shapes if is_expert_weight(shape, model)]


def test_nor_in_decode(model, monkeypatch):
    mesh = MeshSpec.parse("1x8").build()
    seen = []
    inner = steps.decode_step

    def spy(*args, **kwargs):
        seen.append(inner.lower(*args, **kwargs).compile().as_text())
        return inner(*args, **kwargs)

    monkeypatch.setattr(steps, "decode_step", spy)
    request = Request(prompt_ids=(3, 4, 5), options=SamplingOptions(max_new_tokens=2))
    list(Generation(place(model, mesh), [request], placement=MeshPlacement(mesh)).chunks())
    assert len(seen) == 1
    assert not [s for s in gathered_shapes(seen[0]) if is_expert_weight(s, model)]


def test_a_gathered_expert_would_be_seen(model):
    """The negative control: the layout that this project exists to avoid."""
    mesh = MeshSpec.parse("1x8").build()
    gate = place(model, mesh, layout="stacked").layers[0].moe.experts.gate[...]
    everywhere = jax.NamedSharding(mesh, jax.P())
    program = jax.jit(lambda w: jax.lax.with_sharding_constraint(w, everywhere) * 2)
    shapes = gathered_shapes(program.lower(gate).compile().as_text())
    assert [shape for shape in shapes if is_expert_weight(shape, model)]
