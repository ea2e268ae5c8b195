"""The numpy Mixtral against laws that need no other implementation."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference import mixtral

# float64 throughout, but RoPE angles and router weights are float32 by definition.
TOLERANCE = 1e-12
ANGLE_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model():
    config = mixtral.small_config()
    return config, mixtral.random_weights(config, seed=0, dtype=np.float64)


def tokens_of(config, shape=(2, 12), seed=1):
    return np.random.default_rng(seed).integers(0, config["vocab_size"], shape)


@pytest.mark.parametrize("changed", [1, 5, 11])
def test_a_later_token_does_not_change_earlier_logits(model, changed):
    config, weights = model
    tokens = tokens_of(config)
    other = tokens.copy()
    other[0, changed] = (other[0, changed] + 1) % config["vocab_size"]
    before, after = (mixtral.logits(weights, config, t) for t in (tokens, other))
    np.testing.assert_allclose(after[0, :changed], before[0, :changed], atol=TOLERANCE)
    np.testing.assert_allclose(after[1], before[1], atol=TOLERANCE)
    assert np.abs(after[0, changed:] - before[0, changed:]).max(axis=-1).min() > 1e-4


def test_window_hides_what_is_older(model):
    # One layer reaches `window` positions, itself included; so do two layers, less one, twice.
    config, weights = model
    window, layers = 3, config["num_hidden_layers"]
    tokens = tokens_of(config)
    other = tokens.copy()
    other[:, 0] = (other[:, 0] + 1) % config["vocab_size"]
    reach = layers * (window - 1)
    windowed = config | {"sliding_window": window}
    change = np.abs(
        mixtral.logits(weights, windowed, tokens) - mixtral.logits(weights, windowed, other)
    ).max(axis=(0, 2))
    assert change[reach] > 1e-6
    assert change[reach + 1 :].max() < TOLERANCE
    full = np.abs(mixtral.logits(weights, config, tokens) - mixtral.logits(weights, config, other))
    assert full[:, -1].max() > 1e-6


def test_rope_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 8))

    def score(query_position, key_position):
        turned = [
            mixtral.rope(x, np.array([[at]]), 1e4)
            for x, at in ((q, query_position), (k, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=ANGLE_TOLERANCE)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_rope_by_hand():
    # C = 4, theta = 100: frequencies 1 and 1/10; pairs (0, 2) and (1, 3).
    x = np.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = mixtral.rope(x, np.array([[2]]), 100.0).ravel()
    expected = [np.cos(2.0), np.cos(0.2), np.sin(2.0), np.sin(0.2)]
    np.testing.assert_allclose(turned, expected, atol=ANGLE_TOLERANCE)


def test_rms_norm_by_hand():
    normed = mixtral.rms_norm(np.array([3.0, 4.0]), np.array([1.0, 2.0]), 0.0)
    np.testing.assert_allclose(normed, [3 / 12.5**0.5, 8 / 12.5**0.5], atol=TOLERANCE)


def test_router_by_hand():
    # Logits ln 1, ln 4, ln 3, ln 4: the tie goes to the lower id and each takes a half.
    routing = mixtral.route(np.log([[1.0, 4.0, 3.0, 4.0]]), 2)
    assert routing.expert_ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(routing.weights, [[0.5, 0.5]], atol=1e-6)
    # Three of them: 4 : 4 : 3.
    routing = mixtral.route(np.log([[1.0, 4.0, 3.0, 4.0]]), 3)
    assert routing.expert_ids.tolist() == [[1, 3, 2]]
    np.testing.assert_allclose(routing.weights, [[4 / 11, 4 / 11, 3 / 11]], atol=1e-6)


def test_router_weights_sum_to_one_and_ids_differ(model):
    config, weights = model
    for routing in mixtral.forward(weights, config, tokens_of(config)).routing:
        np.testing.assert_allclose(routing.weights.sum(axis=-1), 1, atol=1e-6)
        assert all(len(set(row)) == config["num_experts_per_tok"] for row in routing.expert_ids)
        assert len(np.unique(routing.expert_ids)) > 1


def test_expert_by_hand():
    # silu(1) * 3 = 2.19317...; then times 2.
    one = np.ones((1, 1))
    out = mixtral.expert(np.array([1.0]), one, 2 * one, 3 * one)
    assert out[0] == pytest.approx(6 / (1 + np.exp(-1.0)), abs=TOLERANCE)


def test_attention_by_hand():
    # Equal scores: the mean of the values seen. Two query heads share one key/value head.
    q, k = np.zeros((1, 3, 2, 2)), np.zeros((1, 3, 1, 2))
    v = np.array([[1.0, 0.0], [3.0, 2.0], [8.0, 4.0]]).reshape(1, 3, 1, 2)
    full = mixtral.attention(q, k, v, window=None)
    np.testing.assert_allclose(full[0, :, 0], [[1, 0], [2, 1], [4, 2]], atol=TOLERANCE)
    np.testing.assert_allclose(full[0, :, 1], full[0, :, 0], atol=TOLERANCE)
    two = mixtral.attention(q, k, v, window=2)
    np.testing.assert_allclose(two[0, :, 0], [[1, 0], [2, 1], [5.5, 3]], atol=TOLERANCE)


def test_query_heads_share_key_heads_in_groups():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 4, heads, 2)) for heads in (4, 2, 2))
    whole = mixtral.attention(q, k, v, window=None)
    for head in range(4):
        shared = slice(head // 2, head // 2 + 1)
        alone = mixtral.attention(
            q[:, :, head : head + 1], k[:, :, shared], v[:, :, shared], window=None
        )
        np.testing.assert_allclose(whole[:, :, head], alone[:, :, 0], atol=TOLERANCE)


def test_all_experts_with_equal_weights_are_one_dense_expert(model):
    config, weights = model
    weights = dict(weights)
    prefix = "model.layers.0.block_sparse_moe"
    for e in range(config["num_local_experts"]):
        for name in ("w1", "w2", "w3"):
            weights[f"{prefix}.experts.{e}.{name}.weight"] = weights[
                f"{prefix}.experts.0.{name}.weight"
            ]
    x = np.random.default_rng(3).standard_normal((5, config["hidden_size"]))
    out, _ = mixtral.moe(x, weights, prefix, config)
    dense = mixtral.expert(x, *(weights[f"{prefix}.experts.0.w{i}.weight"] for i in (1, 2, 3)))
    np.testing.assert_allclose(out, dense, atol=1e-6)


def test_dropped_assignment_is_missing_from_the_sum(model):
    config, weights = model
    prefix = "model.layers.0.block_sparse_moe"
    x = np.random.default_rng(3).standard_normal((5, config["hidden_size"]))
    kept = np.ones((5, 2), bool)
    kept[2, 1] = False
    whole, routing = mixtral.moe(x, weights, prefix, config)
    part, _ = mixtral.moe(x, weights, prefix, config, kept)
    e = routing.expert_ids[2, 1]
    matrices = (weights[f"{prefix}.experts.{e}.w{i}.weight"] for i in (1, 2, 3))
    lost = routing.weights[2, 1] * mixtral.expert(x[2], *matrices)
    np.testing.assert_allclose(whole[2] - part[2], lost, atol=1e-9)
    np.testing.assert_allclose(np.delete(whole, 2, 0), np.delete(part, 2, 0), atol=TOLERANCE)


def test_number_of_published_tensors():
    config = mixtral.small_config(num_hidden_layers=32)
    assert len(mixtral.shapes(config)) == 995
    assert len(mixtral.shapes(mixtral.small_config(num_hidden_layers=56))) == 1739
