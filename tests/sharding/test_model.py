"""The whole model on meshes: logits and greedy tokens of one device, under every dispatch."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from mixtral_jax.decode.generate import Generation, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.model.placement import LOCAL, Placement
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from tests.models import forward, random_model, random_tokens
from tests.slow import mostly_slow

F32 = 1e-4
MESHES = ["1x1", "1x2", "1x8", "2x4", "8x1", "1x4x2"]
DISPATCH = {
    "auto": DispatchOptions(),
    "all_to_all": DispatchOptions(method="all_to_all", capacity_factor=8.0),
    "all_to_all overflowing": DispatchOptions(method="all_to_all", capacity_factor=0.25),
    "gathered": DispatchOptions(method="gathered"),
    "replicated": DispatchOptions(method="replicated"),
}


def greedy(model: Mixtral, placement: Placement, data: int = 1) -> tuple[list[list[int]], int]:
    """Tokens of three ragged prompts, and how many assignments were dropped."""
    options = SamplingOptions(max_new_tokens=12, ignore_eos=True)
    prompts = [tuple(range(3, 3 + n)) for n in (2, 9, 30)]
    requests = [Request(prompt_ids=prompt, options=options) for prompt in prompts]
    generation = Generation(model, requests, placement=placement, data_shards=data)
    rows: list[list[int]] = [[] for _ in prompts]
    for chunk in generation.chunks():
        rows = [row + new for row, new in zip(rows, chunk.token_ids, strict=True)]
    return rows, sum(generation.progress.dropped)


@pytest.fixture(scope="module")
def model(small_config) -> Mixtral:
    return random_model(small_config(initializer_range=0.3, num_hidden_layers=1))


@pytest.fixture(scope="module")
def expected(model) -> np.ndarray:
    return np.asarray(forward(model, random_tokens(model.config, (16, 3))))


@pytest.fixture(scope="module")
def deep(small_config) -> Mixtral:
    """Two layers: only then does what prefill's experts made reach a token that is generated."""
    return random_model(small_config(initializer_range=0.3))


@pytest.fixture(scope="module")
def expected_tokens(deep) -> list[list[int]]:
    return greedy(deep, LOCAL)[0]


@functools.cache
def _cases() -> list[tuple[str, str]]:
    """Every mesh under the rule, and every dispatch on the mesh that is the default."""
    return [(text, "auto") for text in MESHES] + [
        ("1x8", name) for name in DISPATCH if name != "auto"
    ]


@pytest.mark.parametrize(
    "case", mostly_slow(itertools.product(MESHES, DISPATCH), _cases()), ids=" ".join
)
def test_logits_equal_one_device(model, expected, case):
    text, options = case[0], DISPATCH[case[1]]
    mesh = MeshSpec.parse(text).build()
    tokens = random_tokens(model.config, (16, 3))
    got = forward(place(model, mesh), tokens, placement=MeshPlacement(mesh, options))
    np.testing.assert_allclose(got, expected, atol=F32)


TALKS = [("1x8", "auto"), ("1x4x2", "auto"), ("2x4", "auto"), ("1x8", "all_to_all overflowing")]


@pytest.mark.parametrize("case", mostly_slow(_cases(), TALKS), ids=" ".join)
def test_greedy_tokens_equal_one_device(deep, expected_tokens, case):
    text, name = case
    spec = MeshSpec.parse(text)
    mesh = spec.build()
    placement = MeshPlacement(mesh, DISPATCH[name])
    tokens, dropped = greedy(place(deep, mesh), placement, spec.data)
    assert tokens == expected_tokens
    assert dropped == 0


def test_experts_split_inside_where_devices_outnumber_them(small_config):
    model = random_model(small_config(num_local_experts=4, initializer_range=0.3))
    spec = MeshSpec.parse("1x8").fit(model.config)
    mesh = spec.build()
    tokens = random_tokens(model.config, (2, 8))
    got = forward(place(model, mesh), tokens, placement=MeshPlacement(mesh))
    np.testing.assert_allclose(got, forward(model, tokens), atol=F32)


def test_drops_are_counted_and_change_the_output(deep, expected_tokens):
    """The negative control of "0 drops"."""
    mesh = MeshSpec.parse("1x8").build()
    options = DispatchOptions(method="all_to_all", capacity_factor=0.25, overflow="drop")
    placement = MeshPlacement(mesh, options)
    tokens, dropped = greedy(place(deep, mesh), placement)
    assert dropped > 0
    assert tokens != expected_tokens
