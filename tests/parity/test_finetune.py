"""Losses and gradients are those of transformers and peft; adapters go both ways."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import mixtral_jax as mj
from mixtral_jax.convert.driver import ConvertOptions, convert
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.finetune import step as steps
from mixtral_jax.finetune.options import TrainOptions
from mixtral_jax.finetune.peft_folder import _tensors
from mixtral_jax.finetune.trainer import Trainer
from mixtral_jax.qtensor import QTensor
from mixtral_jax.quantize.driver import quantize_checkpoint
from mixtral_jax.quantize.makers import Recipe
from tests.convert.quantized.published import CASES, publish
from tests.finetune.batches import batch_of, random_texts
from tests.parity.test_transformers import build

pytestmark = [
    pytest.mark.parity,
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}Warning")
        for kind in ("User", "Future", "Runtime")
    ),
]
LENGTH = 24
AUX = 0.02
LORA = TrainOptions(
    use_peft=True,
    lora_r=4,
    lora_alpha=8,
    lora_dropout=0.0,
    learning_rate=1e-2,
    max_grad_norm=0.0,
    weight_decay=0.0,
    lr_scheduler_type="constant",
    warmup_ratio=0.0,
    per_device_train_batch_size=4,
    max_length=LENGTH,
    router_aux_loss_coef=AUX,
    gradient_checkpointing=False,
)
TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "experts": ("q_proj", "experts"),
    "gate alone": ("w1",),
    "down": ("w2",),
    "all-linear": ("all-linear",),
}


def texts(number: int = 4):
    return random_texts(np.random.default_rng(0), number, longest=LENGTH, vocab=128)


def torch_loss(torch, model, rows, aux: float = AUX):
    """Cross-entropy of scored tokens, and the balance loss with padding left out."""
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros((len(rows), length), dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, (ids, is_target) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        labels[i, : len(ids)] = torch.where(torch.tensor(is_target), tokens[i, : len(ids)], -100)
        mask[i, : len(ids)] = 1
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.router_aux_loss_coef = aux
    out = model(tokens, attention_mask=mask, labels=labels, output_router_logits=True)
    return out


def saved_base(torch, transformers, folder: Path, **fields: Any):
    base = build(torch, transformers, {"num_hidden_layers": 1, "num_local_experts": 4} | fields)
    base.save_pretrained(folder)
    return base


def our_gradients(trainer: Trainer, rows) -> tuple[Any, Any]:
    batch = trainer._placed(batch_of([[[text] for text in rows]], LENGTH))
    only = jax.tree.map(lambda x: x[0], batch)
    count = only.weights.sum()

    def loss(trained):
        sums = steps._sums(trained, trainer.frozen, only, None, trainer.objective)
        return sums.loss / count + trainer.objective.aux_coef * sums.aux_loss

    return jax.value_and_grad(loss)(trainer.state.trained)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_first_gradients_of_lora_are_pefts(targets, torch, transformers, tmp_path):
    base = saved_base(torch, transformers, tmp_path / "base")
    lm = mj.load(tmp_path / "base", mesh="1x1")
    compare_first_gradients(lm, base, targets, torch, tmp_path / "adapter")


@pytest.mark.parametrize("case", ["int8", "int4", "nf4", "gptq4 32 order unfused"])
def test_first_gradients_of_qlora_are_pefts_on_the_dequantized_weights(
    case, torch, transformers, tmp_path
):
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    if case.startswith("gptq"):
        publish(CASES[case], vocab_size=128).write(packed)
    else:
        saved_base(torch, transformers, tmp_path / "base", intermediate_size=128)
        quantize_checkpoint(tmp_path / "base", packed, Recipe(scheme=case))
    convert(packed, plain, ConvertOptions(format="safetensors", dequantize=True, dtype="float32"))
    lm = mj.load(packed, mesh="1x1", dtype="float32")
    base = transformers.MixtralForCausalLM.from_pretrained(plain, torch_dtype=torch.float32)
    targets = ("q_proj", "o_proj", "experts")
    trainer = compare_first_gradients(lm, base, targets, torch, tmp_path / "adapter")
    is_packed = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    codes = [*filter(is_packed, jax.tree.leaves(trainer.frozen, is_leaf=is_packed))]
    assert len(codes) == 7 * lm.config.num_hidden_layers  # q, k, v, o; gate, up and down


def compare_first_gradients(lm, base, targets, torch, folder: Path) -> Trainer:
    """Factors that peft reads from a folder of ours: the same loss, and the same gradients."""
    peft = importlib.import_module("peft")
    trainer = Trainer(lm, dataclasses.replace(LORA, lora_target_modules=targets), total_steps=4)
    rng = np.random.default_rng(1)
    trained = jax.tree.map(  # B of zeros would leave A without a gradient
        lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), trainer.state.trained
    )
    trainer.state = trainer.state._replace(trained=trained)
    trainer.save_adapter(folder)
    adapted = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    rows = texts()
    out = torch_loss(torch, adapted, rows)
    out.loss.backward()
    loss, gradients = our_gradients(trainer, rows)
    np.testing.assert_allclose(float(loss), float(out.loss), rtol=1e-5)
    wanted = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in adapted.named_parameters()
        if parameter.grad is not None
    }
    got = _tensors(jax.device_get(gradients))
    stored = load_file(folder / "adapter_model.safetensors")
    assert wanted.keys() == got.keys() == stored.keys()
    for name, gradient in wanted.items():
        # Where we keep zeros beside a block, peft trains those numbers too.
        is_ours = (stored[name] != 0) | (got[name] != 0)
        scale = np.abs(gradient).max()
        apart = np.abs(got[name] - gradient)[is_ours].max() if is_ours.any() else 0
        assert apart <= 1e-4 * scale, (name, apart, scale)
    return trainer


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_an_adapter_of_ours_gives_our_logits_in_peft(targets, torch, transformers, tmp_path):
    peft = importlib.import_module("peft")
    base = saved_base(torch, transformers, tmp_path / "base")
    for is_stabilized in (False, True):
        options = dataclasses.replace(LORA, lora_target_modules=targets, use_rslora=is_stabilized)
        trainer = Trainer(mj.load(tmp_path / "base", mesh="1x1"), options, total_steps=4)
        batch = batch_of([[[text] for text in texts()]], LENGTH)
        for _ in range(4):
            trainer.step(batch)
        folder = tmp_path / f"adapter-{is_stabilized}"
        trainer.save_adapter(folder)
        tokens = np.random.default_rng(0).integers(3, 128, (2, 20))
        with torch.no_grad():
            adapted = peft.PeftModel.from_pretrained(base, folder).eval()
            want = adapted(torch.tensor(tokens)).logits.numpy()
            adapted.unload()
        got = mj.load(tmp_path / "base", adapter=str(folder)).logits(tokens.tolist())
        np.testing.assert_allclose(got, want, atol=1e-4)
        ours = np.asarray(trainer.model()(jnp.asarray(tokens, jnp.int32)))
        np.testing.assert_allclose(ours, want, atol=1e-4)
        plain = mj.load(tmp_path / "base").logits(tokens.tolist())
        assert np.abs(plain - want).max() > 1e-2


def test_gradients_of_full_training_are_those_of_transformers(torch, transformers, tmp_path):
    base = saved_base(torch, transformers, tmp_path / "base")
    options = dataclasses.replace(LORA, use_peft=False)
    trainer = Trainer(mj.load(tmp_path / "base", mesh="1x1"), options, total_steps=4)
    rows = texts()
    out = torch_loss(torch, base, rows)
    out.loss.backward()
    loss, gradients = our_gradients(trainer, rows)
    np.testing.assert_allclose(float(loss), float(out.loss), rtol=1e-5)
    theirs = {name: p.grad.numpy() for name, p in base.named_parameters() if p.grad is not None}
    F = base.config.intermediate_size
    checked = 0
    for path, gradient in gradients.items():
        name, part = their_name(path, F)
        wanted = theirs[name] if part is None else theirs[name][part]
        scale = np.abs(wanted).max()
        assert np.abs(gradient - wanted).max() <= 1e-4 * scale, path
        checked += 1
    assert checked == len(trainer.state.trained) == 3 + 2 + 4 + 1 + 3


def their_name(path: str, F: int) -> tuple[str, Any]:
    ends = {
        "embed_tokens": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "lm_head": "lm_head.weight",
    }
    if path in ends:
        return ends[path], None
    _, i, rest = path.split(".", 2)
    name = f"model.layers.{i}."
    parts = {
        "attention_norm.weight": "input_layernorm.weight",
        "moe_norm.weight": "post_attention_layernorm.weight",
        "moe.router.weight": "mlp.gate.weight",
        "moe.experts.down": "mlp.experts.down_proj",
    }
    if rest.startswith("attention."):
        return f"{name}self_attn.{rest.rpartition('.')[2]}.weight", None
    if rest in parts:
        return name + parts[rest], None
    half = slice(0, F) if rest.endswith("gate") else slice(F, 2 * F)
    return f"{name}mlp.experts.gate_up_proj", (slice(None), half)


def test_aux_loss_is_that_of_transformers(torch, transformers, tmp_path):
    base = saved_base(torch, transformers, tmp_path / "base")
    trainer = Trainer(mj.load(tmp_path / "base", mesh="1x1"), LORA, total_steps=4)
    rows = texts()
    measures = trainer.evaluate(batch_of([[[text] for text in rows]], LENGTH))
    out = torch_loss(torch, base, rows)
    np.testing.assert_allclose(float(measures.aux_loss), float(out.aux_loss), rtol=1e-5)


def test_dpo_is_the_published_formula(torch, transformers, tmp_path):
    """Written out in torch, as TRL's sigmoid loss: the base without factors is the reference."""
    peft = importlib.import_module("peft")
    base = saved_base(torch, transformers, tmp_path / "base")
    options = dataclasses.replace(
        LORA, method="dpo", router_aux_loss_coef=0.0, dpo_beta=0.3, label_smoothing=0.1
    )
    trainer = Trainer(mj.load(tmp_path / "base", mesh="1x1"), options, total_steps=4)
    rng = np.random.default_rng(1)
    trained = jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), trainer.state.trained
    )
    trainer.state = trainer.state._replace(trained=trained)
    trainer.save_adapter(tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    rows = texts()

    def summed(model):
        sums = []
        for ids, is_target in rows:
            tokens = torch.tensor(ids, dtype=torch.long)[None]
            logs = torch.log_softmax(model(tokens).logits[0, :-1], dim=-1)
            chosen = logs.gather(1, tokens[0, 1:, None])[:, 0]
            sums.append((chosen * torch.tensor(is_target[1:])).sum())
        return torch.stack(sums)

    with torch.no_grad(), adapted.disable_adapter():
        reference = summed(adapted)
    rewards = 0.3 * (summed(adapted) - reference)
    margins = rewards[:2] - rewards[2:]
    logsigmoid = torch.nn.functional.logsigmoid
    loss = (-0.9 * logsigmoid(margins) - 0.1 * logsigmoid(-margins)).mean()
    measures = trainer.evaluate(batch_of([[[text] for text in rows]], LENGTH))
    np.testing.assert_allclose(float(measures.loss), float(loss), rtol=1e-5)
    np.testing.assert_allclose(float(measures.margin), float(margins.mean()), rtol=1e-4)
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in adapted.parameters() if p.grad is not None))
    stepped = trainer.step(batch_of([[[text] for text in rows]], LENGTH))
    np.testing.assert_allclose(float(stepped.grad_norm), float(norm), rtol=1e-4)


def test_an_adapter_on_another_base_is_refused(torch, transformers, tmp_path):
    saved_base(torch, transformers, tmp_path / "base")
    other = build(torch, transformers, {"num_hidden_layers": 1, "num_local_experts": 4})
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    trainer = Trainer(mj.load(tmp_path / "base", mesh="1x1"), LORA, total_steps=4)
    trainer.save_adapter(tmp_path / "adapter")
    mj.load(tmp_path / "base", adapter=str(tmp_path / "adapter"))
    with pytest.raises(MixtralError, match="trained on") as caught:
        mj.load(tmp_path / "other", adapter=str(tmp_path / "adapter"))
    assert caught.value.code == BAD_DATA
