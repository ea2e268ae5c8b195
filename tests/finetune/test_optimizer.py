"""Optimizers: their decay, their schedules, and every one of them in the trainer."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.finetune.optimizer import make_optimizer, make_schedule
from mixtral_jax.finetune.options import Optimizer, TrainOptions
from mixtral_jax.finetune.trained import abstract_state
from mixtral_jax.finetune.trainer import Trainer
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from tests.finetune.batches import batch_of
from tests.finetune.test_trainer import FULL, LENGTH, LORA, on_mesh, texts

OPTIMIZERS = get_args(Optimizer)
WEIGHTS = {"layers.0.attention.q_proj": (8, 8), "embed_tokens": (8, 8), "norm.weight": (8,)}


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("rate", [1e-3, 1e-5])
def test_decay_is_a_share_of_the_learning_rate_and_spares_norms(optim, rate):
    """As AdamW and transformers' Adafactor: p -= rate * decay * p, whatever the gradient."""
    options = TrainOptions(
        optim=optim, weight_decay=0.1, learning_rate=rate, lr_scheduler_type="constant"
    )
    trained = {name: jnp.ones(shape) for name, shape in WEIGHTS.items()}
    optimizer = make_optimizer(options, 10)
    gradient = jax.tree.map(jnp.zeros_like, trained)
    updates: Any = optimizer.update(gradient, optimizer.init(trained), trained)[0]
    for name, update in updates.items():
        wanted = 0 if name == "norm.weight" else -rate * 0.1
        np.testing.assert_allclose(update, wanted, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "muon"])
def test_epsilon_counts(optim):
    options = TrainOptions(
        optim=optim, learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0
    )
    trained = {"embed_tokens": jnp.ones((8, 8))}
    gradient = {"embed_tokens": jnp.full((8, 8), 1e-3)}

    def size(epsilon: float) -> float:
        optimizer = make_optimizer(dataclasses.replace(options, adam_epsilon=epsilon), 10)
        updates: Any = optimizer.update(gradient, optimizer.init(trained), trained)[0]
        return float(jnp.abs(updates["embed_tokens"]).max())

    assert size(1.0) < 0.01 * size(1e-8)


@pytest.mark.parametrize(("ratio", "total", "steps"), [(0.03, 40, 2), (0.1, 14, 2), (0.5, 10, 5)])
def test_a_warm_up_is_rounded_up_as_in_transformers(ratio, total, steps):
    options = TrainOptions(warmup_ratio=ratio, learning_rate=1.0)
    schedule = make_schedule(options, total)
    rates = [float(np.asarray(schedule(step))) for step in range(total)]
    assert rates.index(max(rates)) == steps
    assert max(rates) == 1.0


def test_warmup_stable_decay_rises_stays_and_falls_to_zero():
    """As ``get_wsd_schedule`` of transformers with linear warm-up and decay."""
    options = TrainOptions(
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=2,
        num_decay_steps=4,
        learning_rate=1.0,
    )
    schedule = make_schedule(options, 10)
    rates = [float(np.asarray(schedule(step))) for step in range(11)]
    assert rates == [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    short = make_schedule(options, 5)  # no room for all of the decay: what the warm-up leaves
    rates = [float(np.asarray(short(step))) for step in range(6)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 2 / 3, 1 / 3, 0], rtol=1e-6)
    cold = make_schedule(dataclasses.replace(options, warmup_steps=0, num_decay_steps=2), 4)
    assert [float(np.asarray(cold(step))) for step in range(5)] == [1, 1, 1, 0.5, 0]


CASES = [f"{optim} {how}" for optim in OPTIMIZERS for how in ("lora", "fsdp")]


def options_of(case: str) -> TrainOptions:
    optim, how = case.split()
    options = dataclasses.replace(FULL if how == "fsdp" else LORA, fsdp=how == "fsdp")
    return dataclasses.replace(options, optim=optim, weight_decay=0.1, learning_rate=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_moments_lie_with_their_weights(small_config, case):
    """Of factored ones only what has the shape of its weight."""
    config, options = small_config(num_hidden_layers=1), options_of(case)
    strategy = Strategy(fsdp=options.fsdp)
    placement = MeshPlacement(MeshSpec.parse("2x4").build(), strategy=strategy)
    state = abstract_state(config, options, make_optimizer(options, 5), placement)
    found = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.size > 1]
    own = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    assert sum(leaf.size for leaf in found) >= own / 2
    shared = [leaf for leaf in found if not leaf.sharding.is_fully_replicated]
    assert any("expert" in str(leaf.sharding.spec) for leaf in shared)
    assert any("data" in str(leaf.sharding.spec) for leaf in shared) == options.fsdp


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_optimizer_trains_on_a_mesh_as_alone(small_config, case):
    config = small_config(num_hidden_layers=1, initializer_range=0.1)
    options = dataclasses.replace(options_of(case), fsdp=False)
    shared = dataclasses.replace(options_of(case), per_device_train_batch_size=4)
    one = Trainer(on_mesh(config), options, total_steps=3)
    two = Trainer(on_mesh(config, "2x1"), shared, total_steps=3)
    batch = batch_of([[[text] for text in texts(8)]], LENGTH)
    losses = np.array([[float(t.step(batch).loss) for t in (one, two)] for _ in range(3)])
    assert losses[-1, 0] < losses[0, 0]
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-3)
