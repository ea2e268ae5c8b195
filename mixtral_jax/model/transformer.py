"""Mixtral: blocks of attention and sparse experts between an embedding and a head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.attention import Attention, LayerKV
from mixtral_jax.model.cache import KVCache, Window, advance
from mixtral_jax.model.moe import SparseMoE
from mixtral_jax.model.norm import RMSNorm
from mixtral_jax.model.placement import LOCAL, Placement, Routing
from mixtral_jax.model.rope import Rotation, rotation
from mixtral_jax.weights import AXES_KEY, AxisNames, Leaf, Weight, weight

RESIDUAL = ("batch", "length", "embed")


class Hidden(NamedTuple):
    """The residual stream after the last norm, and what happened on the way.

    ``router_logits`` and ``routing`` have one entry per layer over the B * T rows; ``dropped``
    and ``overflowed`` count assignments per layer. ``model/stats.py`` makes numbers of them.
    """

    x: Float[Array, "B T D"]
    cache: KVCache | None
    router_logits: tuple[Float[Array, "N E"], ...]
    routing: tuple[Routing, ...]
    dropped: Int[Array, " L"]
    overflowed: Int[Array, " L"]


class Start(NamedTuple):
    """Tokens looked up, and what every layer is told of their positions."""

    x: Float[Array, "B T D"]
    valid: Bool[Array, "B T"]
    by: Rotation
    window: Window
    cache: KVCache | None


class Block(nnx.Module):
    """Pre-norm attention, then pre-norm experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, dtype: Any):
        D, eps = config.hidden_size, config.rms_norm_eps
        attention_key, moe_key = jax.random.split(key)
        self.attention_norm = RMSNorm(D, eps=eps, dtype=dtype)
        self.attention = Attention(config, key=attention_key, dtype=dtype)
        self.moe_norm = RMSNorm(D, eps=eps, dtype=dtype)
        self.moe = SparseMoE(config, key=moe_key, dtype=dtype)

    def attend(
        self, x: Float[Array, "B T D"], start: Start, cache: LayerKV | None, placement: Placement
    ) -> tuple[Float[Array, "B T D"], LayerKV | None]:
        """The first half of the block: the residual stream with attention added, and the cache."""
        attended, cache = self.attention(
            self.attention_norm(x),
            by=start.by,
            window=start.window,
            cache=cache,
            placement=placement,
        )
        return placement.constrain(x + attended, RESIDUAL), cache


class Mixtral(nnx.Module):
    """The whole model. It knows no mesh: every call is told its Placement.

    Args:
        config: sizes.
        key: a jax.random key for the initial weights.
        dtype: of the weights; the config's unless given.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, *, dtype: Any = None):
        dtype = jnp.dtype(dtype or config.dtype)
        V, D, std = config.vocab_size, config.hidden_size, config.initializer_range
        keys = jax.random.split(key, config.num_hidden_layers + 2)
        self.config = config
        self.embed_tokens = weight(keys[0], (V, D), ("vocab", "embed"), dtype=dtype, std=std)
        self.layers = nnx.List([Block(config, key=k, dtype=dtype) for k in keys[2:]])
        self.norm = RMSNorm(D, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = weight(keys[1], (V, D), ("vocab", "embed"), dtype=dtype, std=std)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        *,
        cache: KVCache | None = None,
        segments: Int[Array, "B T"] | None = None,
        remat: bool = False,
        placement: Placement = LOCAL,
    ) -> Hidden:
        """Reads tokens into the residual stream.

        Args:
            tokens: ids; where ``valid`` is false any id will do.
            valid: false for padding at the end of a row; all true unless given.
            cache: continues each row where its cache ends; None starts at position 0.
            segments: without a cache: which of the texts packed in its row each token belongs to.
                It attends to its own text alone, whose first token is at position 0. Texts follow
                one another; the config needs a sliding window (``with_window``).
            remat: layers are computed again where gradients need them, so that a forward pass
                keeps one residual stream per layer and nothing else.
            placement: where it runs.

        Returns:
            Hidden, with the advanced cache.
        """
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        start = self.begin(tokens, valid, cache=cache, segments=segments, placement=placement)
        x, cache = start.x, start.cache

        def run(block: Block, x: jax.Array, layer: LayerKV | None):
            x, layer = block.attend(x, start, layer, placement)
            moe = block.moe(block.moe_norm(x), start.valid, placement)
            return placement.constrain(x + moe.y, RESIDUAL), layer, moe

        if remat:
            run = jax.checkpoint(run)
        keys, values, layers = [], [], []
        for i, block in enumerate(self.layers):
            layer = None if cache is None else LayerKV(cache.keys[i], cache.values[i])
            x, layer, moe = run(block, x, layer)
            layers.append(moe)
            if layer is not None:
                keys.append(layer.keys)
                values.append(layer.values)
        if cache is not None:
            cache = cache._replace(keys=tuple(keys), values=tuple(values))
        return Hidden(
            self.norm(x),
            cache,
            router_logits=tuple(moe.router_logits for moe in layers),
            routing=tuple(moe.routing for moe in layers),
            dropped=jnp.stack([moe.dropped for moe in layers]),
            overflowed=jnp.stack([moe.overflowed for moe in layers]),
        )

    def begin(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"],
        *,
        cache: KVCache | None,
        segments: Int[Array, "B T"] | None = None,
        placement: Placement,
    ) -> Start:
        """What comes before the layers; arguments as for ``hidden``."""
        # Else positions and masks are split as the rows that travel to experts, and gathered again.
        valid = placement.constrain(valid, ("batch", "length"))
        config = self.config
        if cache is not None:
            assert segments is None, "texts are packed where there is no cache"
            cache, window = advance(cache, valid)
            positions = window.positions
        elif segments is None:
            window = _uncached(valid)
            positions = window.positions
        else:
            assert config.sliding_window is not None, "packed texts need with_window"
            segments = placement.constrain(segments, ("batch", "length"))
            positions, window = _packed(segments, config.sliding_window)
        by = rotation(positions, head_dim=config.head_dim, theta=config.rope_theta)
        x = placement.constrain(placement.lookup(self.embed_tokens[...], tokens), RESIDUAL)
        return Start(x, valid, by, window, cache)

    def unembed(
        self, x: Float[Array, "*rows D"], placement: Placement = LOCAL
    ) -> Float[Array, "*rows V"]:
        """Logits of positions of the residual stream, f32."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        letters = "BT"[: x.ndim - 1]
        return placement.contract(f"{letters}D,VD->{letters}V", x, head[...], dtype=jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        *,
        placement: Placement = LOCAL,
    ) -> Float[Array, "B T V"]:
        """Logits of every position, f32, teacher-forced."""
        return self.unembed(self.hidden(tokens, valid, placement=placement).x, placement)


def _uncached(valid: Bool[Array, "B T"]) -> Window:
    B, T = valid.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    return Window(positions, positions, positions)


def _packed(segments: Int[Array, "B T"], sliding_window: int) -> tuple[Int[Array, "B T"], Window]:
    """Positions within each text, and a Window in which texts are further apart than it reaches.

    So every kernel of attention keeps packed texts apart, without another mask.
    """
    B, T = segments.shape
    places = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    is_first = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(is_first, places, 0), axis=1)
    apart = places + jnp.cumsum(is_first, axis=1, dtype=jnp.int32) * sliding_window
    return places - starts, Window(apart, places, apart)


def with_window(config: ModelConfig, length: int) -> ModelConfig:
    """The same model for rows of at most ``length`` tokens, with a sliding window that hides none.

    ``segments`` of ``Mixtral.hidden`` need one.
    """
    if config.sliding_window is not None:
        return config
    return dataclasses.replace(config, sliding_window=length)


class LeafSpec(NamedTuple):
    """What one weight must be: sizes, logical axis names, dtype."""

    shape: tuple[int, ...]
    axes: AxisNames
    dtype: Any


def abstract_model(config: ModelConfig, dtype: Any = None) -> Mixtral:
    """The module tree with shapes in place of weights; nothing is allocated."""
    build = functools.partial(Mixtral, config, dtype=dtype)
    return jax.eval_shape(build, jax.eval_shape(lambda: jax.random.key(0)))


def leaf_specs(config: ModelConfig, dtype: Any = None) -> dict[str, LeafSpec]:
    """Every weight by its path in the module tree (``layers.0.attention.q_proj``)."""
    specs = {}
    for path, param in nnx.to_flat_state(nnx.state(abstract_model(config, dtype))):
        leaf = param.get_value()
        axes = param.get_metadata()[AXES_KEY]
        specs[".".join(map(str, path))] = LeafSpec(tuple(leaf.shape), axes, leaf.dtype)
    return specs


def leaves_of(model: Mixtral) -> dict[str, Weight]:
    """Every weight by its path in the module tree: what ``assemble`` puts together."""
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): param.get_value() for path, param in state}


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, without allocating it."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config)))


def assemble(config: ModelConfig, leaves: Mapping[str, Leaf | Weight]) -> Mixtral:
    """Puts loaded weights of any kind, or their shapes, into the module tree.

    Raises:
        ValueError: if a leaf is missing, unknown or misshapen (all are listed).
    """
    graph, state = nnx.split(abstract_model(config))
    flat = {".".join(map(str, path)): (path, param) for path, param in nnx.to_flat_state(state)}
    problems = [f"{name} is missing" for name in flat.keys() - leaves.keys()]
    problems += [f"{name} is unknown" for name in leaves.keys() - flat.keys()]
    problems += [
        f"{name}: expected {flat[name][1].get_value().shape}, got {leaf.shape}"
        for name, leaf in leaves.items()
        if name in flat and tuple(leaf.shape) != tuple(flat[name][1].get_value().shape)
    ]
    if problems:
        raise ValueError("weights do not fit the model: " + "; ".join(sorted(problems)))
    filled = [(path, param.replace(leaves[name])) for name, (path, param) in flat.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))
