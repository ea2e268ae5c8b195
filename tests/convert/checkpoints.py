"""Writes small published checkpoints the plain way: dictionaries of arrays and save_file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mixtral_jax.config import ModelConfig, config_to_dict

Tensors = dict[str, np.ndarray]
DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def random_tensors(config: ModelConfig, seed: int = 0) -> Tensors:
    """The tensors of a random checkpoint, in the original layout, in the config's dtype."""
    rng = np.random.default_rng(seed)
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    Q, KV = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.post_attention_layernorm.weight": (D,),
            f"{layer}.self_attn.q_proj.weight": (Q, D),
            f"{layer}.self_attn.k_proj.weight": (KV, D),
            f"{layer}.self_attn.v_proj.weight": (KV, D),
            f"{layer}.self_attn.o_proj.weight": (D, Q),
            f"{layer}.block_sparse_moe.gate.weight": (config.num_local_experts, D),
        }
        for e in range(config.num_local_experts):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            shapes |= {
                f"{expert}.w1.weight": (F, D),
                f"{expert}.w2.weight": (D, F),
                f"{expert}.w3.weight": (F, D),
            }
    dtype = DTYPES[config.dtype]
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def same_layers(config: ModelConfig) -> Tensors:
    """As ``random_tensors``, but every layer holds the same weights: it is soon made."""
    one = random_tensors(dataclasses.replace(config, num_hidden_layers=1))
    return {
        name.replace("layers.0.", f"layers.{i}."): w
        for i in range(config.num_hidden_layers)
        for name, w in one.items()
    }


def mild_tensors(config: ModelConfig) -> Tensors:
    """Those of the seed, small enough for logits that a tolerance means something for."""
    drawn = random_tensors(config)
    return {name: w * np.float32(0.2 if w.ndim > 1 else 1) for name, w in drawn.items()}


def fused(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    """The same weights under the names of transformers 5."""
    found = {name: w for name, w in tensors.items() if ".block_sparse_moe." not in name}
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
        w1, w2, w3 = (
            np.stack(
                [tensors[f"{old}.experts.{e}.{w}.weight"] for e in range(config.num_local_experts)]
            )
            for w in ("w1", "w2", "w3")
        )
        found[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
        found[f"{new}.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        found[f"{new}.experts.down_proj"] = w2
    return found


def unfused(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The same weights under the names of transformers 5, with each expert's matrices apart."""
    matrices = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    found = {}
    for name, w in tensors.items():
        for old, new in matrices.items():
            name = re.sub(rf"(\.experts\.\d+)\.{old}\.", rf"\1.{new}.", name)  # noqa: PLW2901
        found[name.replace(".block_sparse_moe.", ".mlp.")] = w
    return found


def leaves(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Tensors:
    """The canonical leaves that a checkpoint in the original layout must give."""
    found = {
        "embed_tokens": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        found["lm_head"] = tensors["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}", f"layers.{i}"
        found[f"{new}.attention_norm.weight"] = tensors[f"{old}.input_layernorm.weight"]
        found[f"{new}.moe_norm.weight"] = tensors[f"{old}.post_attention_layernorm.weight"]
        for p in "qkvo":
            found[f"{new}.attention.{p}_proj"] = tensors[f"{old}.self_attn.{p}_proj.weight"]
        found[f"{new}.moe.router.weight"] = tensors[f"{old}.block_sparse_moe.gate.weight"]
        for w, leaf in {"w1": "gate", "w3": "up", "w2": "down"}.items():
            found[f"{new}.moe.experts.{leaf}"] = np.stack(
                [
                    tensors[f"{old}.block_sparse_moe.experts.{e}.{w}.weight"]
                    for e in range(config.num_local_experts)
                ]
            )
    return found


def write(
    folder: Path, config: ModelConfig, tensors: Mapping[str, np.ndarray], *, num_files: int = 1
) -> Path:
    """Writes a Hugging Face folder of one file, or of shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)), encoding="utf-8")
    if num_files == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for k in range(num_files):
        name = f"model-{k + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[k::num_files])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def same_bits(one: Any, other: Any) -> bool:
    """True for equal shape, dtype and bytes."""
    one, other = np.asarray(one), np.asarray(other)
    return (
        one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    )
