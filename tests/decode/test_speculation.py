"""Speculation changes how fast tokens come, and not which."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.decode import generate, speculation, steps
from mixtral_jax.decode.generate import Generation, Progress, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.decode.steps import Draft
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.model.placement import LOCAL, Placement
from mixtral_jax.model.transformer import Mixtral, assemble
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from tests.decode.test_compile import COMPILED, compiles
from tests.models import random_leaves, random_model

F32 = 1e-4
K = 4
SMALL = {
    "num_hidden_layers": 1,
    "num_local_experts": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
}
GREEDY = SamplingOptions(max_new_tokens=30)


@pytest.fixture(autouse=True)
def _never_switched_off(monkeypatch):
    """The clock of a busy machine decides nothing here."""
    monkeypatch.setattr(speculation, "LOSSES", 10**9)


class Run(NamedTuple):
    tokens: list[list[int]]
    logprobs: list[list[float]]
    progress: Progress


def run(
    model: Mixtral,
    requests: list[Request],
    speculate: int | None,
    placement: Placement = LOCAL,
    steps_per_chunk: int = 32,
    **fields: Any,
) -> Run:
    generation = Generation(model, requests, placement=placement, speculate=speculate, **fields)
    tokens: list[list[int]] = [[] for _ in requests]
    logprobs: list[list[float]] = [[] for _ in requests]
    for chunk in generation.chunks(steps_per_chunk):
        for row in range(len(requests)):
            tokens[row] += chunk.token_ids[row]
            logprobs[row] += chunk.logprobs[row]
    return Run(tokens, logprobs, generation.progress)


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[tuple[int, ...]]:
    """Random ids; every other prompt repeats a few of them."""
    draw = np.random.default_rng(seed)
    drawn = []
    for i in range(count):
        length = int(draw.integers(1, longest))
        own = draw.integers(3, 64, int(draw.integers(1, 6)) if i % 2 else length)
        drawn.append(tuple(np.resize(own, length).tolist()))
    return drawn


def requests_of(ids: list[tuple[int, ...]], *options: SamplingOptions) -> list[Request]:
    """Options in turn."""
    return [
        Request(prompt_ids=row, options=options[i % len(options)], sample_id=i)
        for i, row in enumerate(ids)
    ]


def check_same(plain: Run, drafted: Run) -> speculation.Speculated:
    """The same tokens, log-probabilities and expert counts; some drafts met, and some not."""
    assert drafted.tokens == plain.tokens
    for got, want in zip(drafted.logprobs, plain.logprobs, strict=True):
        np.testing.assert_allclose(got, want, atol=F32)
    assert plain.progress.expert_counts is not None
    np.testing.assert_array_equal(drafted.progress.expert_counts, plain.progress.expert_counts)
    assert drafted.progress.dropped == plain.progress.dropped
    assert plain.progress.speculated is None
    report = drafted.progress.speculated
    assert report is not None
    assert 0 < report.accepted < report.drafted
    assert report.row_steps + report.accepted == sum(map(len, drafted.tokens))
    return report


@pytest.mark.parametrize("window", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_200_prompts_get_the_same_greedy_text(small_config, window):
    model = random_model(small_config(sliding_window=window, **SMALL))
    requests = requests_of(prompts(200), GREEDY)
    check_same(run(model, requests, None), run(model, requests, K))


@pytest.mark.slow
def test_sampled_text_is_the_same_too(small_config):
    model = random_model(small_config(**SMALL))
    mixed = [
        SamplingOptions(max_new_tokens=50, temperature=0.1, top_p=0.9, seed=1, ignore_eos=True),
        SamplingOptions(max_new_tokens=50, temperature=0.8, repetition_penalty=1.2, seed=2),
        SamplingOptions(max_new_tokens=7, repetition_penalty=1.1, ignore_eos=True),
        SamplingOptions(max_new_tokens=1, temperature=1.0, top_k=5),
    ]
    requests = requests_of(prompts(24), *mixed)
    plain = run(model, requests, None)
    check_same(plain, run(model, requests, K))
    assert plain.tokens != run(model, requests_of(prompts(24), *mixed[::-1]), K).tokens


@pytest.mark.parametrize("num_drafts", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_ring_that_wraps(small_config, num_drafts, monkeypatch):
    """Prompts are read in chunks no longer than a draft, so the ring has exactly W + K slots."""
    window, slots = 8, []
    inner = steps.empty_state

    def spy(*args, **kwargs):
        slots.append(kwargs["slots"])
        return inner(*args, **kwargs)

    monkeypatch.setattr(steps, "empty_state", spy)
    model = random_model(small_config(sliding_window=window, **SMALL))
    requests = requests_of(prompts(24), dataclasses.replace(GREEDY, max_new_tokens=60))
    plain = run(model, requests, None, prefill_chunk=1 + num_drafts)
    check_same(plain, run(model, requests, num_drafts, prefill_chunk=1))
    assert slots == [window + num_drafts] * 2


@pytest.mark.slow
def test_up_to_the_last_slot(small_config):
    """Full attention: a draft past the budget would wrap around and overwrite the first keys."""
    model = random_model(small_config(**SMALL))
    options = SamplingOptions(max_new_tokens=generate.LENGTH_BUCKET - 40, ignore_eos=True)
    requests = requests_of([ids * 40 for ids in prompts(24, longest=2)], options)
    plain = run(model, requests, None)
    check_same(plain, run(model, requests, K))
    assert {len(ids) for ids in plain.tokens} == {options.max_new_tokens}


@pytest.mark.slow
def test_one_slot_less_would_lose_a_key(small_config, monkeypatch):
    """The negative control."""
    model = random_model(small_config(sliding_window=8, **SMALL))
    requests = requests_of(prompts(24), dataclasses.replace(GREEDY, max_new_tokens=60))
    plain = run(model, requests, None)
    inner = generate.num_slots
    monkeypatch.setattr(generate, "num_slots", lambda *args, **kwargs: inner(*args, **kwargs) - 1)
    drafted = run(model, requests, K, prefill_chunk=1)
    assert drafted.tokens != plain.tokens


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 8])
def test_whatever_is_drafted(small_config, monkeypatch, window):
    """Random drafts of random lengths: the text depends on none of them."""
    inner = speculation.find_draft

    def random_draft(history, lengths, most, *, num_drafts):
        good = inner(history, lengths, most, num_drafts=num_drafts)
        key = jax.random.fold_in(jax.random.key(0), lengths.sum())
        tokens = jax.random.randint(key, good.tokens.shape, 0, 64)
        is_own = jax.random.bernoulli(key, 0.2, good.tokens.shape)
        counts = jax.random.randint(key, good.counts.shape, 0, num_drafts + 1)
        counts = jnp.minimum(counts, jnp.maximum(most, 0))
        return Draft(jnp.where(is_own, tokens, good.tokens), counts)

    model = random_model(small_config(sliding_window=window, **SMALL))
    requests = requests_of(prompts(24), dataclasses.replace(GREEDY, max_new_tokens=60))
    plain = run(model, requests, None)
    monkeypatch.setattr(speculation, "find_draft", random_draft)
    jax.clear_caches()
    check_same(plain, run(model, requests, K))
    jax.clear_caches()


def test_drafts_that_stay_would_be_noticed(small_config, monkeypatch):
    """The negative control: without ``rewind`` the text is another."""
    model = random_model(small_config(**SMALL))
    requests = requests_of(prompts(24), GREEDY)
    plain = run(model, requests, None)
    monkeypatch.setattr(steps, "rewind", lambda cache, lengths, most: cache)
    jax.clear_caches()
    assert run(model, requests, K).tokens != plain.tokens
    jax.clear_caches()


@pytest.mark.parametrize("steps_per_chunk", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_rows_stop_between_chunks(small_config, steps_per_chunk):
    model = random_model(small_config(**SMALL))
    requests = requests_of(prompts(24), dataclasses.replace(GREEDY, ignore_eos=True))
    plain = run(model, requests, None)
    generation = Generation(model, requests, placement=LOCAL, speculate=K)
    tokens: list[list[int]] = [[] for _ in requests]
    for chunk in generation.chunks(steps_per_chunk):
        for row, ids in enumerate(chunk.token_ids):
            assert len(ids) <= steps_per_chunk * (K + 1)
            tokens[row] += ids
        generation.stop(1)
    assert 0 < len(tokens[1]) <= steps_per_chunk * (K + 1)
    assert tokens[1] == plain.tokens[1][: len(tokens[1])]
    assert tokens[:1] + tokens[2:] == plain.tokens[:1] + plain.tokens[2:]


def test_on_a_mesh_and_compiled_once(small_config):
    config = small_config(sliding_window=16, max_position_embeddings=256, initializer_range=0.2)
    model, mesh = random_model(config), MeshSpec.parse("1x8").build()
    jax.clear_caches()
    options = dataclasses.replace(GREEDY, max_new_tokens=60)
    for count, longest in ((4, 40), (3, 17)):
        requests = requests_of(prompts(count, longest), options)
        plain = run(model, requests, None)
        COMPILED.clear()
        drafted = run(
            place(model, mesh),
            requests,
            K,
            MeshPlacement(mesh),
            prefill_chunk=16,
            steps_per_chunk=9,  # several calls, the second without drafts
        )
        check_same(plain, drafted)
        assert compiles("speculate_step") == (1 if count == 4 else 0)
        assert compiles("decode_step") == 0


def test_a_row_of_nan_is_alone(small_config):
    config = small_config(**SMALL)
    leaves = random_leaves(config)
    nan = 50
    leaves["embed_tokens"] = leaves["embed_tokens"].at[nan].set(jnp.nan)
    model = assemble(config, leaves)
    ids = prompts(24)
    ids[5] = (3, 4, nan, 3, 4, nan, 3, 4)
    requests = requests_of(ids, GREEDY)
    plain, drafted = run(model, requests, None), run(model, requests, K)
    check_same(plain, drafted)
    assert drafted.progress.is_bad == plain.progress.is_bad
    assert plain.progress.is_bad[5]
    assert sum(plain.progress.is_bad) < len(ids)


@pytest.mark.slow
def test_the_embedded_model():
    lm = mj.load("tiny")
    asked = ["monday tuesday monday tuesday monday", "12 + 30 =", "1, 2, 3, 4, 5, 6,"]
    for fields in ({}, {"temperature": 0.8, "seed": 3, "stop": ("wednesday", "7")}):
        options = SamplingOptions(max_new_tokens=48, **fields)
        plain = lm.generate(asked, options=options)
        drafted = lm.generate(asked, options=options, speculate=K)
        assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
        assert [c.generated_text for c in drafted] == [c.generated_text for c in plain]
        assert [c.finish_reason for c in drafted] == [c.finish_reason for c in plain]
        report = drafted[0].stats.speculated
        assert report is not None
        assert report.drafted > report.accepted > 0


@pytest.mark.parametrize("speculate", [0, 65, True])
def test_what_is_no_number_of_drafts_is_refused(speculate):
    with pytest.raises(MixtralError, match="--speculate: expected an integer, 1 to 64") as caught:
        SamplingOptions(speculate=speculate)
    assert caught.value.code == USAGE
