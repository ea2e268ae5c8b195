"""The trainer computes the model that is later run, says what it drops, and learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tiny import save, tokens, train
from examples.tiny.placement import PackedPlacement, take
from examples.tiny.text import documents
from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.language_model import EMBEDDED_FOLDER, load
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.model.router import route
from mixtral_jax.model.transformer import assemble
from mixtral_jax.tokenizer import Tokenizer
from tests.models import forward, random_model

LOGITS = 2e-5  # f32, the same sums in another order


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED_FOLDER)


def packer(tokenizer: Tokenizer, shapes: list[tuple[int, int]]) -> tokens.Packer:
    return tokens.Packer(
        (tokens.encode(document, tokenizer) for document in documents(9)), shapes, seed=0
    )


def test_packed_documents_do_not_see_each_other(small_config, tokenizer):
    model = random_model(small_config(vocab_size=2048, initializer_range=0.1))
    (batch,) = packer(tokenizer, [(2, 64)]).batches(1)
    placement = PackedPlacement(jnp.asarray(batch.segments), capacity_factor=4.0)

    @jax.jit
    def run(model, batch):
        placement = PackedPlacement(batch.segments, capacity_factor=4.0)
        return model(batch.tokens, batch.segments > 0, placement=placement)

    together = run(model, jax.tree.map(jnp.asarray, batch))
    assert placement.capacity_factor * 2 / 8 == 1, "room for every row: nothing is dropped"
    for row, segments in enumerate(batch.segments):
        for segment in range(1, segments.max() + 1):
            ids = batch.tokens[row][segments == segment]
            padded = np.pad(ids, (0, 64 - len(ids)))[None]
            alone = forward(model, padded)[0, : len(ids)]
            np.testing.assert_allclose(together[row][segments == segment], alone, atol=LOGITS)


def routed(num_rows: int) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    draw = np.random.default_rng(0)
    x, logits = draw.standard_normal((num_rows, 16)), draw.standard_normal((num_rows, 8))
    matrices = (draw.standard_normal(shape) for shape in ((8, 24, 16), (8, 24, 16), (8, 16, 24)))
    weights = ExpertWeights(*(jnp.asarray(m, jnp.float32) for m in matrices))
    return jnp.asarray(x, jnp.float32), jnp.asarray(logits, jnp.float32), weights


def test_experts_and_their_gradients_are_the_models():
    x, logits, weights = routed(40)
    valid = jnp.arange(40) < 33
    segments = jnp.ones((1, 40), jnp.int32)

    def loss(placement, x, logits, weights):
        y = placement.experts(x, route(logits, valid, top_k=2), weights).y
        return (y**2).sum(), y

    both = [
        jax.jit(jax.grad(lambda *args, p=p: loss(p, *args), argnums=(0, 1, 2), has_aux=True))(
            x, logits, weights
        )
        for p in (LOCAL, PackedPlacement(segments, capacity_factor=4.0))
    ]
    for want, got in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_what_finds_no_room_is_counted():
    x, logits, weights = routed(64)
    logits = logits.at[:, 3].add(2.0)  # more than its share
    routing = route(logits, jnp.ones(64, bool), top_k=2)
    placement = PackedPlacement(jnp.ones((1, 64), jnp.int32), capacity_factor=1.0)
    room = 16  # 64 rows x 2 / 8 experts
    counts = np.bincount(np.asarray(routing.expert_ids).reshape(-1), minlength=8)
    dropped = placement.experts(x, routing, weights).dropped
    assert dropped == np.maximum(counts - room, 0).sum() > 0


def test_take_and_its_gradient():
    x = jnp.arange(12.0).reshape(4, 3)
    index = jnp.array([2, 0, 4, 2])  # 4 is past the end
    inverse = jnp.array([[1, 4, 0, 4], [4, 4, 3, 4]])
    scale = jnp.arange(1.0, 5.0)[:, None]
    got, gradient = jax.value_and_grad(lambda x: (take(x, index, inverse) * scale).sum())(x)
    plain = jnp.concatenate([x, jnp.zeros((1, 3))])
    assert got == (plain[index] * scale).sum()
    want = jax.grad(lambda p: (p[index] * scale).sum())(plain)[:4]
    np.testing.assert_array_equal(gradient, want)


def test_devices_average_their_gradients(small_config, tokenizer):
    config = small_config(vocab_size=2048, num_hidden_layers=1, intermediate_size=32)
    options = train.Options(warmup_steps=1, steps=4)
    trainer = train.Trainer(config, options)
    batches = packer(tokenizer, [(2, 64)]).batches(jax.device_count())
    leaves = train.initial_weights(config, options.seed)
    gradient = jax.jit(
        jax.grad(lambda w, b: train.loss_of(w, b, config=config, options=options), has_aux=True)
    )
    alone = [gradient(leaves, batch) for batch in batches]
    want = jax.tree.map(lambda *parts: sum(parts) / len(parts), *alone)
    stacked = tokens.Batch(*(np.stack(column) for column in zip(*batches, strict=True)))
    got = jax.jit(trainer.gradients)(leaves, stacked)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_weighted_mean_of_the_scored_tokens(small_config, tokenizer):
    config = small_config(vocab_size=2048, initializer_range=0.1)
    options = train.Options(capacity_factor=4.0, balance=0.0)
    (batch,) = packer(tokenizer, [(2, 64)]).batches(1)
    leaves = train.initial_weights(config, seed=0)
    run = jax.jit(lambda w, b: train.loss_of(w, b, config=config, options=options))
    loss, measures = run(leaves, batch)
    model = assemble(config, leaves)
    total = weight = 0.0
    for row in range(2):
        for segment in range(1, batch.segments[row].max() + 1):
            (where,) = np.nonzero(batch.segments[row] == segment)
            padded = np.pad(batch.tokens[row, where], (0, 64 - len(where)))[None]
            logprobs = jax.nn.log_softmax(forward(model, padded)[0])
            for at in where[:-1]:
                (scored,) = np.nonzero((batch.positions == row * 64 + at) & (batch.weights > 0))
                for i in scored:
                    total -= batch.weights[i] * logprobs[at - where[0], batch.targets[i]]
                    weight += batch.weights[i]
    np.testing.assert_allclose(loss, total / weight, rtol=1e-4)
    np.testing.assert_allclose(measures.loads.sum(axis=1), 1, rtol=1e-5)
    even = train.Options(capacity_factor=4.0, balance=1.0)
    balanced, _ = jax.jit(lambda w, b: train.loss_of(w, b, config=config, options=even))(
        leaves, batch
    )
    assert 0.9 < balanced - loss < 8, "the balance loss is added"


def test_balance_is_one_where_even_and_all_where_one_expert_has_everything():
    even, one = jnp.full((3, 8), 1 / 8), jnp.zeros((3, 8)).at[:, 2].set(1.0)
    assert train.unbalance(even, even) == 1
    assert train.unbalance(one, one) == 8
    assert train.unbalance(one, even) == 1


def test_a_few_updates_learn_and_are_the_same_every_time(small_config, tokenizer, monkeypatch):
    monkeypatch.setattr(train, "SHAPES", ((8, 64),))
    config = small_config(vocab_size=2048, num_hidden_layers=1, intermediate_size=32)
    options = train.Options(steps=16, warmup_steps=2)

    def losses() -> list[float]:
        trainer = train.Trainer(config, options)
        return [float(trainer.step(batch).loss) for batch in train.batches(options, tokenizer)]

    first = losses()
    assert len(first) == options.steps
    assert np.mean(first[-4:]) < np.mean(first[:4]) - 0.4, first
    assert losses() == first


def test_saved_weights_are_read_back(small_config, tmp_path):
    config = small_config(vocab_size=2048)
    leaves = jax.device_get(train.initial_weights(config, seed=1))
    save.model(tmp_path, config, leaves, (EMBEDDED_FOLDER / "tokenizer.model").read_bytes())
    rounded = {name: jnp.asarray(leaf, jnp.bfloat16) for name, leaf in leaves.items()}
    rounded = {name: leaf.astype(jnp.float32) for name, leaf in rounded.items()}
    ids = [[1, 300, 301, 302]]
    want = forward(assemble(config, rounded), np.asarray(ids, np.int32))
    got = load(tmp_path, mesh="1x1", dtype="float32").logits(ids)
    np.testing.assert_allclose(got, want, atol=LOGITS)


def test_a_loss_that_is_not_finite_stops(small_config):
    zero = jnp.zeros(())
    bad = train.Measures(zero, zero, zero, jnp.ones((1, 8)))
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train.point(50, 1.0, [bad, bad._replace(loss=jnp.array(jnp.nan))])
