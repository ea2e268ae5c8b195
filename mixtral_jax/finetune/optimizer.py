"""The optimizer that the options name: optax, with schedules as transformers has them."""

from __future__ import annotations

from typing import Any

import jax
import optax

from mixtral_jax.finetune.adam8bit import is_moment, scale_by_adam_8bit, scale_sharding
from mixtral_jax.finetune.lora import Pair, is_pair
from mixtral_jax.finetune.options import TrainOptions


def make_schedule(options: TrainOptions, total_steps: int) -> optax.Schedule:
    """The learning rate of each update, counted from 0, as ``get_scheduler`` of transformers.

    The first update of a warm-up has a rate of 0 there too.
    """
    warmup = options.warmup_steps or round(options.warmup_ratio * total_steps)
    warmup = min(warmup, total_steps)
    rest, rate = max(total_steps - warmup, 1), options.learning_rate
    kind = options.lr_scheduler_type
    if kind == "constant":
        return optax.constant_schedule(rate)
    after = {
        "linear": lambda: optax.linear_schedule(rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest),
        "constant_with_warmup": lambda: optax.constant_schedule(rate),
    }[kind]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def make_optimizer(options: TrainOptions, total_steps: int) -> optax.GradientTransformation:
    """Clips, then updates; weight decay spares norms, as in transformers."""
    schedule = make_schedule(options, total_steps)
    make = {
        "adamw": _adamw,
        "adamw_8bit": _adamw_8bit,
        "adafactor": _adafactor,
        "muon": _muon,
    }[options.optim]
    parts = [make(options, schedule)]
    if options.max_grad_norm > 0:
        parts.insert(0, optax.clip_by_global_norm(options.max_grad_norm))
    return optax.chain(*parts)


def _decays(trained: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, trained)


def _adamw(options: TrainOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=options.adam_beta1,
        b2=options.adam_beta2,
        eps=options.adam_epsilon,
        weight_decay=options.weight_decay,
        mask=_decays,
    )


def _adamw_8bit(options: TrainOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_adam_8bit(options.adam_beta1, options.adam_beta2, options.adam_epsilon),
        optax.add_decayed_weights(options.weight_decay, mask=_decays),
        optax.scale_by_learning_rate(schedule),
    )


def _adafactor(options: TrainOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adafactor(
        schedule,
        multiply_by_parameter_scale=False,
        clipping_threshold=1.0,
        weight_decay_rate=options.weight_decay or None,
        weight_decay_mask=_decays,
    )


def _muon(options: TrainOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan 2024; scaled as in arXiv 2502.16982) for whole matrices of attention and
    experts, AdamW for everything else, one schedule for both."""

    def dims(trained: Any) -> Any:
        def of(path: str, leaf: Any) -> Any:
            if is_pair(leaf):
                return Pair(None, None)
            is_matrix = path.endswith("_proj") or ".experts." in path
            if not is_matrix:
                return None
            return optax.contrib.MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2)

        return {path: of(path, leaf) for path, leaf in trained.items()}

    return optax.contrib.muon(
        schedule,
        weight_decay=options.weight_decay,
        weight_decay_mask=_decays,
        adam_b1=options.adam_beta1,
        adam_b2=options.adam_beta2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dims,
    )


def state_shardings(
    optimizer: optax.GradientTransformation, state: Any, shardings: Any, otherwise: Any
) -> Any:
    """Shardings of an optimizer's state: moments lie with their weights.

    Args:
        optimizer: whose state it is.
        state: arrays or their shapes.
        shardings: NamedShardings of what trains.
        otherwise: of counts, and of what has other dims than its weight.
    """

    def of(leaf: Any, own: Any) -> Any:
        if is_moment(leaf):
            return type(leaf)(own, scale_sharding(own, leaf.codes.shape))
        return own if leaf.ndim == len(own.spec) else otherwise

    return optax.tree.map_params(
        optimizer,
        of,
        state,
        shardings,
        transform_non_params=lambda leaf: otherwise,
        is_leaf=is_moment,
    )
