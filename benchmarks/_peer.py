"""The same random weights in our model and in MixtralForCausalLM of transformers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from _ours import laid_out, std_of

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Mixtral, assemble, leaf_specs

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def draw(shape: tuple[int, ...], seed: int, std: float) -> np.ndarray:
    """Gaussian f32 numbers."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(std)


def random_leaves(config: ModelConfig) -> dict[str, np.ndarray]:
    """Every weight by its path: norms of ones, matrices that keep activations near one."""
    leaves = {}
    for seed, (path, spec) in enumerate(leaf_specs(config).items()):
        if len(spec.shape) == 1:
            leaves[path] = np.ones(spec.shape, np.float32)
        else:
            leaves[path] = draw(spec.shape, seed, std_of(path, spec.shape))
    return leaves


def our_model(config: ModelConfig, leaves: dict[str, np.ndarray], dtype: str) -> Mixtral:
    """Experts laid out as ``load`` lays them out."""

    def put(leaf: np.ndarray) -> Any:
        weight = jnp.asarray(leaf, jnp.dtype(dtype))
        return laid_out(weight)

    return assemble(config, {path: put(leaf) for path, leaf in leaves.items()})


def empty_model(config: ModelConfig) -> Any:
    """MixtralForCausalLM with fused experts, as transformers 5 keeps them, and no weights yet."""
    theirs = transformers.MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_local_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        sliding_window=config.sliding_window,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return transformers.MixtralForCausalLM(theirs)


def ready(model: Any, device: str = "cpu") -> Any:
    """With the table of rotations, which is no weight, and every core."""
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    torch.set_num_threads(os.cpu_count() or 1)
    return model.eval()


def random_on(config: ModelConfig, dtype: str, device: str) -> Any:
    """Gaussian weights drawn on the device, of the same spread as ours."""
    model = empty_model(config).to(getattr(torch, dtype)).to_empty(device=device)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if leaf.ndim == 1:
                leaf.fill_(1)
            else:
                path = "embed_tokens" if "embed_tokens" in name else name
                leaf.normal_(std=std_of(path, tuple(leaf.shape)))
    return ready(model, device)


def their_model(config: ModelConfig, leaves: dict[str, np.ndarray], dtype: str) -> Any:
    """The given weights in it."""
    model = empty_model(config)
    state = {}

    def put(name: str, leaf: np.ndarray) -> None:
        state[name] = torch.from_numpy(leaf).to(getattr(torch, dtype))

    put("model.embed_tokens.weight", leaves["embed_tokens"])
    put("lm_head.weight", leaves["lm_head"])
    put("model.norm.weight", leaves["norm.weight"])
    for i in range(config.num_hidden_layers):
        ours, name = f"layers.{i}", f"model.layers.{i}"
        put(f"{name}.input_layernorm.weight", leaves[f"{ours}.attention_norm.weight"])
        put(f"{name}.post_attention_layernorm.weight", leaves[f"{ours}.moe_norm.weight"])
        for part in ATTENTION:
            put(f"{name}.self_attn.{part}.weight", leaves[f"{ours}.attention.{part}"])
        put(f"{name}.mlp.gate.weight", leaves[f"{ours}.moe.router.weight"])
        experts = f"{ours}.moe.experts"
        gate_up = np.concatenate([leaves[f"{experts}.gate"], leaves[f"{experts}.up"]], axis=1)
        put(f"{name}.mlp.experts.gate_up_proj", gate_up)
        put(f"{name}.mlp.experts.down_proj", leaves[f"{experts}.down"])
    model.load_state_dict(state, assign=True, strict=True)
    return ready(model)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def decoder(
    model: Any, prompts: np.ndarray, steps: int, experts: str
) -> Callable[[], tuple[float, np.ndarray]]:
    """A call that reads the prompts and then writes ``steps`` tokens to each row, greedily.

    It gives the seconds of the writing, and the tokens. A loop around the model: ``generate`` adds
    checks of its own on top. The prompts are read with ``eager`` experts, whatever writes:
    ``batched_mm`` would copy the experts' weights for every token of them.
    """
    tokens = torch.from_numpy(prompts.astype(np.int64)).to(model.device)

    def call() -> tuple[float, np.ndarray]:
        with torch.inference_mode():
            cache = transformers.DynamicCache(config=model.config)
            model.set_experts_implementation("eager")
            out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            last, written = out.logits[:, -1].argmax(-1, keepdim=True), []
            model.set_experts_implementation(experts)
            _wait()
            start = time.perf_counter()
            for _ in range(steps):
                out = model(last, past_key_values=cache, use_cache=True)
                last = out.logits[:, -1].argmax(-1, keepdim=True)
                written.append(last)
            _wait()
            seconds = time.perf_counter() - start
        return seconds, torch.cat(written, 1).cpu().numpy()

    return call


def reader(model: Any, prompts: np.ndarray, experts: str) -> Callable[[], np.ndarray]:
    """A call that reads the prompts into a cache and gives the logits of the last position."""
    tokens = torch.from_numpy(prompts.astype(np.int64)).to(model.device)

    def call() -> np.ndarray:
        model.set_experts_implementation(experts)
        with torch.inference_mode():
            return (
                model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1].float().cpu().numpy()
            )

    return call
