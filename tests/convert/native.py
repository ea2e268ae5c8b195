"""Writes Mistral's own checkpoints the plain way, from the description of the formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mixtral_jax.config import ModelConfig
from tests.convert.checkpoints import Tensors


def interleaved(w: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of two halves per head, as transformers has them, as interleaved pairs."""
    halves = w.reshape(num_heads, 2, -1, w.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(w.shape)


def attention_and_norms(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    """What both native layouts share."""
    found = {
        "tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "output.weight": tensors["lm_head.weight"],
    }
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}", f"layers.{i}"
        found[f"{new}.attention_norm.weight"] = tensors[f"{old}.input_layernorm.weight"]
        found[f"{new}.ffn_norm.weight"] = tensors[f"{old}.post_attention_layernorm.weight"]
        for p in "qkvo":
            found[f"{new}.attention.w{p}.weight"] = tensors[f"{old}.self_attn.{p}_proj.weight"]
        for p, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            name = f"{new}.attention.w{p}.weight"
            found[name] = interleaved(found[name], heads)
    return found


def per_expert(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    """The tensors of mistral-inference."""
    found = attention_and_norms(tensors, config)
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}.block_sparse_moe", f"layers.{i}.feed_forward"
        found[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
        for e in range(config.num_local_experts):
            for w in ("w1", "w2", "w3"):
                found[f"{new}.experts.{e}.{w}.weight"] = tensors[f"{old}.experts.{e}.{w}.weight"]
    return found


def stacked(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    """The tensors of the first release: experts in one tall matrix, w2 transposed."""
    found = attention_and_norms(tensors, config)
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}.block_sparse_moe", f"layers.{i}.block_sparse_moe"
        found[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
        experts = [f"{old}.experts.{e}" for e in range(config.num_local_experts)]
        found[f"{new}.w1"] = np.concatenate([tensors[f"{e}.w1.weight"] for e in experts])
        found[f"{new}.w2"] = np.concatenate([tensors[f"{e}.w2.weight"].T for e in experts])
        found[f"{new}.w3"] = np.concatenate([tensors[f"{e}.w3.weight"] for e in experts])
    return found


def params_of_mistral_inference(config: ModelConfig) -> dict[str, Any]:
    """params.json as in the archives."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "moe": {
            "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        },
    }


def params_of_first_release(config: ModelConfig) -> dict[str, Any]:
    """params.json with the keys of transformers, the window as a text."""
    window = {} if config.sliding_window is None else {"sliding_window": str(config.sliding_window)}
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        **window,
    }


def write(
    folder: Path,
    params: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    num_files: int = 1,
) -> Path:
    """Writes a native folder of one file, or of numbered files of disjoint tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    contiguous = {name: np.ascontiguousarray(w) for name, w in tensors.items()}
    if num_files == 1:
        save_file(contiguous, folder / "consolidated.safetensors")
        return folder
    for k in range(num_files):
        part = dict(list(contiguous.items())[k::num_files])
        save_file(part, folder / f"consolidated.{k:02}.safetensors")
    return folder


def write_layout(
    layout: str,
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    num_files: int = 1,
) -> Path:
    """Writes the weights of ``tensors`` (original names) in either native layout."""
    if layout == "native":
        params, found = params_of_mistral_inference(config), per_expert(tensors, config)
    else:
        params, found = params_of_first_release(config), stacked(tensors, config)
    return write(folder, params, found, num_files=num_files)
