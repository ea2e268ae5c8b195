"""Which experts a row's tokens chose, counted while it is written."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mixtral_jax.decode.generate import Generation, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.model.placement import LOCAL, Routing
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from tests.models import REFERENCE, random_model

PROMPTS = ((5, 6, 7), (8,), tuple(range(10, 31)))
BUDGETS = (9, 2, 5)
LONGEST = max(len(ids) + n for ids, n in zip(PROMPTS, BUDGETS, strict=True))


@jax.jit
def routing_of(model: Mixtral, tokens: jax.Array) -> tuple[Routing, ...]:
    return model.hidden(tokens, placement=REFERENCE).routing


@pytest.mark.parametrize("mesh", [None, "2x2x2"])
def test_counts_are_those_of_the_tokens_read(small_config, mesh):
    config = small_config(initializer_range=0.2)
    model = random_model(config)
    placed, placement, data = model, LOCAL, 1
    if mesh is not None:
        spec = MeshSpec.parse(mesh)
        placement, data = MeshPlacement(spec.build()), spec.data
        placed = place(model, placement.mesh)
    requests = [
        Request(prompt_ids=ids, options=SamplingOptions(max_new_tokens=n, ignore_eos=True))
        for ids, n in zip(PROMPTS, BUDGETS, strict=True)
    ]
    generation = Generation(
        placed, requests, placement=placement, data_shards=data, prefill_chunk=8
    )
    written: list[list[int]] = [[], [], []]
    for chunk in generation.chunks(4):
        for row, ids in enumerate(chunk.token_ids):
            written[row] += ids
    counts = generation.progress.expert_counts
    assert counts is not None
    assert counts.shape == (3, config.num_hidden_layers, config.num_local_experts)
    for row, ids in enumerate(zip(PROMPTS, written, strict=True)):
        read = [*ids[0], *ids[1][:-1]]  # nothing reads the last token
        assert len(ids[1]) == BUDGETS[row]
        tokens = np.zeros((1, LONGEST), np.int32)
        tokens[0, : len(read)] = read
        for layer, chosen in enumerate(routing_of(model, tokens)):
            want = np.bincount(np.asarray(chosen.expert_ids)[: len(read)].reshape(-1), minlength=8)
            np.testing.assert_array_equal(counts[row, layer], want)
