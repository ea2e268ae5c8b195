"""The model: parameter counts, the numpy reference, placements, and every field of its config."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.config import PRESETS, ModelConfig
from mixtral_jax.convert.names import pieces
from mixtral_jax.decode.generate import Generation, Request, check_requests
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import MixtralError
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.model.transformer import (
    Mixtral,
    abstract_model,
    assemble,
    leaf_specs,
    num_parameters,
)
from tests.models import REFERENCE, forward, random_model, random_tokens
from tests.reference import mixtral as reference

F32 = 1e-4

# name -> what differs from tests.reference.mixtral.small_config
CONFIGS = {
    "8 experts, 2 chosen": {},
    "4 experts, 1 chosen": {"num_local_experts": 4, "num_experts_per_tok": 1},
    "6 experts, 3 chosen": {"num_local_experts": 6, "num_experts_per_tok": 3},
    "explicit head_dim": {"head_dim": 20},
    "tied embeddings": {"tie_word_embeddings": True},
    "window 8": {"sliding_window": 8},
}


def from_reference(fields: dict, seed: int = 0) -> tuple[dict, dict, Mixtral]:
    """The reference's config and weights, and our model of the same weights."""
    from mixtral_jax.config import config_from_dict

    raw = reference.small_config(**fields)
    weights = reference.random_weights(raw, seed)
    config = config_from_dict({"dtype": "float32", **raw})
    specs = leaf_specs(config)
    leaves = {name: np.zeros(spec.shape, np.float32) for name, spec in specs.items()}
    for piece in pieces("original", specs):
        leaf, rows = leaves[piece.chunk.leaf], weights[piece.rows.tensor]
        leaf[... if piece.chunk.expert is None else piece.chunk.expert] = rows
    return raw, weights, assemble(config, jax.tree.map(jnp.asarray, leaves))


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("mixtral-8x7b", 46_702_792_704),
        ("mixtral-8x7b-instruct", 46_702_792_704),
        ("mixtral-8x22b", 140_620_634_112),
        ("mixtral-8x22b-instruct", 140_630_071_296),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    assert num_parameters(PRESETS[preset]) == count
    leaves = jax.tree.leaves(abstract_model(PRESETS[preset]))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_equals_the_numpy_reference(fields):
    raw, weights, model = from_reference(fields)
    tokens = random_tokens(model.config, (2, 15))
    want = reference.forward(weights, raw, tokens)
    hidden = jax.jit(Mixtral.hidden)(model, tokens)
    for layer, routing in enumerate(hidden.routing):
        expert_ids = np.asarray(routing.expert_ids).reshape(want.routing[layer].expert_ids.shape)
        np.testing.assert_array_equal(expert_ids, want.routing[layer].expert_ids)
    np.testing.assert_allclose(model.unembed(hidden.x), want.logits, atol=F32)


def test_every_kernel_row_gives_the_same_logits(small_config):
    model = random_model(small_config(initializer_range=0.2))
    tokens = random_tokens(model.config, (2, 40))
    want = forward(model, tokens)
    np.testing.assert_allclose(forward(model, tokens, placement=LOCAL), want, atol=F32)


def test_padding_changes_nothing_before_it(small_config):
    model = random_model(small_config(initializer_range=0.2))
    tokens = random_tokens(model.config, (2, 12))
    valid = np.arange(12)[None, :] < np.asarray([[12], [7]])
    got = forward(model, tokens, valid)
    np.testing.assert_allclose(got[1, :7], forward(model, tokens[:, :7])[1], atol=F32)
    other = forward(model, np.where(valid, tokens, 5), valid)
    np.testing.assert_array_equal(got[1, :7], other[1, :7])


def test_a_wrong_set_of_weights_is_refused_with_every_problem(small_config):
    config = small_config()
    leaves = {name: jnp.zeros(spec.shape) for name, spec in leaf_specs(config).items()}
    leaves["extra"] = leaves.pop("lm_head")
    leaves["norm.weight"] = jnp.zeros((3,))
    with pytest.raises(ValueError, match="weights do not fit") as caught:
        assemble(config, leaves)
    for problem in ("extra is unknown", "lm_head is missing", "norm.weight: expected"):
        assert problem in str(caught.value)


def test_every_weight_gets_a_gradient(small_config):
    model = random_model(small_config(initializer_range=0.2))
    tokens = jnp.asarray(random_tokens(model.config, (2, 17)))

    def loss(model: Mixtral) -> jax.Array:
        logits = model(tokens[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()

    gradients = jax.tree.leaves(nnx.state(jax.jit(jax.grad(loss))(model)))
    assert len(gradients) == len(leaf_specs(model.config))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in gradients)


# A field that nothing reads is the fault this guards against: each other value must show.
OTHER = {
    "rope_theta": 1e3,
    "rms_norm_eps": 1e-1,
    "sliding_window": 4,
    "num_experts_per_tok": 3,
    "initializer_range": 0.4,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "vocab_size": 65,
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "num_local_experts": 4,
}
OUTSIDE_THE_MATHS = {"max_position_embeddings", "bos_token_id", "eos_token_ids"}


def test_every_field_is_guarded():
    assert set(OTHER) | OUTSIDE_THE_MATHS == {f.name for f in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("field", OTHER)
def test_every_field_changes_the_output(small_config, field):
    base = small_config(initializer_range=0.2)
    tokens = random_tokens(base, (2, 16))

    def output(config: ModelConfig) -> np.ndarray:
        return np.asarray(forward(random_model(config), tokens))

    one, other = output(base), output(dataclasses.replace(base, **{field: OTHER[field]}))
    assert one.shape != other.shape or np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("std", [0.02, 0.2])
def test_initial_weights_have_the_configured_spread(small_config, std):
    model = Mixtral(small_config(initializer_range=std, num_hidden_layers=1), jax.random.key(0))
    for name, value in nnx.to_flat_state(nnx.state(model)):
        expected = 0.0 if value[...].ndim == 1 else std
        assert np.std(value[...]) == pytest.approx(expected, rel=0.15), name


def test_positions_bound_the_request(small_config):
    request = Request(prompt_ids=(3,) * 100, options=SamplingOptions(max_new_tokens=28))
    check_requests([request], small_config(max_position_embeddings=128))
    with pytest.raises(MixtralError, match="within 127, got 100 \\+ 28"):
        check_requests([request], small_config(max_position_embeddings=127))


def test_end_of_text_ids_end_a_row(small_config):
    config = small_config(initializer_range=0.2)
    prompt = (3, 4, 5)
    first = int(forward(random_model(config), np.asarray([prompt, prompt]))[0, -1].argmax())

    def length(eos: int) -> int:
        ended = random_model(dataclasses.replace(config, eos_token_ids=(eos,)))
        request = Request(prompt_ids=prompt, options=SamplingOptions(max_new_tokens=4))
        chunks = Generation(ended, [request], placement=REFERENCE).chunks()
        return sum(len(chunk.token_ids[0]) for chunk in chunks)

    assert length(first) == 1
    assert length((first + 1) % 64) > 1
