"""Updates: what they are, that they are the same however rows and devices are split."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import jax
import numpy as np
import pytest

from mixtral_jax.config import PRESETS
from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.finetune.lora import Pair
from mixtral_jax.finetune.measures import evaluated, fetch
from mixtral_jax.finetune.options import TrainOptions
from mixtral_jax.finetune.trained import published_coef
from mixtral_jax.finetune.trainer import Trainer
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.model.transformer import num_parameters
from mixtral_jax.quantize.makers import Recipe, quantize
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.weights import QTensor
from tests.finetune.batches import batch_of, random_texts
from tests.models import random_model
from tests.slow import in_turn, mostly_slow

LENGTH = 7  # of 8 rows: few enough for experts without many branches, which compile slowly
LORA = TrainOptions(
    use_peft=True,
    lora_r=4,
    lora_alpha=8,
    lora_dropout=0.0,
    lora_target_modules=("q_proj", "o_proj", "experts"),
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    warmup_ratio=0.0,
    per_device_train_batch_size=8,
    max_length=LENGTH,
    router_aux_loss_coef=0.02,
    router_z_loss_coef=0.001,
)
FULL = dataclasses.replace(LORA, use_peft=False, learning_rate=1e-3)


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(
        initializer_range=0.1, num_hidden_layers=1, hidden_size=64, head_dim=16, num_local_experts=8
    )


def on_mesh(
    config, mesh: str = "1x1", scheme: str | None = None, strategy: Strategy | None = None
) -> LanguageModel:
    spec, model = MeshSpec.parse(mesh), random_model(config)
    if scheme is not None:
        from flax import nnx

        from mixtral_jax.model.transformer import assemble

        leaves = {}
        for path, param in nnx.to_flat_state(nnx.state(model)):
            name, leaf = ".".join(map(str, path)), param.get_value()
            is_matrix = "_proj" in name or ".experts." in name
            leaves[name] = (
                jax.tree.map(jax.numpy.asarray, quantize(np.asarray(leaf), Recipe(scheme=scheme)))
                if is_matrix
                else leaf
            )
        model = assemble(config, leaves)
    built = spec.build()
    strategy = strategy or Strategy()
    placement = MeshPlacement(built, strategy=strategy)
    placed = place(model, built, strategy=strategy)
    return LanguageModel(placed, tokenizer=None, placement=placement, spec=spec)


def texts(number: int, seed: int = 0) -> list[Any]:
    """Two of them fit in a row."""
    rng, half = np.random.default_rng(seed), LENGTH // 2
    return [random_texts(rng, 1, longest=half + i % 2, vocab=64)[0] for i in range(number)]


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))])


def frozen_bytes(trainer: Trainer) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trainer.frozen)]


@pytest.mark.parametrize("options", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.slow
def test_the_loss_falls_and_frozen_weights_stay(config, options):
    trainer = Trainer(on_mesh(config), options, total_steps=20)
    batch = batch_of([[[text] for text in texts(8)]], LENGTH)
    before, losses = frozen_bytes(trainer), []
    first = trainer.evaluate(batch)
    for _ in range(20):
        losses.append(float(trainer.step(batch).loss))
    assert losses[0] == pytest.approx(float(first.loss), abs=1e-5)
    assert losses[-1] < 0.7 * losses[0]
    assert frozen_bytes(trainer) == before
    assert int(trainer.state.step) == 20
    assert float(trainer.evaluate(batch).loss) < 0.7 * losses[0]


def test_only_what_trains_has_a_gradient_and_moments(config):
    trainer = Trainer(on_mesh(config), LORA, total_steps=5)
    assert all(isinstance(leaf, Pair) for leaf in trainer.state.trained.values())
    numbers = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.optimizer))
    assert numbers <= 2 * trainer.num_trained + 5
    full = Trainer(on_mesh(config), dataclasses.replace(FULL, freeze_router=True), total_steps=5)
    routers = {path for path in full.frozen if "router" in path}
    assert full.frozen.keys() == routers
    assert len(routers) == 1


@pytest.mark.parametrize(("method", "mesh"), in_turn(["sft", "dpo"], ["1x1", "1x8"]))
def test_loaded_weights_make_room_for_those_that_train(small_config, mesh, method):
    """In bf16: what lives is a copy in f32 and two moments of each; of dpo the loaded, too."""
    config = small_config(num_hidden_layers=1, dtype="bfloat16")
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    lm = on_mesh(config, mesh)
    options = dataclasses.replace(FULL, method=method, per_device_train_batch_size=2)
    trainer = Trainer(lm, options, total_steps=5)
    gc.collect()
    size = trainer.num_trained
    assert size == num_parameters(config)
    alive = [array for array in jax.live_arrays() if id(array) not in before]
    found = sum(shard.data.nbytes for x in alive for shard in x.addressable_shards[:1])
    wanted = [*jax.tree.leaves(trainer.state), *jax.tree.leaves(trainer.frozen), trainer._key]
    assert found == sum(x.addressable_shards[0].data.nbytes for x in wanted)
    if mesh == "1x1":
        assert 0 <= found - size * (14 if method == "dpo" else 12) < 64  # counts, and a key
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(lm.model))
    assert np.isfinite(flat(trainer.state.trained)).all()  # and no loaded array is among them


def test_packed_and_padded_rows_give_the_same_update(config):
    """The same texts, two in a row or one: one loss over all their tokens."""
    options = dataclasses.replace(LORA, router_aux_loss_coef=0.02)
    all_texts = texts(8)
    apart = batch_of([[[text] for text in all_texts]], LENGTH)
    packed_options = dataclasses.replace(options, per_device_train_batch_size=4)
    packed = batch_of([[all_texts[i : i + 2] for i in range(0, 8, 2)]], LENGTH)
    one, two = (
        Trainer(on_mesh(config), options, total_steps=5),
        Trainer(on_mesh(config), packed_options, total_steps=5),
    )
    for _ in range(3):
        a, b = one.step(apart), two.step(packed)
        for name in ("loss", "aux_loss", "z_loss", "grad_norm", "tokens", "accuracy"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=2e-4, err_msg=name)
    np.testing.assert_allclose(flat(one.state.trained), flat(two.state.trained), atol=1e-4)


def test_a_prompt_counts_in_the_loss_what_it_is_given(config):
    """The loss is the mean of what answers and prompts lose by themselves, so weighted."""
    trainer = Trainer(on_mesh(config), FULL, total_steps=5)
    answers = batch_of([[[text] for text in texts(8)]], LENGTH)
    is_text = (answers.segments > 0) & (np.roll(answers.segments, -1, axis=-1) > 0)
    is_prompt = is_text & (answers.weights == 0)
    is_prompt[..., -1] = False
    prompts = answers._replace(weights=is_prompt.astype(np.float32))
    weighted = answers._replace(weights=answers.weights + np.float32(0.1) * is_prompt)
    a, p, both = (trainer.evaluate(batch) for batch in (answers, prompts, weighted))
    assert float(p.tokens) > 2
    assert float(both.tokens) == float(a.tokens + p.tokens)
    for name in ("loss", "accuracy"):
        of_answers, of_prompts = getattr(a, name), getattr(p, name)
        mean = (a.tokens * of_answers + 0.1 * p.tokens * of_prompts) / (a.tokens + 0.1 * p.tokens)
        np.testing.assert_allclose(getattr(both, name), mean, rtol=1e-5, err_msg=name)
    # However little all of it weighs, it is a mean.
    little = answers._replace(weights=answers.weights * np.float32(1e-3))
    np.testing.assert_allclose(trainer.evaluate(little).loss, a.loss, rtol=1e-5)
    stepped = trainer.step(little)
    np.testing.assert_allclose(stepped.loss, a.loss, rtol=1e-5)
    again = Trainer(on_mesh(config), FULL, total_steps=5)
    np.testing.assert_allclose(stepped.grad_norm, again.step(answers).grad_norm, rtol=1e-4)


@pytest.mark.slow
def test_accumulated_rows_give_the_update_of_all_at_once(config):
    options = dataclasses.replace(LORA, router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    rows = [[text] for text in texts(8)]
    whole = Trainer(on_mesh(config), options, total_steps=5)
    parts = Trainer(
        on_mesh(config), dataclasses.replace(options, per_device_train_batch_size=2), total_steps=5
    )
    steps = [rows[i : i + 2] for i in range(0, 8, 2)]
    for _ in range(3):
        a = whole.step(batch_of([rows], LENGTH))
        b = parts.step(batch_of(steps, LENGTH))
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-4)
    np.testing.assert_allclose(flat(whole.state.trained), flat(parts.state.trained), atol=1e-4)


MESHES = ["1x8", "2x4", "2x2x2", "8x1 fsdp", "1x8 full", "2x4 full fsdp", "1x2 tensor"]


@pytest.mark.parametrize("case", mostly_slow(MESHES, ["1x8"]))
def test_every_mesh_makes_the_same_updates(config, case):
    mesh, *how = case.split()
    options = FULL if "full" in how or "fsdp" in how else LORA
    spec = MeshSpec.parse(mesh)
    ways = spec.data * spec.expert
    here = dataclasses.replace(options, per_device_train_batch_size=8)
    there = dataclasses.replace(options, per_device_train_batch_size=8 // ways, fsdp="fsdp" in how)
    strategy = Strategy(attention="tensor" if "tensor" in how else "data")
    one = Trainer(on_mesh(config), here, total_steps=5)
    many = Trainer(on_mesh(config, mesh, strategy=strategy), there, total_steps=5)
    batch = batch_of([[[text] for text in texts(8)]], LENGTH)
    for _ in range(3):
        a, b = one.step(batch), many.step(batch)
        for name in ("loss", "aux_loss", "z_loss", "grad_norm"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(a.load, b.load, atol=1e-6)
    assert not np.asarray(b.dropped).any()
    np.testing.assert_allclose(flat(one.state.trained), flat(many.state.trained), atol=5e-5)
    if "fsdp" in how:
        leaf = many.state.trained["embed_tokens"]
        assert leaf.addressable_shards[0].data.size * spec.data == leaf.size


@pytest.mark.parametrize("scheme", mostly_slow(["int8", "nf4", "int4", "fp8"], []))
def test_gradients_on_a_quantized_base_are_those_on_what_it_stands_for(config, scheme):
    quantized = on_mesh(config, scheme=scheme)
    leaves = Trainer(quantized, LORA, total_steps=5).frozen
    batch = batch_of([[[text] for text in texts(8)]], LENGTH)
    trainer = Trainer(quantized, LORA, total_steps=5)
    measures = trainer.step(batch)
    plain = Trainer(quantized, LORA, total_steps=5)
    plain.frozen = {
        path: w.dequantize() if isinstance(w, QTensor) else w for path, w in leaves.items()
    }
    wanted = plain.step(batch)
    np.testing.assert_allclose(measures.loss, wanted.loss, rtol=1e-5)
    np.testing.assert_allclose(measures.grad_norm, wanted.grad_norm, rtol=1e-4)


@pytest.mark.slow
def test_pairs_train_toward_the_chosen_answers(config):
    options = dataclasses.replace(LORA, method="dpo", per_device_train_batch_size=8)
    for each in (options, dataclasses.replace(options, use_peft=False, learning_rate=1e-3)):
        trainer = Trainer(on_mesh(config), each, total_steps=10)
        batch = batch_of([[[text] for text in texts(8)]], LENGTH)
        first = trainer.step(batch)
        np.testing.assert_allclose(first.loss, np.log(2), rtol=1e-4)
        assert float(first.margin) == pytest.approx(0, abs=1e-4)
        for _ in range(9):
            last = trainer.step(batch)
        assert float(last.loss) < 0.6
        assert float(last.reward_accuracy) == 1


def test_the_coefficient_of_the_balance_is_the_published_one(tmp_path, config):
    """Of a native folder, whose params.json has none, too."""
    large, larger = PRESETS["mixtral-8x7b"], PRESETS["mixtral-8x22b"]
    (tmp_path / "params.json").write_text("{}")
    assert published_coef(large, tmp_path) == published_coef(large, None) == 0.02
    assert published_coef(larger, tmp_path) == published_coef(config, None) == 0.001
    (tmp_path / "config.json").write_text('{"router_aux_loss_coef": 0.5}')
    assert published_coef(large, tmp_path) == 0.5
    (tmp_path / "config.json").write_text('{"router_aux_loss_coef": null}')
    assert published_coef(large, tmp_path) == 0.02


@pytest.mark.slow
def test_preferences_are_evaluated_by_pairs_however_they_are_batched(config):
    """Three pairs: two and one with an empty pair, or all in one batch."""
    options = dataclasses.replace(LORA, method="dpo", learning_rate=3e-2)
    trainer = Trainer(on_mesh(config), options, total_steps=5)
    rows = [[text] for text in texts(6)]
    for _ in range(3):
        trainer.step(batch_of([[*rows, *rows[:2]]], LENGTH))
    chosen, rejected = rows[:3], rows[3:]

    def told(batches: list[Any]) -> dict[str, Any]:
        found = [trainer.evaluate(batch_of([batch], LENGTH)) for batch in batches]
        return evaluated([fetch(measures, is_dpo=True) for measures in found])

    one = told([[*chosen, [], *rejected, []]])
    two = told([[*chosen[:2], *rejected[:2]], [chosen[2], [], rejected[2], []]])
    assert one["eval_pairs"] == two["eval_pairs"] == 3
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        assert one[name] == pytest.approx(two[name], rel=1e-4), name
    assert abs(one["eval_loss"] - np.log(2)) > 0.01


def test_what_cannot_train_is_refused(config):
    quantized = on_mesh(config, scheme="int8")
    with pytest.raises(MixtralError, match="quantized") as caught:
        Trainer(quantized, FULL, total_steps=5)
    assert caught.value.code == BAD_CONFIG
