"""The engine on meshes: the same tokens, and nothing compiles after it is ready."""

from __future__ import annotations

import dataclasses
import random
from typing import cast

import pytest

from mixtral_jax.kernels.scaled_kv import KV_DTYPES, KVDtype
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.serve.limits import EngineOptions, plan_limits
from mixtral_jax.serve.request import ServeRequest, ServeSampling
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from tests.models import random_model
from tests.serve.conftest import SMALL
from tests.serve.requests import finished, mixed_request
from tests.slow import mostly_slow

MESHES = ["1x8", "2x4", "2x2x2", "1x8 int8", "2x4 fp8", "1x2 tensor", "1x2x2 tensor"]


@pytest.mark.parametrize("case", mostly_slow(MESHES, ["2x4"]))
def test_a_mesh_changes_no_token(make_engine, small_config, case):
    mesh, _, codes = case.partition(" ")
    kv_dtype = cast(KVDtype, codes) if codes in KV_DTYPES else None
    strategy = Strategy(attention="tensor" if codes == "tensor" else "data")
    config = small_config(
        initializer_range=0.2,
        max_position_embeddings=512,
        num_hidden_layers=1,
        num_key_value_heads=4,  # as many as devices that share them in any case
    )
    model, spec = random_model(config), MeshSpec.parse(mesh)
    built = spec.build()
    on_mesh = LanguageModel(
        place(model, built, strategy=strategy),
        tokenizer=None,
        placement=MeshPlacement(built, strategy=strategy),
        spec=spec,
        kv_dtype=kv_dtype,
    )
    options = dataclasses.replace(SMALL, max_total_tokens=128, prefix_cache_bytes=1 << 20)
    engine = make_engine(on_mesh, options)
    rng, vocab = random.Random(3), config.vocab_size
    asked = [
        mixed_request(rng, vocab, longest=80, prompt_logprobs=i == 3, max_new_tokens=15)
        for i in range(8)
    ]
    first = [finished(t) for t in [engine.submit(each) for each in asked]]
    second = [finished(t) for t in [engine.submit(each) for each in reversed(asked)]][::-1]
    assert sum(last.cached_tokens for last in second) > 0
    for each, last, again in zip(asked, first, second, strict=True):
        assert last.token_ids == again.token_ids
        if each.sampling.temperature or each.sampling.logit_bias or each.sampling.top_logprobs:
            continue
        if each.sampling.repetition_penalty != 1.0 or each.sampling.frequency_penalty:
            continue
        if each.sampling.presence_penalty:
            continue
        theirs = on_mesh.generate(
            prompt_token_ids=[each.prompt_ids],
            max_new_tokens=15,
            ignore_eos=each.sampling.ignore_eos,
        )[0]
        assert list(last.token_ids) == theirs.token_ids
    assert engine.stats().counters["compilations_since_ready"] == 0


def test_what_reading_a_prompt_leaves_out_is_counted(make_engine, small_config):
    config = small_config(initializer_range=0.2, max_position_embeddings=512, num_hidden_layers=1)
    spec = MeshSpec.parse("1x2")
    built = spec.build()
    dispatch = DispatchOptions(method="all_to_all", capacity_factor=0.25, overflow="drop")
    lm = LanguageModel(
        place(random_model(config), built),
        tokenizer=None,
        placement=MeshPlacement(built, dispatch=dispatch),
        spec=spec,
    )
    engine = make_engine(lm, dataclasses.replace(SMALL, max_total_tokens=128))
    sampling = ServeSampling(max_new_tokens=1)
    finished(engine.submit(ServeRequest(prompt_ids=tuple(range(3, 63)), sampling=sampling)))
    assert sum(engine.stats().dropped) > 0


@pytest.mark.parametrize("attention", ["data", "tensor"])
@pytest.mark.parametrize("limits", [(32_768, 200_000), (4096, 50_000)])
def test_limits_of_a_deployment_start_on_eight_devices(small_config, attention, limits):
    config = small_config(max_position_embeddings=32_768, num_hidden_layers=1)
    spec = MeshSpec.parse("1x8")
    placement = MeshPlacement(spec.build(), strategy=Strategy(attention=attention))
    lm = LanguageModel(random_model(config), tokenizer=None, placement=placement, spec=spec)
    total, tokens = limits
    options = EngineOptions(max_total_tokens=total, max_batch_total_tokens=tokens)
    found, plan = plan_limits(lm, options)
    assert found.max_batch_total_tokens == tokens
    spread = 1 if attention == "tensor" else 8
    rows = [c.rows for c in plan.classes]
    assert all(n % (2 * spread) == 0 for n in [*rows, plan.scratch_rows])
    assert sum(c.length * c.rows for c in plan.classes) / spread <= tokens
