"""What was generated scores the same when it is read back in one prefill."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.decode.generate import Generation, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.model.placement import LOCAL, Placement
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from tests.models import forward, random_model
from tests.slow import mostly_slow

F32 = 1e-4
NEW_TOKENS = 100
SMALL = {"num_local_experts": 3, "initializer_range": 0.2}
PROMPT_LENGTHS = (1, 5, 19, 40)  # ragged; the longest takes several chunks and wraps the ring


def generated(
    model: Mixtral, placement: Placement, *, temperature: float, prefill_chunk: int = 512
) -> list[tuple[tuple[int, ...], list[int], list[float]]]:
    """(prompt, tokens, log-probabilities) of each row."""
    draw = np.random.default_rng(0)
    options = SamplingOptions(max_new_tokens=NEW_TOKENS, temperature=temperature, ignore_eos=True)
    prompts = [tuple(draw.integers(3, 64, n).tolist()) for n in PROMPT_LENGTHS]
    requests = [Request(prompt_ids=prompt, options=options) for prompt in prompts]
    generation = Generation(model, requests, placement=placement, prefill_chunk=prefill_chunk)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for chunk in generation.chunks():
        for row in range(len(prompts)):
            tokens[row] += chunk.token_ids[row]
            logprobs[row] += chunk.logprobs[row]
    assert generation.progress.dropped == [0] * model.config.num_hidden_layers
    return list(zip(prompts, tokens, logprobs, strict=True))


def rescored(model: Mixtral, prompt: tuple[int, ...], tokens: list[int]) -> np.ndarray:
    """The log-probability of each token given all before it, from one pass without a cache."""
    ids = np.zeros((2, max(PROMPT_LENGTHS) + NEW_TOKENS), np.int32)
    ids[0, : len(prompt) + len(tokens)] = [*prompt, *tokens]
    logprobs = jax.nn.log_softmax(forward(model, jnp.asarray(ids))[0])
    where = np.arange(len(tokens)) + len(prompt) - 1
    return np.asarray(logprobs)[where, tokens]


@pytest.mark.parametrize("temperature", mostly_slow([0.0, 1.0], [1.0]))
@pytest.mark.parametrize(
    ("window", "prefill_chunk"),
    [(16, 512), (16, 16), (None, 16)],
    ids=["window 16", "window 16, chunked", "full, chunked"],
)
def test_each_step_equals_one_prefill(small_config, window, prefill_chunk, temperature):
    config = small_config(sliding_window=window, max_position_embeddings=256, **SMALL)
    model = random_model(config)
    rows = generated(model, LOCAL, temperature=temperature, prefill_chunk=prefill_chunk)
    for prompt, tokens, logprobs in rows:
        assert len(tokens) == len(logprobs) == NEW_TOKENS
        np.testing.assert_allclose(logprobs, rescored(model, prompt, tokens), atol=F32)


@pytest.mark.slow
def test_on_a_mesh_too(small_config):
    config = small_config(sliding_window=16, max_position_embeddings=256, initializer_range=0.2)
    model = random_model(config)
    mesh = MeshSpec.parse("1x8").build()
    rows = generated(place(model, mesh), MeshPlacement(mesh), temperature=0.0, prefill_chunk=16)
    assert [row[1] for row in rows] == [row[1] for row in generated(model, LOCAL, temperature=0.0)]
    for prompt, tokens, logprobs in rows:
        np.testing.assert_allclose(logprobs, rescored(model, prompt, tokens), atol=F32)


def test_another_window_would_be_noticed(small_config):
    """The negative control: the same tokens scored without the window differ."""
    fields = {"max_position_embeddings": 256, **SMALL}
    model = random_model(small_config(sliding_window=16, **fields))
    prompt, tokens, logprobs = generated(model, LOCAL, temperature=0.0)[0]
    other = rescored(random_model(small_config(**fields)), prompt, tokens)
    assert np.abs(other - logprobs).max() > 100 * F32
