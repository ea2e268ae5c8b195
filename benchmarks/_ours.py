"""Our model of any size with random weights, and what its passes must read and compute."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode.generate import Generation, Request, slot_bucket
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.kernels.table import KERNELS, cache_dtype, kernels_for
from mixtral_jax.model.cache import init_cache
from mixtral_jax.model.placement import LocalPlacement, Placement
from mixtral_jax.model.transformer import Mixtral, assemble, leaf_specs
from mixtral_jax.qtensor import SCHEMES, QTensor, packed_size
from mixtral_jax.quantize.makers import Recipe
from mixtral_jax.quantize.source import is_quantized
from mixtral_jax.sharding.report import find_config
from mixtral_jax.weights import slots_of, takes_slots

_BENCH = ModelConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=3584,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=32768,
    rope_theta=1e6,
    dtype="float32",
)
# `bench` is a quarter of the widths and of the layers of 8x7B: 0.79 G parameters.
OWN = {
    "bench": _BENCH,
    "small": dataclasses.replace(
        _BENCH,
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
}


def config_of(model: str, layers: int | None = None) -> ModelConfig:
    """A configuration of this table, a preset or a folder, with fewer layers if asked."""
    config = OWN.get(model) or find_config(model)
    return config if layers is None else dataclasses.replace(config, num_hidden_layers=layers)


def std_of(path: str, shape: tuple[int, ...]) -> float:
    """Of a Gaussian matrix, so that activations stay near one."""
    return 1.0 if path == "embed_tokens" else 1 / math.sqrt(shape[-1])


def here() -> LocalPlacement:
    """One device of the default platform, with the kernels that ``load`` would choose for it."""
    return LocalPlacement(kernels_for(jax.default_backend()))


def laid_out(leaf: Any) -> Any:
    """A canonical leaf as ``load`` lays it out for the kernels of ``here``."""
    is_slots = KERNELS[kernels_for(jax.default_backend())].layout == "slots"
    return slots_of(leaf, 1) if is_slots and takes_slots(leaf) else leaf


@functools.partial(jax.jit, static_argnames=("shape", "std", "dtype"))
def _draw(key: jax.Array, shape: tuple[int, ...], std: float, dtype: str) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * std).astype(dtype)


@functools.partial(jax.jit, static_argnames=("shape", "std", "scheme", "dtype"))
def _draw_codes(
    key: jax.Array, shape: tuple[int, ...], std: float, scheme: str, dtype: str
) -> QTensor:
    """Codes drawn evenly, laid out and scaled as those that ``--quantize`` makes."""
    row, num_inputs = SCHEMES[scheme], shape[-1]
    shape = (*shape[:-1], packed_size(scheme, num_inputs))
    if scheme == "fp8":
        codes, values = _draw(key, shape, 1.0, row.storage), np.ones(1)
    elif not row.is_packed:
        codes, values = jax.random.randint(key, shape, -127, 128, jnp.int8), np.arange(-127, 128)
    else:
        codes = jax.random.bits(key, shape, jnp.uint8)
        values = np.asarray(row.table or np.arange(16) - row.zero)
    groups = num_inputs // (Recipe(scheme=scheme).group or num_inputs)
    scale = std / np.sqrt((values.astype(np.float32) ** 2).mean())
    scale_dtype = jnp.bfloat16 if scheme == "int4" else jnp.float32
    scales = jnp.full((*shape[:-1], groups), scale, scale_dtype)
    return QTensor(codes, scales, scheme, jnp.dtype(dtype))


def random_model(config: ModelConfig, dtype: str, scheme: str | None = None) -> Mixtral:
    """Gaussian weights, drawn on the device leaf by leaf; experts laid out as ``load`` does.

    With a scheme the matrices of attention and experts are in codes, as ``--quantize`` makes them.
    """
    leaves = {}
    for seed, (path, spec) in enumerate(leaf_specs(config).items()):
        key, std = jax.random.key(seed), std_of(path, spec.shape)
        if len(spec.shape) == 1:
            leaves[path] = jnp.ones(spec.shape, dtype)
        elif scheme is not None and is_quantized(spec, scheme):
            leaves[path] = laid_out(_draw_codes(key, spec.shape, std, scheme, dtype))
        else:
            leaves[path] = laid_out(_draw(key, spec.shape, std, dtype))
    return assemble(config, leaves)


def random_prompts(config: ModelConfig, rows: int, length: int) -> np.ndarray:
    """Distinct tokens: equal rows would choose equal experts."""
    draw = np.random.default_rng(rows * length)
    return draw.integers(3, config.vocab_size, (rows, length)).astype(np.int32)


def generation(
    model: Mixtral, prompts: np.ndarray, steps: int, placement: Placement | None = None
) -> Generation:
    """Greedy, past any end of text."""
    asked = SamplingOptions(max_new_tokens=steps, ignore_eos=True)
    requests = [Request(prompt_ids=tuple(map(int, row)), options=asked) for row in prompts]
    return Generation(model, requests, placement=placement or here())


def tokens_of(run: Generation) -> list[list[int]]:
    """What it writes, by row."""
    rows: list[list[int]] = [[] for _ in run.requests]
    for chunk in run.chunks():
        for row, ids in zip(rows, chunk.token_ids, strict=True):
            row.extend(ids)
    return rows


def decoder(
    model: Mixtral, prompts: np.ndarray, steps: int
) -> Callable[[], tuple[float, np.ndarray]]:
    """A call that generates as ``sample`` does: seconds of writing, reads by the host included."""

    def call() -> tuple[float, np.ndarray]:
        run = generation(model, prompts, steps)
        rows = np.asarray(tokens_of(run))
        return run.progress.decode_seconds, rows

    return call


@jax.jit
def read(model: Mixtral, tokens: jax.Array) -> jax.Array:
    """Reads prompts into a cache; logits of the last position."""
    B, T = tokens.shape
    slots = slot_bucket(model.config, T)
    dtype = cache_dtype(here().kernels, None, model.embed_tokens.get_value().dtype)
    cache = init_cache(model.config, rows=B, slots=slots, dtype=dtype)
    hidden = model.hidden(tokens, cache=cache, placement=here())
    # The cache is a result here too, else the compiler would leave it out.
    logits, _ = jax.lax.optimization_barrier((model.unembed(hidden.x[:, -1], here()), hidden.cache))
    return logits


@jax.jit
def experts_hit(model: Mixtral, tokens: jax.Array) -> jax.Array:
    """Experts that some row chose, ``[L, T]`` per position: what a step of decode must read."""
    B, T = tokens.shape
    E = model.config.num_local_experts
    layers = [
        jax.nn.one_hot(routing.expert_ids, E, dtype=bool).any(1).reshape(B, T, E).any(0).sum(-1)
        for routing in model.hidden(tokens, placement=here()).routing
    ]
    return jnp.stack(layers)


def step_bytes(config: ModelConfig, hits: float, batch: int, context: float, size: int) -> float:
    """Bytes that one step must read: weights that some row needs, and the cache in use."""
    total = 0.0
    for path, spec in leaf_specs(config).items():
        if path == "embed_tokens":
            continue
        share = hits / config.num_local_experts if "expert" in spec.axes else 1.0
        total += share * math.prod(spec.shape) * size
    return total + cache_bytes(config, batch, context, size)


def cache_bytes(config: ModelConfig, batch: int, context: float, size: int) -> float:
    """Bytes of the cache in use."""
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return batch * context * kv * size


def read_bytes(model: Mixtral, hits: float) -> float:
    """Bytes of weights that one step must read, of any kind, if it hits so many experts."""
    share = hits / model.config.num_local_experts
    total = sum(x.nbytes for x in jax.tree.leaves(model)) - model.embed_tokens[...].nbytes
    experts = [layer.moe.experts for layer in model.layers]
    return total - (1 - share) * sum(x.nbytes for x in jax.tree.leaves(experts))


def prompt_flops(config: ModelConfig, length: int) -> float:
    """FLOPs of a prompt, the head at its last position."""
    per_token = 0.0
    for path, spec in leaf_specs(config).items():
        if path in ("embed_tokens", "lm_head") or len(spec.shape) == 1:
            continue
        share = config.num_experts_per_tok / config.num_local_experts
        per_token += math.prod(spec.shape) * (share if "expert" in spec.axes else 1.0)
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    head = config.vocab_size * config.hidden_size
    return 2 * (length * per_token + head) + 2 * length * attention  # causal: half of 4
