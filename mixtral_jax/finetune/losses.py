"""What training makes small: cross-entropy, the balance of experts, router logits, preferences.

All are f32 sums and means over the rows that the caller holds; means over a whole batch are made by
dividing by its counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

AuxLoss = Literal["pooled", "per_layer"]

# Logits are made for so many positions of each row at a time: all of them, in f32, would take more
# memory than the rest of a step.
POSITIONS_AT_ONCE = 256


class TokenScores(NamedTuple):
    """Log-probability of each target, f32, and whether it was the likeliest token."""

    logprobs: Float[Array, "B T"]
    is_best: Bool[Array, "B T"]


def score_tokens(
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    unembed: Callable[[jax.Array], jax.Array],
) -> TokenScores:
    """How likely each target is, a block of positions at a time.

    Args:
        x: the residual stream after the last norm.
        targets: the token after each.
        unembed: gives f32 logits ``[B, t, V]``; it is run again for gradients.

    Returns:
        TokenScores.
    """
    T = x.shape[1]
    size = -(-T // -(-T // POSITIONS_AT_ONCE))  # of even blocks, as few as there can be

    @jax.checkpoint
    def score(block: tuple[jax.Array, jax.Array]) -> TokenScores:
        part, wanted = block
        logits = unembed(part)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
        # Not argmax: on a CPU it takes ten times as long, a twentieth of a small model's update.
        return TokenScores(logprobs, chosen >= logits.max(axis=-1))

    def blocks(array: jax.Array) -> jax.Array:
        """``[blocks, B, size, ...]``, the last block filled up with zeros."""
        padding = [(0, 0), (0, -T % size), *[(0, 0)] * (array.ndim - 2)]
        split = jnp.pad(array, padding).reshape(array.shape[0], -1, size, *array.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    if size == T:
        return score((x, targets))
    found = jax.lax.map(score, (blocks(x), blocks(targets)))
    whole = (jnp.moveaxis(part, 0, 1).reshape(len(targets), -1)[:, :T] for part in found)
    return TokenScores(*whole)


def load_balancing(
    router_logits: Sequence[Float[Array, "N E"]],
    expert_ids: Sequence[Int[Array, "N A"]],
    valid: Bool[Array, " N"],
    kind: AuxLoss,
) -> Float[Array, ""]:
    """E times the sum of each expert's load and its mean probability (Switch, arXiv 2101.03961).

    ``pooled`` is ``load_balancing_loss_func`` of transformers, over the rows of all layers at once,
    in which an expert that one layer overloads and another leaves out looks balanced;
    ``per_layer`` is the mean over layers of the same of each. Even routing gives A in both.

    Args:
        router_logits: of each layer.
        expert_ids: chosen experts of each layer.
        valid: false for padding, which counts nowhere.
        kind: see above.
    """
    logits = jnp.stack(router_logits).astype(jnp.float32)  # [L, N, E]
    ids = jnp.stack(expert_ids)  # [L, N, A]
    num_experts = logits.shape[-1]
    counted = valid / jnp.maximum(valid.sum(), 1)
    share = (jax.nn.one_hot(ids, num_experts).sum(axis=2) * counted[:, None]).sum(axis=1)
    probability = (jax.nn.softmax(logits) * counted[:, None]).sum(axis=1)  # [L, E]
    if kind == "pooled":
        share, probability = share.mean(axis=0), probability.mean(axis=0)
    return num_experts * (share * probability).sum(axis=-1).mean()


def router_z(
    router_logits: Sequence[Float[Array, "N E"]], valid: Bool[Array, " N"]
) -> Float[Array, ""]:
    """Mean squared log of the partition function of the routers (ST-MoE, arXiv 2202.08906)."""
    logits = jnp.stack(router_logits).astype(jnp.float32)
    z = jnp.square(jax.nn.logsumexp(logits, axis=-1)) * valid
    return z.sum() / jnp.maximum(valid.sum(), 1) / logits.shape[0]


class Preference(NamedTuple):
    """Of pairs: the loss, by how much the chosen answer's reward is higher, whether it is."""

    losses: Float[Array, " P"]
    margins: Float[Array, " P"]
    is_right: Bool[Array, " P"]


def dpo(
    policy: Float[Array, " B"],
    reference: Float[Array, " B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Preference:
    """Direct preference optimization (Rafailov et al. 2023, equation 7; smoothing as in cDPO).

    Args:
        policy: log-probabilities of answers, each chosen one before its rejected one.
        reference: the same under the model that training began with.
        beta: how strongly the reference holds.
        label_smoothing: how often the preference is taken to be wrong.
    """
    rewards = beta * (policy - jax.lax.stop_gradient(reference))
    margins = rewards[::2] - rewards[1::2]
    right, wrong = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    return Preference(losses, margins, margins > 0)
