"""The programs on the device: a window read, its logits a few places at a time, and judged.

The logits of a whole batch of windows would fill the memory ([8, 2048, 32000] in f32 are 2 GB), so
hidden states are kept and multiplied by the head in parts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.evaluate.windows import Rows
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.sharding import hosts

LENGTH_BUCKET = 16  # rows are padded to a multiple of it
ROWS_OF_LOGITS = 1024  # places of all rows together whose logits are held at a time


class Read(NamedTuple):
    """What a model makes of a batch of windows.

    ``expert_ids`` are those chosen by every layer, the first choice first, and ``expert_weights``
    what they count; ``dropped`` counts the expert assignments left out, per layer; ``is_finite``
    marks places where neither ``x`` nor what a router weighs is NaN or infinite.
    """

    x: Float[Array, "B T D"]
    expert_ids: Int[Array, "L B T A"]
    expert_weights: Float[Array, "L B T A"]
    dropped: Int[Array, " L"]
    is_finite: Bool[Array, "B T"]


class Judged(NamedTuple):
    """Of each place: the log-probability of its target, the likeliest token, and no NaN there."""

    logprobs: Float[Array, "B T"]
    best: Int[Array, "B T"]
    is_finite: Bool[Array, "B T"]


@functools.partial(jax.jit, static_argnames=("placement",))
def _read(
    model: Mixtral, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"], *, placement: Placement
) -> Read:
    hidden = model.hidden(tokens, valid, placement=placement)
    shape = (len(hidden.routing), *tokens.shape, -1)
    expert_ids = jnp.stack([layer.expert_ids for layer in hidden.routing]).reshape(shape)
    weights = jnp.stack([layer.expert_weights for layer in hidden.routing]).reshape(shape)
    is_finite = jnp.isfinite(hidden.x).all(axis=-1) & jnp.isfinite(weights).all(axis=(0, -1))
    return Read(hidden.x, expert_ids, weights, hidden.dropped, is_finite)


@functools.partial(jax.jit, static_argnames=("size", "placement"))
def _logits(
    model: Mixtral,
    x: Float[Array, "B T D"],
    start: Int[Array, ""],
    *,
    size: int,
    placement: Placement,
) -> Float[Array, "B part V"]:
    part = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
    return model.unembed(part, placement)


@jax.jit
def _judge(logits: Float[Array, "B part V"], targets: Int[Array, "B part"]) -> Judged:
    logs = jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    return Judged(logprobs, jnp.argmax(logits, axis=-1), jnp.isfinite(logits).all(axis=-1))


@jax.jit
def _kl(first: Float[Array, "B part V"], other: Float[Array, "B part V"]) -> Float[Array, "B part"]:
    """KL(first || other) in nats."""
    p, q = jax.nn.log_softmax(first), jax.nn.log_softmax(other)
    return (jnp.exp(p) * (p - q)).sum(axis=-1)


def read(lm: LanguageModel, rows: Rows) -> Read:
    """Runs a model over a batch of windows; ``x`` stays on the devices."""
    hosts.begin_step()
    return _read(lm.model, rows.tokens, rows.valid, placement=lm.placement)


def logits_in_parts(
    lm: LanguageModel, x: Float[Array, "B T D"]
) -> Iterator[Float[Array, "B part V"]]:
    """Logits of all places, a part of the length at a time."""
    size = min(_part(x.shape[0]), x.shape[1])
    for start in range(0, x.shape[1], size):
        hosts.begin_step()
        yield _logits(lm.model, x, np.int32(start), size=size, placement=lm.placement)


def _part(num_rows: int) -> int:
    """Places per row whose logits are held at a time."""
    return max(ROWS_OF_LOGITS // num_rows // LENGTH_BUCKET, 1) * LENGTH_BUCKET


def length_bucket(longest: int, num_rows: int) -> int:
    """Places that rows of so many tokens are padded to: a multiple of a part, or less than one."""
    part = _part(num_rows)
    unit = LENGTH_BUCKET if longest <= part else part
    return -(-longest // unit) * unit


def judge(logits: Float[Array, "B part V"], targets: np.ndarray) -> Judged:
    """Log-probabilities of targets, as numpy."""
    hosts.begin_step()
    return hosts.fetch(_judge(logits, targets))


def divergence(first: Float[Array, "B part V"], other: Float[Array, "B part V"]) -> np.ndarray:
    """KL(first || other) of each place, in nats, as numpy."""
    hosts.begin_step()
    # Meshes of models with other numbers of experts may count the same devices otherwise.
    return hosts.fetch(_kl(first, jax.device_put(other, first.sharding)))
