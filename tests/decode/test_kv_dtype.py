"""Generation over an 8-bit cache: equal on meshes, NaN is found, quality is kept."""

from __future__ import annotations

import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixtral_jax as mj
from examples.tiny.perplexity import score_through_cache
from examples.tiny.text import Conversation, held_out
from examples.tiny.tokens import encode
from mixtral_jax.decode import steps
from mixtral_jax.decode.generate import Generation, Request
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels import attention as kernels
from mixtral_jax.kernels import scaled_kv
from mixtral_jax.kernels.scaled_kv import KV_DTYPES, KVDtype, ScaledKV
from mixtral_jax.load_options import LoadOptions
from mixtral_jax.model.placement import LOCAL, Placement
from mixtral_jax.model.transformer import Mixtral, assemble
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from tests.models import random_leaves, random_model

PROMPTS = [tuple(range(3, 3 + n)) for n in (2, 9, 30)]
NEW_TOKENS = 24
ALLOWED = 0.01  # of the perplexity of a plain cache


def generate(
    model: Mixtral,
    kv_dtype: KVDtype | None,
    placement: Placement = LOCAL,
    *,
    data: int = 1,
    prompts: list[tuple[int, ...]] = PROMPTS,
) -> tuple[list[list[int]], list[bool]]:
    """Greedy tokens of ragged prompts, and which rows met NaN."""
    options = SamplingOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0.0)
    generation = Generation(
        model,
        [Request(prompt_ids=prompt, options=options) for prompt in prompts],
        placement=placement,
        data_shards=data,
        prefill_chunk=16,
        kv_dtype=kv_dtype,
    )
    rows: list[list[int]] = [[] for _ in prompts]
    for chunk in generation.chunks():
        rows = [row + new for row, new in zip(rows, chunk.token_ids, strict=True)]
    return rows, generation.progress.is_bad


@pytest.fixture(scope="module")
def model(small_config) -> Mixtral:
    """Its window lets the ring wrap, in prefill and after."""
    return random_model(small_config(initializer_range=0.3, sliding_window=16))


@pytest.fixture(scope="module")
def local_tokens(model) -> dict[str, list[list[int]]]:
    return {kv_dtype: generate(model, kv_dtype)[0] for kv_dtype in KV_DTYPES}


@pytest.mark.parametrize(
    ("kv_dtype", "text"),
    [
        ("int8", "2x2x2"),
        pytest.param("int8", "1x8", marks=pytest.mark.slow),
        pytest.param("fp8", "1x8", marks=pytest.mark.slow),
    ],
)
def test_tokens_on_a_mesh_are_those_of_one_device(model, local_tokens, kv_dtype, text):
    spec = MeshSpec.parse(text)
    mesh = spec.build()
    placement = MeshPlacement(mesh)
    tokens, bad = generate(place(model, mesh), kv_dtype, placement, data=spec.data)
    assert tokens == local_tokens[kv_dtype]
    assert not any(bad)


def test_codes_are_what_is_read(local_tokens):
    """The negative control: with other codes other tokens are written, sooner or later."""
    assert local_tokens["int8"] != local_tokens["fp8"]


@pytest.mark.parametrize("text", [None, "2x2x2"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_scales_lie_as_their_codes(model, kv_dtype, text):
    placement = LOCAL if text is None else MeshPlacement(MeshSpec.parse(text).build())
    state = steps.empty_state(
        model.config,
        np.zeros(4, np.int32),
        np.zeros(4, bool),
        slots=32,
        dtype=KV_DTYPES[kv_dtype],
        placement=placement,
    )
    for kv in (*state.cache.keys, *state.cache.values):
        assert isinstance(kv, ScaledKV)
        assert (kv.codes.dtype, kv.scales.dtype) == (KV_DTYPES[kv_dtype], jnp.float32)
        codes, scales = (x.sharding.shard_shape(x.shape) for x in kv)
        assert codes[:-1] == scales
        assert codes == ((4, 2, 32, 8) if text is None else (2, 1, 32, 8))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_row_that_meets_nan_fails_alone(small_config, kv_dtype):
    """The bad token is neither the last of its prompt nor seen but through the cache."""
    config = small_config(initializer_range=0.3, num_hidden_layers=1, num_local_experts=2)
    leaves = random_leaves(config)
    bad_token = 60
    leaves["embed_tokens"] = leaves["embed_tokens"].at[bad_token].set(jnp.nan)
    whole, broken = random_model(config), assemble(config, leaves)
    prompts = [(3, 4, 5), (3, bad_token, 5), (6, 7)]
    expected, _ = generate(whole, kv_dtype, prompts=prompts)
    assert not any(bad_token in expected[row] for row in (0, 2)), "choose another token"
    got, bad = generate(broken, kv_dtype, prompts=prompts)
    assert bad == [False, True, False]
    assert got == [expected[0], [], expected[2]]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_step_holds_no_restored_cache(monkeypatch, small_config, kv_dtype):
    """No float array of the compiled step is as large as a layer's keys."""
    monkeypatch.setattr(kernels, "WIDENED_BYTES", 1)
    model, B, slots = random_model(small_config(num_hidden_layers=1)), 2, 3072
    state = steps.empty_state(
        model.config,
        np.zeros(B, np.int32),
        np.zeros(B, bool),
        slots=slots,
        dtype=KV_DTYPES[kv_dtype],
        placement=LOCAL,
    )
    rows = row_sampling([SamplingOptions()] * B, [0] * B, model.config.vocab_size)
    limits = steps.Limits(np.full(B, 9, np.int32), np.zeros(B, bool), np.array([2], np.int32))
    lowered = steps.decode_step.lower(model, state, rows, limits, np.int32(1), placement=LOCAL)
    text = lowered.compile().as_text()
    assert text
    shapes = re.findall(r"\b(?:f64|f32|f16|bf16)\[([\d,]+)\]", text)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    codes = state.cache.keys[0]
    assert isinstance(codes, ScaledKV)
    assert largest < math.prod(codes.shape), "as large as the cache of one layer"
    assert largest >= math.prod(codes.scales.shape), "the scales at least must be found"


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    return [Conversation((example,)) for example in held_out(4, seed=1)]


@pytest.fixture(scope="module")
def lm() -> mj.LanguageModel:
    return mj.load("tiny", mesh="1x1", kv_dtype="int8")


@pytest.mark.slow
def test_perplexity_of_the_embedded_model(lm, conversations, monkeypatch):
    """Within 1 %, of answers and of all; codes of 3 bits, the control, are not."""
    found = score_through_cache(lm, conversations)
    coarse = dict(scaled_kv._LARGEST) | {KV_DTYPES["int8"]: 3.0}
    monkeypatch.setattr(lm, "kv_dtype", None)
    plain = score_through_cache(lm, conversations)
    jax.clear_caches()
    monkeypatch.setattr(scaled_kv, "_LARGEST", coarse)
    monkeypatch.setattr(lm, "kv_dtype", "int8")
    damaged = score_through_cache(lm, conversations)
    jax.clear_caches()
    for of_answers in (True, False):
        want = plain.perplexity(of_answers=of_answers)
        assert abs(found.perplexity(of_answers=of_answers) / want - 1) < ALLOWED
        assert damaged.perplexity(of_answers=of_answers) / want - 1 > ALLOWED
    assert 0 < np.abs(found.logprobs - plain.logprobs).mean() < 0.01


@pytest.mark.slow
def test_scores_through_a_plain_cache_are_those_of_logits(lm, conversations, monkeypatch):
    monkeypatch.setattr(lm, "kv_dtype", None)
    [conversation] = conversations[:1]
    assert lm.tokenizer is not None
    ids = encode(conversation, lm.tokenizer).token_ids
    logits = lm.logits([ids])[0]
    logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    want = logs[np.arange(len(ids) - 1), ids[1:]]
    got = score_through_cache(lm, [conversation])
    np.testing.assert_allclose(got.logprobs, want, atol=1e-4)
    assert got.is_answer.tolist()[-1]
    assert not got.is_answer[0]


def test_an_unknown_dtype_is_refused():
    unchecked = inspect.unwrap(LoadOptions.__post_init__)  # in tests the type is refused first
    asked = LoadOptions()
    object.__setattr__(asked, "kv_dtype", "int4")
    with pytest.raises(MixtralError, match="--kv-dtype: expected int8, fp8, got 'int4'") as caught:
        unchecked(asked)
    assert caught.value.code == USAGE
