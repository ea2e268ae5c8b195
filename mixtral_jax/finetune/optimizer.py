"""The optimizer that the options name: optax, with schedules as transformers has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from mixtral_jax.finetune.adam8bit import is_moment, scale_by_adam_8bit, scale_sharding
from mixtral_jax.finetune.lora import Pair, is_pair
from mixtral_jax.finetune.options import TrainOptions


def make_schedule(options: TrainOptions, total_steps: int) -> optax.Schedule:
    """The learning rate of each update, counted from 0, as ``get_scheduler`` of transformers.

    The first update of a warm-up has a rate of 0 there too. Where warm-up and decay take more than
    all steps, the decay is what is left.
    """
    warmup = options.warmup_steps or math.ceil(options.warmup_ratio * total_steps)
    warmup = min(warmup, total_steps)
    rest, rate = max(total_steps - warmup, 1), options.learning_rate
    kind = options.lr_scheduler_type
    if kind == "constant":
        return optax.constant_schedule(rate)
    after = {
        "linear": lambda: optax.linear_schedule(rate, 0.0, rest),
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest),
        "constant_with_warmup": lambda: optax.constant_schedule(rate),
        "warmup_stable_decay": lambda: _stable(rate, rest, options.num_decay_steps or 0),
    }[kind]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def _stable(rate: float, steps: int, decay: int) -> optax.Schedule:
    """Constant, then linear to 0 in the last ``decay`` of so many steps."""
    decay = min(decay, steps)
    return optax.linear_schedule(rate, 0.0, decay, transition_begin=steps - decay)


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


def _decayed(
    update: optax.GradientTransformation, options: TrainOptions, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """An optimizer without weight decay, and that of AdamW beside it."""
    decay = options.weight_decay
    if not decay:
        return update
    after = optax.add_decayed_weights(lambda step: -decay * schedule(step), mask=_decays)
    return optax.chain(update, after)


def _adafactor(options: TrainOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    found = optax.adafactor(schedule, multiply_by_parameter_scale=False, clipping_threshold=1.0)
    return _decayed(found, options, schedule)


def _muon(options: TrainOptions, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan 2024; scaled as in arXiv 2502.16982) for whole matrices of attention and
    experts, AdamW for everything else, one schedule for both, Nesterov's momentum in both."""

    def dims(trained: Any) -> Any:
        def of(path: str, leaf: Any) -> Any:
            if is_pair(leaf):
                return Pair(None, None)
            is_matrix = path.endswith("_proj") or ".experts." in path
            if not is_matrix:
                return None
            return optax.contrib.MuonDimensionNumbers(leaf.ndim - 1, leaf.ndim - 2)

        return {path: of(path, leaf) for path, leaf in trained.items()}

    found = optax.contrib.muon(
        schedule,
        eps=options.adam_epsilon,
        adam_b1=options.adam_beta1,
        adam_b2=options.adam_beta2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dims,
    )
    return _decayed(found, options, schedule)


def state_shardings(state: Any, trained: Mapping[str, Any], otherwise: Any) -> Any:
    """Shardings of an optimizer's state: moments lie with their weights.

    Args:
        state: arrays or their shapes.
        trained: what trains: ShapeDtypeStructs with shardings, by path.
        otherwise: of counts, and of what has another shape than its weight.
    """

    def of(keys: tuple[Any, ...], leaf: Any) -> Any:
        own = _weight_of(keys, trained)
        if is_moment(leaf):
            return type(leaf)(own.sharding, scale_sharding(own.sharding, leaf.codes.shape))
        return own.sharding if own is not None and own.shape == leaf.shape else otherwise

    return jax.tree_util.tree_map_with_path(of, state, is_leaf=is_moment)


def _weight_of(keys: tuple[Any, ...], trained: Mapping[str, Any]) -> Any:
    """What a part of a state belongs to, by the way to it; None if it is no weight's."""
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in keys]
    for i, name in enumerate(names):
        if name in trained:
            found = trained[name]
            return getattr(found, names[i + 1]) if is_pair(found) else found
    return None
