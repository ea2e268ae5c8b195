"""The numpy Mixtral gives the logits and the routing of transformers' MixtralForCausalLM."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.reference import mixtral

pytestmark = pytest.mark.parity

# transformers normalises and rotates in float32 whatever the model's dtype.
TOLERANCE = {"float32": 1e-4, "float64": 3e-5}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 16, "num_hidden_layers": 3, "rope_theta": 1e6},
    "tied, explicit head_dim": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "num_key_value_heads": 1,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "rms_norm_eps": 1e-3,
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    """A configuration, its weights, and the folder that holds both as they are published."""
    config = mixtral.small_config(**CONFIGS[request.param])
    weights = mixtral.random_weights(config, seed=len(request.param))
    folder = tmp_path_factory.mktemp("published")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return config, weights, folder


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_logits_and_routing(case, dtype, torch, transformers):
    config, weights, folder = case
    model = transformers.MixtralForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], (2, 40))
    with torch.no_grad():
        theirs = model(torch.asarray(tokens), output_router_logits=True)
    ours = mixtral.forward({k: v.astype(dtype) for k, v in weights.items()}, config, tokens)

    # Routing first: a tiny error flips an expert, and then every logit differs.
    for layer, routing in enumerate(ours.routing):
        logits = theirs.router_logits[layer].numpy()
        np.testing.assert_allclose(routing.logits, logits, atol=TOLERANCE[dtype])
        expert_ids = np.argsort(-logits, axis=-1, kind="stable")
        top_k = config["num_experts_per_tok"]
        np.testing.assert_array_equal(routing.expert_ids, expert_ids[:, :top_k])
    np.testing.assert_allclose(ours.logits, theirs.logits.numpy(), atol=TOLERANCE[dtype])


def test_the_window_matters_here(case):
    """A negative control: the reference without its window fails the comparison above."""
    config, weights, _ = case
    tokens = np.random.default_rng(1).integers(0, config["vocab_size"], (2, 40))
    with_window = mixtral.logits(weights, config, tokens)
    without = mixtral.logits(weights, config | {"sliding_window": None}, tokens)
    differs = np.abs(with_window - without).max() > 100 * TOLERANCE["float32"]
    assert differs == (config["sliding_window"] is not None)
