"""Moments in 8 bits: their codes, where they lie, and that they train as those in f32."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixtral_jax.finetune.adam8bit import (
    LEAST,
    Moment,
    decode,
    encode,
    is_moment,
    scale_by_adam_8bit,
    tile_of,
)
from mixtral_jax.finetune.trainer import Trainer
from mixtral_jax.qtensor import dynamic_map
from tests.finetune.batches import batch_of
from tests.finetune.test_trainer import FULL, LENGTH, LORA, flat, on_mesh, texts
from tests.slow import mostly_slow

ADAM = (0.9, 0.999, 1e-8)
OF_A_TILE = {True: 0.056, False: 0.029}  # half the widest step, of the largest value of a tile
LOSS = 0.02  # nats from the loss that f32 moments come to, of a fall of more than three


@pytest.fixture(scope="module")
def config(small_config):
    """Matrices of 4096 values and more; norms and the router have fewer."""
    return small_config(
        initializer_range=0.1,
        num_hidden_layers=1,
        hidden_size=64,
        head_dim=16,
        num_key_value_heads=4,
        intermediate_size=128,
    )


def test_leaves_are_cut_into_tiles_of_256_values():
    assert tile_of((4096, 14336)) == (1, 256)
    assert tile_of((8, 4096, 16)) == (16, 16)  # factors B of experts
    assert tile_of((64, 96)) == (8, 32)
    assert tile_of((8192,)) == (1, 256)
    assert tile_of((1024, 36)) == (64, 4)
    assert tile_of((63, 64)) is None  # too small
    assert tile_of((4097, 3)) is None  # no tiles of a size


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("shape", [(8192,), (40, 512), (3, 64, 96), (2, 512, 16)])
def test_codes_are_the_nearest_and_each_tile_has_its_scale(shape, is_signed):
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape).astype(np.float32) * 10.0 ** rng.integers(-8, 2, shape)
    values = values.astype(np.float32) if is_signed else np.abs(values).astype(np.float32)
    found = encode(jnp.asarray(values), is_signed=is_signed)
    assert found.codes.shape == shape
    assert found.codes.dtype == jnp.uint8
    tile = tile_of(shape)
    assert tile is not None
    matrices = values.reshape(-1, *((1, *shape)[-2:]))
    codes, scales = np.asarray(found.codes).reshape(matrices.shape), np.asarray(found.scales)
    scales = scales.reshape(len(matrices), -1, matrices.shape[-1] // tile[1])
    table, again = dynamic_map(is_signed=is_signed), np.asarray(decode(found, is_signed=is_signed))
    again = again.reshape(matrices.shape)
    for m, matrix in enumerate(matrices):
        for i in range(0, matrix.shape[0], tile[0]):
            for j in range(0, matrix.shape[1], tile[1]):
                part = slice(i, i + tile[0]), slice(j, j + tile[1])
                scale = np.abs(matrix[part]).max()
                assert scales[m, i // tile[0], j // tile[1]] == scale
                np.testing.assert_array_equal(again[m][part], table[codes[m][part]] * scale)
                far = np.abs(again[m][part] - matrix[part]).max() / scale
                assert far <= OF_A_TILE[is_signed]
                nearest = np.abs(table[:, None, None] - matrix[part] / scale).min(axis=0)
                got = np.abs(table[codes[m][part]] - matrix[part] / scale)
                assert (got <= nearest + 1e-6).all()


def test_a_square_is_never_rounded_to_zero():
    """Its mean, which has a sign and fewer steps, may be no zero: it would be divided by eps."""
    values = np.full((16, 256), 1e-9, np.float32)
    values[:, 0] = 1
    assert (np.asarray(decode(encode(jnp.asarray(values), is_signed=False), is_signed=False)) > 0)[
        :, 1:
    ].all()
    zeros = encode(jnp.zeros((16, 256)), is_signed=False)
    assert not np.asarray(decode(zeros, is_signed=False)).any()


def test_a_first_update_is_that_of_adam():
    """Moments are rounded after an update, not before; small leaves are never rounded."""
    rng = np.random.default_rng(0)
    trained = {"big": jnp.zeros((64, 256)), "small": jnp.zeros((16, 255))}
    assert trained["small"].size < LEAST
    ours: Any = scale_by_adam_8bit(*ADAM)
    theirs: Any = optax.scale_by_adam(*ADAM)
    state, reference = ours.init(trained), theirs.init(trained)
    for step in range(20):
        gradients = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) + 0.5), trained
        )
        found, state = ours.update(gradients, state)
        wanted, reference = theirs.update(gradients, reference)
        np.testing.assert_allclose(found["small"], wanted["small"], rtol=1e-5, atol=1e-6)
        if step == 0:
            np.testing.assert_allclose(found["big"], wanted["big"], rtol=1e-5)
        apart = np.abs(np.asarray(found["big"] - wanted["big"]))
    assert 0 < apart.mean() < 0.05
    assert int(state.count) == 20


@pytest.mark.parametrize("options", [FULL, LORA], ids=["full", "lora"])
def test_the_state_takes_two_bytes_per_weight(config, options):
    asked = dataclasses.replace(options, optim="adamw_8bit", lora_r=16)
    trainer = Trainer(on_mesh(config), asked, total_steps=5)
    leaves = jax.tree.leaves(trainer.state.optimizer, is_leaf=is_moment)
    in_8_bits = [leaf for leaf in leaves if is_moment(leaf)]
    size = sum(leaf.codes.size for leaf in in_8_bits)
    assert size >= 1.8 * trainer.num_trained  # of two for each
    held = sum(part.nbytes for leaf in in_8_bits for part in leaf)
    assert held / size == pytest.approx(1 + 4 / 256)
    others = [leaf for leaf in leaves if not is_moment(leaf) and leaf.ndim]
    assert all(leaf.size < LEAST for leaf in others)


MESHES = ["1x8", "2x2x2", "8x1 fsdp"]


@pytest.mark.parametrize("case", mostly_slow(MESHES, ["8x1 fsdp"]))
def test_it_lies_with_its_weights_and_gives_the_same_updates(config, case):
    mesh, *how = case.split()
    asked = dataclasses.replace(FULL, optim="adamw_8bit")
    there = dataclasses.replace(asked, per_device_train_batch_size=1, fsdp="fsdp" in how)
    here = on_mesh(config, mesh)
    ways = here.spec.data * here.spec.expert
    there = dataclasses.replace(there, per_device_train_batch_size=8 // ways)
    one = Trainer(on_mesh(config), asked, total_steps=5)
    many = Trainer(here, there, total_steps=5)
    batch = batch_of([[[text] for text in texts(8)]], LENGTH)
    for _ in range(3):
        a, b = one.step(batch), many.step(batch)
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4)
    # A rounding may fall the other way: rarely, and by no more than a step of Adam.
    apart = np.abs(flat(one.state.trained) - flat(many.state.trained))
    assert apart.mean() < 1e-5
    assert apart.max() < 3e-3
    adam = many.state.optimizer[1][0]
    for moments in (adam.mu, adam.nu):
        for path, moment in moments.items():
            own = many.state.trained[path].sharding
            codes = moment.codes if isinstance(moment, Moment) else moment
            assert codes.sharding.is_equivalent_to(own, codes.ndim), path
    experts = adam.mu["layers.0.moe.experts.gate"]
    shares = math.prod(
        s // p for s, p in zip(experts.codes.shape, local(experts.codes), strict=True)
    )
    assert shares == here.spec.expert * here.spec.tensor * (8 if how else 1)
    if not how:  # 64 columns over 8 devices: no whole tiles there
        assert local(experts.scales) != experts.scales.shape


def local(x: jax.Array) -> tuple[int, ...]:
    return x.addressable_shards[0].data.shape


@pytest.mark.slow
@pytest.mark.parametrize("options", [FULL, LORA], ids=["full", "lora"])
def test_it_trains_as_well_as_f32(config, options):
    """Sixty updates on eight batches."""
    batches = [batch_of([[[text] for text in texts(8, seed=i)]], LENGTH) for i in range(8)]
    ends = {}
    for optim in ("adamw", "adamw_8bit"):
        asked = dataclasses.replace(options, optim=optim, lora_r=16)
        trainer = Trainer(on_mesh(config), asked, total_steps=60)
        first = np.mean([float(trainer.evaluate(batch).loss) for batch in batches])
        for step in range(60):
            trainer.step(batches[step % 8])
        ends[optim] = np.mean([float(trainer.evaluate(batch).loss) for batch in batches])
        assert ends[optim] < 0.8 * first
    print(f"loss {first:.4f} -> " + ", ".join(f"{name} {end:.4f}" for name, end in ends.items()))
    assert ends["adamw_8bit"] == pytest.approx(ends["adamw"], abs=LOSS)
