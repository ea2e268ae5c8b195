"""One update: forward and backward over accumulated rows, then the optimizer, in one program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.finetune.lora import with_trained
from mixtral_jax.finetune.losses import (
    AuxLoss,
    TokenScores,
    dpo,
    load_balancing,
    router_z,
    score_tokens,
)
from mixtral_jax.model.stats import router_stats
from mixtral_jax.model.transformer import Hidden, Mixtral
from mixtral_jax.sharding.place import gather_weights
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.weights import Weight

REFERENCE = "reference."  # before the path of a frozen copy of what DPO began with


class TrainState(NamedTuple):
    """All that an update changes.

    Attributes:
        trained: arrays and Pairs by leaf path, f32.
        optimizer: state of optax.
        step: updates made, int32.
    """

    trained: Any
    optimizer: Any
    step: Any


class Rows(NamedTuple):
    """A ``Batch`` on the mesh, with its accumulation steps in front, or one of them.

    Rows of pairs alternate: a chosen answer, then the rejected one.
    """

    tokens: Int[Array, "*A B T"]
    targets: Int[Array, "*A B T"]
    weights: Float[Array, "*A B T"]
    segments: Int[Array, "*A B T"]

    @property
    def num_pairs(self) -> Float[Array, ""]:
        """Pairs with something to score; others fill a last batch."""
        return (self.weights.sum(axis=-1) > 0)[..., ::2].sum().astype(jnp.float32)


class Measures(NamedTuple):
    """What one batch gave, over all rows of all processes; f32 scalars unless stated.

    Attributes:
        loss: without the losses of the router. Cross-entropy in nats per scored token, or DPO's
            per pair; tokens count as ``Batch.weights`` says.
        tokens: that count anything.
        accuracy: share of tokens that were the likeliest; they count as in the loss.
        aux_loss: load balancing, before its coefficient.
        z_loss: of the router's logits, before its coefficient.
        grad_norm: before clipping; 0 in evaluation.
        learning_rate: of this update; 0 in evaluation.
        dropped: assignments left out, per layer, int32 ``[L]``.
        load: share of each layer's assignments that each expert got, ``[L, E]``.
        entropy: mean of the router's distributions, in nats, ``[L]``.
        pairs: DPO: with something to score; else 0.
        margin: DPO: by how much the chosen answers' rewards are higher; else 0.
        reward_accuracy: DPO: share of pairs in which they are; else 0.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    accuracy: Float[Array, ""]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    dropped: Int[Array, " L"]
    load: Float[Array, "L E"]
    entropy: Float[Array, " L"]
    pairs: Float[Array, ""]
    margin: Float[Array, ""]
    reward_accuracy: Float[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is static in a step; hashable.

    Attributes:
        config: with a sliding window (``with_window``).
        placement: where it runs.
        is_dpo: rows are pairs, each chosen answer before its rejected one.
        scale: of factors.
        dropout: of factors.
        dtype: that whole trained weights are used in.
        remat: see ``Mixtral.hidden``.
        aux_coef: of ``load_balancing``.
        aux_loss: its form.
        z_coef: of ``router_z``.
        beta: of DPO.
        label_smoothing: of DPO.
    """

    config: ModelConfig
    placement: MeshPlacement
    is_dpo: bool = False
    scale: float = 1.0
    dropout: float = 0.0
    dtype: Any = None
    remat: bool = True
    aux_coef: float = 0.0
    aux_loss: AuxLoss = "pooled"
    z_coef: float = 0.0
    beta: float = 0.1
    label_smoothing: float = 0.0


class _Sums(NamedTuple):
    """Of the rows of one accumulation step."""

    loss: jax.Array  # summed over tokens or pairs
    right: jax.Array
    aux_loss: jax.Array
    z_loss: jax.Array
    dropped: jax.Array
    load: jax.Array
    entropy: jax.Array
    margin: jax.Array
    reward_right: jax.Array


def _read(model: Mixtral, rows: Rows, objective: Objective) -> tuple[TokenScores, Hidden]:
    placement = objective.placement
    hidden = model.hidden(
        rows.tokens,
        rows.segments > 0,
        segments=rows.segments,
        remat=objective.remat,
        placement=placement,
    )
    unembed = functools.partial(model.unembed, placement=placement)
    return score_tokens(hidden.x, rows.targets, unembed), hidden


def _sums(
    trained: Any, frozen: Mapping[str, Weight], rows: Rows, key: Any, objective: Objective
) -> _Sums:
    """What the rows of one accumulation step give."""
    config, placement = objective.config, objective.placement
    copies = {path: w for path, w in frozen.items() if path.startswith(REFERENCE)}
    frozen = {path: w for path, w in frozen.items() if path not in copies}

    def assembled(trained: Any, key: Any) -> Mixtral:
        model = with_trained(
            config,
            frozen,
            trained,
            scale=objective.scale,
            dropout=objective.dropout,
            key=key,
            dtype=objective.dtype,
        )
        if placement.strategy.fsdp:
            model = gather_weights(model, placement.mesh, placement.strategy)
        return model

    scores, hidden = _read(assembled(trained, key), rows, objective)
    logprobs = scores.logprobs * rows.weights
    nothing = jnp.float32(0)
    loss, margin, reward_right = -logprobs.sum(), nothing, nothing
    if objective.is_dpo:
        # The model that training began with: without factors, or with a frozen copy of the first.
        base = {path.removeprefix(REFERENCE): w for path, w in copies.items()}
        before, _ = _read(assembled(base, None), rows, objective)
        found = dpo(
            logprobs.sum(axis=1),
            (before.logprobs * rows.weights).sum(axis=1),
            beta=objective.beta,
            label_smoothing=objective.label_smoothing,
        )
        is_real = (rows.weights.sum(axis=1) > 0)[::2]
        loss, margin = (found.losses * is_real).sum(), (found.margins * is_real).sum()
        reward_right = (found.is_right & is_real).sum().astype(jnp.float32)
    valid = (rows.segments > 0).reshape(-1)
    ids = [routing.expert_ids for routing in hidden.routing]
    stats = router_stats(hidden)
    return _Sums(
        loss=loss,
        right=(scores.is_best * rows.weights).sum(),
        aux_loss=load_balancing(hidden.router_logits, ids, valid, objective.aux_loss),
        z_loss=router_z(hidden.router_logits, valid),
        dropped=hidden.dropped,
        load=stats.load / jnp.maximum(stats.load.sum(axis=1, keepdims=True), 1),
        entropy=stats.entropy,
        margin=margin,
        reward_right=reward_right,
    )


def _or_one(count: jax.Array) -> jax.Array:
    """What to divide by: of nothing, 1."""
    return jnp.where(count > 0, count, 1.0)


def _whole(sums: _Sums, batch: Rows, is_dpo: bool) -> Measures:
    """Means over the batch, from sums ``[A, ...]`` over accumulation steps."""
    counted = _or_one(batch.weights.sum())
    pairs = jnp.maximum(batch.num_pairs, 1)
    zero = jnp.float32(0)
    return Measures(
        loss=sums.loss.sum() / (pairs if is_dpo else counted),
        tokens=(batch.weights > 0).sum().astype(jnp.float32),
        accuracy=sums.right.sum() / counted,
        aux_loss=sums.aux_loss.mean(),
        z_loss=sums.z_loss.mean(),
        grad_norm=zero,
        learning_rate=zero,
        dropped=sums.dropped.sum(axis=0),
        load=sums.load.mean(axis=0),
        entropy=sums.entropy.mean(axis=0),
        pairs=batch.num_pairs if is_dpo else zero,
        margin=sums.margin.sum() / pairs,
        reward_accuracy=sums.reward_right.sum() / pairs,
    )


@functools.partial(jax.jit, static_argnames=("objective",))
def evaluate(
    trained: Any, frozen: Mapping[str, Weight], batch: Rows, *, objective: Objective
) -> Measures:
    """What a batch gives, without an update.

    Args:
        trained: of the TrainState.
        frozen: weights by path.
        batch: arrays ``[A, B, T]``.
        objective: static.
    """

    def body(carry: None, rows: Rows) -> tuple[None, _Sums]:
        return carry, _sums(trained, frozen, rows, None, objective)

    _, sums = jax.lax.scan(body, None, batch)
    return _whole(sums, batch, objective.is_dpo)


@functools.partial(
    jax.jit,
    static_argnames=("objective", "optimizer", "schedule"),
    donate_argnames=("state",),
)
def update(
    state: TrainState,
    frozen: Mapping[str, Weight],
    batch: Rows,
    key: jax.Array,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> tuple[TrainState, Measures]:
    """One update of the trained weights.

    The loss is the mean over all scored tokens (or pairs) of the batch, however they are spread
    over accumulation steps, rows and devices; losses of the router are means over accumulation
    steps.

    Args:
        state: donated.
        frozen: weights by path; no gradient of theirs is made.
        batch: arrays ``[A, B, T]``.
        key: random, of the whole run; the step is folded into it.
        objective: static.
        optimizer: static.
        schedule: the optimizer's learning rate, for the measures.

    Returns:
        The new state and the measures.
    """
    num_steps = batch.tokens.shape[0]
    count = batch.num_pairs if objective.is_dpo else batch.weights.sum()
    count = _or_one(count)
    key = jax.random.fold_in(key, state.step)

    def loss_of(trained: Any, rows: Rows, key: Any) -> tuple[jax.Array, _Sums]:
        sums = _sums(trained, frozen, rows, key, objective)
        router = objective.aux_coef * sums.aux_loss + objective.z_coef * sums.z_loss
        return sums.loss / count + router / num_steps, sums

    def body(total: Any, one: tuple[Rows, jax.Array]) -> tuple[Any, _Sums]:
        rows, i = one
        gradient, sums = jax.grad(loss_of, has_aux=True)(
            state.trained, rows, jax.random.fold_in(key, i)
        )
        return jax.tree.map(jnp.add, total, gradient), sums

    if num_steps == 1:
        only = jax.tree.map(lambda x: x[0], batch)
        gradients, sums = jax.grad(loss_of, has_aux=True)(
            state.trained, only, jax.random.fold_in(key, 0)
        )
        sums = jax.tree.map(lambda x: x[None], sums)
    else:
        zeros = jax.tree.map(jnp.zeros_like, state.trained)
        gradients, sums = jax.lax.scan(body, zeros, (batch, jnp.arange(num_steps)))
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    measures = _whole(sums, batch, objective.is_dpo)._replace(
        grad_norm=optax.tree.norm(gradients),
        learning_rate=jnp.asarray(schedule(state.step), jnp.float32),
    )
    return TrainState(trained, optimizer_state, state.step + 1), measures
