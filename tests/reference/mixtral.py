"""Mixtral in numpy, written from transformers' modeling_mixtral.py and independent of the package.

Weights are a dict with the names of the published files (``model.norm.weight``) in torch's layout
``[out, in]``, a configuration is a dict with the keys of config.json. Everything is computed in the
dtype of the weights; float64 makes it the judge of float32 code.

``q [B, T, H, C]``, ``k, v [B, T, K, C]``, ``x [N, D]``: letters as in mixtral_jax/model/axes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Weights = Mapping[str, np.ndarray]
Config = Mapping[str, Any]


class Routing(NamedTuple):
    """Where a router sends its tokens."""

    logits: np.ndarray  # [N, E]
    expert_ids: np.ndarray  # [N, A], most probable first
    weights: np.ndarray  # [N, A], each row sums to one


class Forward(NamedTuple):
    """The result of a whole model."""

    logits: np.ndarray  # [B, T, V]
    routing: list[Routing]  # one per layer, N = B * T


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last dim."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Rotates pairs (i, i + C/2) of ``x [B, T, heads, C]`` by position * theta^(-2i/C)."""
    half = x.shape[-1] // 2
    # The published model computes its frequencies and angles in float32.
    frequencies = (theta ** -(np.arange(half) / half)).astype(np.float32)
    angles = (positions.astype(np.float32)[..., None] * frequencies)[:, :, None, :]
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last dim."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, window: int | None) -> np.ndarray:
    """Causal grouped-query attention; a window hides keys at or before query position - window."""
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("bthc,bshc->bhts", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    query_pos, key_pos = np.arange(q.shape[1])[:, None], np.arange(q.shape[1])[None, :]
    seen = key_pos <= query_pos
    if window is not None:
        seen &= key_pos > query_pos - window
    scores = np.where(seen, scores, -np.inf)
    return np.einsum("bhts,bshc->bthc", softmax(scores), v)


def route(logits: np.ndarray, top_k: int) -> Routing:
    """Softmax in float32 over all experts; the top k (ties to the lowest id) made to sum to one."""
    probabilities = softmax(logits.astype(np.float32))
    expert_ids = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(probabilities, expert_ids, axis=-1)
    return Routing(logits, expert_ids, weights / weights.sum(axis=-1, keepdims=True))


def expert(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w3: np.ndarray) -> np.ndarray:
    """``w2(silu(w1 x) * w3 x)``."""
    gate = x @ w1.T
    return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T


def moe(
    x: np.ndarray, weights: Weights, prefix: str, config: Config, kept: np.ndarray | None = None
) -> tuple[np.ndarray, Routing]:
    """The mixture of experts on ``x [N, D]``; ``kept [N, A]`` drops assignments where false."""
    routing = route(x @ weights[f"{prefix}.gate.weight"].T, config["num_experts_per_tok"])
    out = np.zeros_like(x)
    for row, (ids, shares) in enumerate(zip(routing.expert_ids, routing.weights, strict=True)):
        for choice, (e, share) in enumerate(zip(ids, shares, strict=True)):
            if kept is None or kept[row, choice]:
                matrices = (weights[f"{prefix}.experts.{e}.w{i}.weight"] for i in (1, 2, 3))
                out[row] += x.dtype.type(share) * expert(x[row], *matrices)
    return out, routing


def head_dim(config: Config) -> int:
    """The explicit one, else hidden / heads."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def forward(weights: Weights, config: Config, tokens: np.ndarray) -> Forward:
    """Logits of every position of ``tokens [B, T]``, teacher-forced, and the routing per layer."""
    rows, length = tokens.shape
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    eps, theta = config["rms_norm_eps"], config["rope_theta"]
    channels = head_dim(config)
    x = weights["model.embed_tokens.weight"][tokens]
    routings = []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        h = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], eps)
        q, k, v = (
            (h @ weights[f"{prefix}.self_attn.{name}_proj.weight"].T).reshape(
                rows, length, -1, channels
            )
            for name in "qkv"
        )
        mixed = attention(
            rope(q, positions, theta),
            rope(k, positions, theta),
            v,
            window=config.get("sliding_window"),
        )
        mixed = mixed.reshape(rows, length, -1)
        x = x + mixed @ weights[f"{prefix}.self_attn.o_proj.weight"].T
        h = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], eps)
        out, routing = moe(
            h.reshape(rows * length, -1), weights, f"{prefix}.block_sparse_moe", config
        )
        routings.append(routing)
        x = x + out.reshape(x.shape)
    x = rms_norm(x, weights["model.norm.weight"], eps)
    tied = config.get("tie_word_embeddings", False)
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    return Forward(x @ head.T, routings)


def logits(weights: Weights, config: Config, tokens: np.ndarray) -> np.ndarray:
    """``[B, T, V]`` of ``forward``."""
    return forward(weights, config, tokens).logits


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a published checkpoint of this configuration."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * head_dim(config)
    kv = config["num_key_value_heads"] * head_dim(config)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = (d,)
        found[f"{prefix}.self_attn.q_proj.weight"] = (q, d)
        found[f"{prefix}.self_attn.k_proj.weight"] = (kv, d)
        found[f"{prefix}.self_attn.v_proj.weight"] = (kv, d)
        found[f"{prefix}.self_attn.o_proj.weight"] = (d, q)
        found[f"{prefix}.post_attention_layernorm.weight"] = (d,)
        found[f"{prefix}.block_sparse_moe.gate.weight"] = (config["num_local_experts"], d)
        for e in range(config["num_local_experts"]):
            for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                found[f"{prefix}.block_sparse_moe.experts.{e}.{name}.weight"] = shape
    found["model.norm.weight"] = (d,)
    if not config.get("tie_word_embeddings", False):
        found["lm_head.weight"] = (v, d)
    return found


def random_weights(config: Config, seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Weights that keep activations near one, so that attention and routing really choose."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes(config).items():
        drawn = rng.standard_normal(shape)
        if len(shape) == 1:
            drawn = 1 + 0.1 * drawn
        elif name != "model.embed_tokens.weight":
            drawn = drawn * shape[1] ** -0.5
        weights[name] = drawn.astype(dtype)
    return weights


def small_config(**fields: Any) -> dict[str, Any]:
    """A config.json of moments; the reference's own, so that it leans on nothing of the package."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    } | fields
