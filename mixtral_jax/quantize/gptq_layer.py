"""Calibration activations through one layer, whose matrices are quantized as they are reached.

The order is that of the model, so that each matrix is fitted to inputs that the quantized matrices
before it make: q, k and v; o; then expert by expert gate and up, and down. Computed in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.names import Chunk
from mixtral_jax.kernels.contract import contract
from mixtral_jax.kernels.experts import gated
from mixtral_jax.model.cache import Window
from mixtral_jax.model.placement import LOCAL, Routing
from mixtral_jax.model.rope import rotation
from mixtral_jax.model.router import route
from mixtral_jax.model.transformer import Block, assemble, leaf_specs
from mixtral_jax.quantize.gptq import add_hessian
from mixtral_jax.quantize.gptq_matrices import Matrices

# Tokens in one product; the last is filled up, so that few shapes are compiled.
TOKENS = 2048


class Batch(NamedTuple):
    """Windows of like length, filled up with tokens that are not valid; arrays of the host."""

    ids: np.ndarray  # int32 [B, T]
    valid: np.ndarray  # bool [B, T]


def batches_of(windows: list[np.ndarray], length: int) -> list[Batch]:
    """Windows by length, each batch padded to a power of two, or to ``length``."""
    by_length: dict[int, list[np.ndarray]] = {}
    for window in windows:
        padded = min(max(length, len(window)), max(16, 1 << (len(window) - 1).bit_length()))
        by_length.setdefault(padded, []).append(window)
    found = []
    for padded, alike in sorted(by_length.items()):
        size = min(len(alike), max(1, TOKENS // padded))
        for start in range(0, len(alike), size):
            ids = np.zeros((size, padded), np.int32)
            lengths = np.zeros(size, np.int32)
            for row, window in enumerate(alike[start : start + size]):
                ids[row, : len(window)], lengths[row] = window, len(window)
            found.append(Batch(ids, np.arange(padded) < lengths[:, None]))
    return found


class LayerInput(NamedTuple):
    """What a layer needs beside its matrices."""

    norms: Mapping[str, np.ndarray]  # attention_norm.weight and moe_norm.weight
    router: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPass:
    """One layer's pass over the calibration text.

    Attributes:
        layer: which.
        config: the model's.
        batches: the text.
        others: norms and router.
        matrices: of attention and experts.
        all_tokens: every expert's Hessian is of all tokens.
    """

    layer: int
    config: ModelConfig
    batches: list[Batch]
    others: LayerInput
    matrices: Matrices
    all_tokens: bool
    say: Callable[[str], None] = lambda line: None

    @property
    def threshold(self) -> int:
        """Tokens that an expert needs for a Hessian of its own: inputs of its widest matrix."""
        return max(self.config.hidden_size, self.config.intermediate_size)

    def run(self, hidden: list[np.ndarray]) -> tuple[int, ...]:
        """Takes the residual stream through the layer, in place.

        Args:
            hidden: f32 ``[B, T, D]`` for each batch.

        Returns:
            Tokens that the router sent to each expert.
        """
        self._attend(hidden)
        valid = [batch.valid for batch in self.batches]
        pairs = list(zip(hidden, valid, strict=True))
        rows = np.concatenate([self._normed("moe_norm", x)[mask] for x, mask in pairs])
        ids, shares = self._routed(rows)
        total, counts = np.zeros_like(rows), []
        for expert in range(self.config.num_local_experts):
            is_chosen = ids == expert
            chosen = np.flatnonzero(is_chosen.any(axis=1))
            counts.append(len(chosen))
            self.say(f"layer {self.layer}, expert {expert}")
            weight = (shares * is_chosen).sum(axis=1)[chosen]
            self._expert(expert, rows, chosen, weight, total)
        start = 0
        for x, mask in pairs:
            stop = start + int(mask.sum())
            x[mask] += total[start:stop]
            start = stop
        return tuple(counts)

    def _path(self, name: str) -> str:
        return f"layers.{self.layer}.{name}"

    def _normed(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = jnp.asarray(self.others.norms[name])
        return np.asarray(_norm(weight, x, name=name, config=self.config))

    def _attend(self, hidden: list[np.ndarray]) -> None:
        self.say(f"layer {self.layer}, attention")

        def read_by_qkv() -> jax.Array:
            rows = (self._normed("attention_norm", x)[batch.valid] for x, batch in pairs)
            return _sum(rows, self.config.hidden_size)

        pairs = list(zip(hidden, self.batches, strict=True))
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (
            self.matrices.matrix(Chunk(self._path(f"attention.{name}"), None), read_by_qkv)
            for name in names
        )
        norm = jnp.asarray(self.others.norms["attention_norm"])
        mixed = [
            np.asarray(_mix(norm, q, k, v, x, batch.valid, config=self.config))
            for x, batch in pairs
        ]

        def read_by_o() -> jax.Array:
            rows = (m[batch.valid] for m, batch in zip(mixed, self.batches, strict=True))
            return _sum(rows, mixed[0].shape[-1])

        o = self.matrices.matrix(Chunk(self._path("attention.o_proj"), None), read_by_o)
        for x, m in zip(hidden, mixed, strict=True):
            np.add(x, np.asarray(_project(m, o)), out=x)

    def _routed(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        router, top_k = jnp.asarray(self.others.router), self.config.num_experts_per_tok
        found = [
            (np.asarray(part.expert_ids)[:count], np.asarray(part.expert_weights)[:count])
            for block, count in _blocks(rows)
            for part in [_route(block, router, top_k=top_k)]
        ]
        ids, shares = zip(*found, strict=True)
        return np.concatenate(ids), np.concatenate(shares)

    def _expert(
        self,
        expert: int,
        rows: np.ndarray,
        chosen: np.ndarray,
        weight: np.ndarray,
        total: np.ndarray,
    ) -> None:
        few = self.all_tokens or len(chosen) < self.threshold
        seen = np.arange(len(rows)) if few else chosen

        def matrix(name: str, hessian: Callable[[], jax.Array]) -> jax.Array:
            return self.matrices.matrix(Chunk(self._path(f"moe.experts.{name}"), expert), hessian)

        def read_by_gate_and_up() -> jax.Array:
            return _sum(_parts(rows, seen), self.config.hidden_size)

        gate, up = (matrix(name, read_by_gate_and_up) for name in ("gate", "up"))

        def read_by_down() -> jax.Array:
            blocks = _blocks_of(_parts(rows, seen))
            hidden = (np.asarray(_gated(block, gate, up))[:count] for block, count in blocks)
            return _sum(hidden, self.config.intermediate_size)

        down = matrix("down", read_by_down)
        for start in range(0, len(chosen), TOKENS):
            here = chosen[start : start + TOKENS]
            block = _filled(rows[here])
            out = np.asarray(_project(_gated(block, gate, up), down))[: len(here)]
            total[here] += weight[start : start + TOKENS, None] * out


def _parts(rows: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(chosen), TOKENS):
        yield rows[chosen[start : start + TOKENS]]


def _filled(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, TOKENS - len(rows)), (0, 0)))


def _blocks(rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Rows in blocks of ``TOKENS``, with how many of each are rows."""
    for start in range(0, len(rows), TOKENS):
        part = rows[start : start + TOKENS]
        yield _filled(part), len(part)


def _blocks_of(parts: Iterator[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    for part in parts:
        yield from _blocks(part)


def _sum(parts: Iterator[np.ndarray], size: int) -> jax.Array:
    """2 X X^T over parts of any length."""
    total = jnp.zeros((size, size), jnp.float32)
    for block, count in _blocks_of(parts):
        total = _add(total, block, (np.arange(TOKENS) < count).astype(np.float32))
    return total


_add = jax.jit(add_hessian, donate_argnums=0)


def _block(config: ModelConfig, leaves: Mapping[str, jax.Array]) -> Block:
    """One layer of the model with some of its weights; the others are shapes."""
    one = dataclasses.replace(config, num_hidden_layers=1)
    shapes = {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        for path, spec in leaf_specs(one, "float32").items()
    }
    given = {f"layers.0.{path}": leaf for path, leaf in leaves.items()}
    return assemble(one, shapes | given).layers[0]


@functools.partial(jax.jit, static_argnames=("name", "config"))
def _norm(
    weight: Float[Array, " D"], x: Float[Array, "B T D"], *, name: str, config: ModelConfig
) -> Float[Array, "B T D"]:
    block = _block(config, {f"{name}.weight": weight})
    return getattr(block, name)(x)


@functools.partial(jax.jit, static_argnames=("config",))
def _mix(
    norm: Float[Array, " D"],
    q: Float[Array, "HC D"],
    k: Float[Array, "KC D"],
    v: Float[Array, "KC D"],
    x: Float[Array, "B T D"],
    valid: Bool[Array, "B T"],
    *,
    config: ModelConfig,
) -> Float[Array, "B T HC"]:
    """What o reads. Padding follows the tokens of its window, so no token attends to it."""
    projections = {"attention.q_proj": q, "attention.k_proj": k, "attention.v_proj": v}
    block = _block(config, {"attention_norm.weight": norm, **projections})
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), valid.shape)
    by = rotation(positions, head_dim=config.head_dim, theta=config.rope_theta)
    window = Window(positions, positions, positions)
    normed = block.attention_norm(x)
    return block.attention.mix(normed, by=by, window=window, cache=None, placement=LOCAL)[0]


@functools.partial(jax.jit, static_argnames=("top_k",))
def _route(rows: Float[Array, "N D"], router: Float[Array, "E D"], *, top_k: int) -> Routing:
    logits = contract("ND,ED->NE", rows, router)
    return route(logits, jnp.ones(rows.shape[0], bool), top_k=top_k)


@jax.jit
def _gated(
    x: Float[Array, "N D"], gate: Float[Array, "F D"], up: Float[Array, "F D"]
) -> Float[Array, "N F"]:
    return gated(x, gate, up)


@jax.jit
def _project(x: Float[Array, "*rows I"], w: Float[Array, "O I"]) -> Float[Array, "*rows O"]:
    letters = "BT"[: x.ndim - 1]
    return contract(f"{letters}I,OI->{letters}O", x, w)


def embedded(table: np.ndarray, batches: list[Batch]) -> list[np.ndarray]:
    """The residual stream before the first layer, f32 for each batch."""
    return [table[batch.ids].astype(np.float32) for batch in batches]
