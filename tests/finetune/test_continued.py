"""Training goes on from an adapter: the same factors, and one adapter that holds all of it."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mixtral_jax.convert.adapter import CONFIG_NAME, TENSORS_NAME, Adapter
from mixtral_jax.convert.hub import EMBEDDED_FOLDER
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, MixtralError
from mixtral_jax.finetune.continued import first_factors
from mixtral_jax.finetune.lora import Pair
from mixtral_jax.finetune.options import TrainOptions
from mixtral_jax.finetune.step import REFERENCE
from mixtral_jax.finetune.trainer import Trainer
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.model.transformer import assemble, leaf_specs, leaves_of
from mixtral_jax.sharding.place import weight_shardings
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from tests.finetune.batches import batch_of
from tests.finetune.test_trainer import LENGTH, LORA, on_mesh, texts

TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 64, (2, 12)), jnp.int32)
TARGETS = [("q_proj", "o_proj"), ("v_proj", "experts", "gate"), ("w1",), ("w3",), ("w2",)]


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(initializer_range=0.1, num_hidden_layers=1)


def options_for(targets: tuple[str, ...], **given) -> TrainOptions:
    return dataclasses.replace(LORA, lora_target_modules=targets, **given)


def written(config, folder, options: TrainOptions) -> dict[str, Pair]:
    """An adapter of random factors, and these."""
    trainer = Trainer(on_mesh(config), options, total_steps=5)
    rng = np.random.default_rng(1)
    trained = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.1, jnp.float32),
        trainer.state.trained,
    )
    trainer.state = trainer.state._replace(trained=trained)
    trainer.save_adapter(folder)
    return trained


def adapted(lm: LanguageModel, folder) -> jax.Array:
    """Logits of a base with the adapter of a folder."""
    assert isinstance(lm.placement, MeshPlacement)
    specs = leaf_specs(lm.config)
    shardings = weight_shardings(specs, lm.placement.mesh, Strategy())
    leaves = Adapter(folder, lm.config).attach(leaves_of(lm.model), shardings.__getitem__)
    return assemble(lm.config, leaves)(TOKENS)


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
@pytest.mark.parametrize("is_stabilized", [False, True])
def test_it_begins_with_the_factors_of_the_folder_and_writes_them_again(
    tmp_path, config, targets, is_stabilized
):
    options = options_for(targets, use_rslora=is_stabilized)
    trained = written(config, tmp_path / "one", options)
    start = first_factors(Adapter(tmp_path / "one", config), options)
    assert start.keys() == trained.keys()
    for path, pair in trained.items():
        for mine, theirs in zip(start[path], pair, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=path)
    again = Trainer(on_mesh(config, "1x4"), options, total_steps=5, start=start)
    again.save_adapter(tmp_path / "two")
    one, two = (load_file(tmp_path / name / TENSORS_NAME) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_the_base_is_named_as_it_was_asked_for(tmp_path, config):
    """By peft's readers, on any machine: a name of the Hub, not a folder of its cache here."""
    trainer = Trainer(on_mesh(config), options_for(("q_proj",)), total_steps=5)
    trainer.lm.folder = EMBEDDED_FOLDER
    for name, told in (("org/name", "org/name"), (None, str(EMBEDDED_FOLDER))):
        trainer.save_adapter(tmp_path, name)
        fields = json.loads((tmp_path / CONFIG_NAME).read_text())
        assert fields["base_model_name_or_path"] == told


def test_factors_of_no_effect_are_new_ones_again(tmp_path, config):
    """B of zeros: which half is whose is told by the names alone."""
    options = options_for(("experts",))
    first = Trainer(on_mesh(config), options, total_steps=5)
    first.save_adapter(tmp_path)
    start = first_factors(Adapter(tmp_path, config), options)
    for path, pair in first.state.trained.items():
        np.testing.assert_array_equal(start[path].a, pair.a, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_what_is_trained_is_the_base_with_the_adapter_that_is_written(tmp_path, config, method):
    options = options_for(("q_proj", "experts"), method=method)
    written(config, tmp_path / "one", options)
    lm = on_mesh(config)
    start = first_factors(Adapter(tmp_path / "one", config), options)
    trainer = Trainer(lm, options, total_steps=5, start=start)
    np.testing.assert_allclose(trainer.model()(TOKENS), adapted(lm, tmp_path / "one"), atol=1e-5)
    batch = batch_of([[[text] for text in texts(8)]], LENGTH)
    measures = trainer.step(batch)
    if method == "dpo":  # held to the model that it began with, adapter and all
        np.testing.assert_allclose(measures.loss, np.log(2), rtol=1e-4)
    trainer.step(batch)
    trainer.save_adapter(tmp_path / "two")
    got = trainer.model()(TOKENS)
    np.testing.assert_allclose(got, adapted(lm, tmp_path / "two"), atol=1e-5)
    assert np.abs(got - adapted(lm, tmp_path / "one")).max() > 1e-3
    copies = [path for path in trainer.frozen if path.startswith(REFERENCE)]
    assert len(copies) == (4 if method == "dpo" else 0)


@pytest.mark.parametrize(
    "other",
    [
        {"lora_r": 8},
        {"lora_r": 2},
        {"lora_alpha": 4.0},
        {"use_rslora": True},
        {"lora_target_modules": ("q_proj",)},
        {"lora_target_modules": ("q_proj", "experts", "v_proj")},
    ],
)
def test_another_rank_scale_or_target_is_refused(tmp_path, config, other):
    options = options_for(("q_proj", "experts"))
    written(config, tmp_path, options)
    with pytest.raises(MixtralError, match=r"--adapter.*--lora-r") as caught:
        first_factors(Adapter(tmp_path, config), dataclasses.replace(options, **other))
    assert caught.value.code == BAD_DATA


def test_a_model_that_has_an_adapter_is_no_base(tmp_path, config):
    options = options_for(("q_proj",))
    written(config, tmp_path, options)
    lm = on_mesh(config)
    assert isinstance(lm.placement, MeshPlacement)
    shardings = weight_shardings(leaf_specs(config), lm.placement.mesh, Strategy())
    leaves = Adapter(tmp_path, config).attach(leaves_of(lm.model), shardings.__getitem__)
    lm.model = assemble(config, leaves)
    with pytest.raises(MixtralError, match="has an adapter") as caught:
        Trainer(lm, options, total_steps=5)
    assert caught.value.code == BAD_CONFIG
