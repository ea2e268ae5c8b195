"""Adapters that peft made and saved: our logits and merged weights are peft's own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mixtral_jax as mj
from mixtral_jax.convert import ConvertOptions, convert
from tests.parity.test_transformers import build

pytestmark = [
    pytest.mark.parity,
    # of peft: on targets that it rewrites, and on names that transformers deprecates
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}Warning")
        for kind in ("User", "Future", "Runtime")
    ),
]

F32 = 1e-4

ADAPTERS: dict[str, dict[str, Any]] = {
    "q, k, v, o": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "rank-stabilised, patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 6, r"layers\.1\.self_attn\.v_proj": 2},
        "alpha_pattern": {"0.self_attn.v_proj": 3},
    },
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "experts, by the names of transformers 4": {"target_modules": ["q_proj", "w1", "w2", "w3"]},
    "experts, gate and up only": {"target_modules": ["w1", "w3"]},
    "experts, both parameters": {
        "target_modules": ["v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "experts, down only": {"target_parameters": ["mlp.experts.down_proj"]},
    "all-linear, with the router": {"target_modules": "all-linear"},
}


def adapt(base: Any, fields: dict[str, Any], folder: Path) -> Any:
    """peft's model with an adapter that changes it; ``folder`` gets base and adapter."""
    peft = importlib.import_module("peft")
    base.save_pretrained(folder / "base")
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | fields
    adapted = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    adapted.save_pretrained(folder / "adapter")
    return adapted


def merged(adapted: Any, folder: Path) -> list[dict[str, np.ndarray]]:
    """The tensors of the base, those that we merge, and those that peft does."""
    adapted.merge_and_unload().save_pretrained(folder / "peft")
    ours = ConvertOptions(format="safetensors", adapter=str(folder / "adapter"))
    convert(folder / "base", folder / "ours", ours)
    found = [load_file(folder / name / "model.safetensors") for name in ("base", "ours", "peft")]
    assert found[0].keys() == found[1].keys() == found[2].keys()
    return found


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
def test_f32_logits(fields, torch, transformers, tmp_path):
    base = build(torch, transformers, {"num_hidden_layers": 2, "num_local_experts": 4})
    adapted = adapt(base, fields, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 128, (2, 48))
    with torch.no_grad():
        want = adapted(torch.tensor(tokens)).logits.numpy()
    for mesh in ("1x1", "1x2x2"):
        lm = mj.load(tmp_path / "base", adapter=str(tmp_path / "adapter"), mesh=mesh)
        np.testing.assert_allclose(lm.logits(tokens.tolist()), want, atol=F32)
    plain = mj.load(tmp_path / "base", mesh="1x1").logits(tokens.tolist())
    assert np.abs(plain - want).max() > 100 * F32


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS)
def test_merged_weights(fields, torch, transformers, tmp_path):
    """convert --adapter gives the tensors of merge_and_unload, by the names that it saves."""
    base = build(torch, transformers, {"num_hidden_layers": 2, "num_local_experts": 4})
    plain, got, want = merged(adapt(base, fields, tmp_path), tmp_path)
    touched = 0
    for name, tensor in want.items():
        scale = np.abs(tensor).max()
        assert np.abs(got[name] - tensor).max() <= 1e-5 * scale, name
        changed = not np.array_equal(tensor, plain[name])
        assert changed == (not np.array_equal(got[name], plain[name])), name
        touched += changed
    assert touched


# One rounding to bfloat16 is within half a step, 2^-9 of the value. We round the f32 sum once;
# peft rounds the update, and then the sum: of each, half a step of what may be the larger term.
BF16_STEP = 2.0**-8


@pytest.mark.parametrize("kind", ["q, k, v, o", "experts, by the names of transformers 4"])
def test_merged_onto_bfloat16(kind, torch, transformers, tmp_path):
    base = build(torch, transformers, {"num_hidden_layers": 2, "num_local_experts": 4})
    adapted = adapt(base.to(torch.bfloat16), ADAPTERS[kind], tmp_path)
    plain, got, want = merged(adapted, tmp_path)
    touched = 0
    for name in want:
        before, mine, theirs = (part[name].astype(np.float32) for part in (plain, got, want))
        terms = np.abs(mine) + np.abs(before) + np.abs(mine - before)
        assert np.all(np.abs(mine - theirs) <= BF16_STEP * terms), name
        changed = not np.array_equal(before, theirs)
        assert changed == (not np.array_equal(before, mine)), name
        touched += changed
    assert touched


def test_an_old_adapter_with_a_pair_per_expert(torch, transformers, tmp_path):
    """Written as transformers 4 named it; peft converts it while loading, we read it as it is."""
    peft = importlib.import_module("peft")
    base = build(torch, transformers, {"num_hidden_layers": 1, "num_local_experts": 4})
    base.save_pretrained(tmp_path / "base")
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "w1", "w2", "w3"]}
    peft.LoraConfig(task_type="CAUSAL_LM", **options).save_pretrained(tmp_path)
    draw = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (64, 64)}
    for e in range(4):
        shapes |= {f"block_sparse_moe.experts.{e}.w{n}": (96, 64) for n in (1, 3)}
        shapes |= {f"block_sparse_moe.experts.{e}.w2": (64, 96)}
    factors = {}
    for name, (out, summed) in shapes.items():
        module = f"base_model.model.model.layers.0.{name}"
        factors[f"{module}.lora_A.weight"] = 0.2 * draw.standard_normal((4, summed), np.float32)
        factors[f"{module}.lora_B.weight"] = 0.2 * draw.standard_normal((out, 4), np.float32)
    save_file(factors, tmp_path / "adapter_model.safetensors")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    tokens = draw.integers(3, 128, (2, 48))
    with torch.no_grad():
        want = adapted(torch.tensor(tokens)).logits.numpy()
    got = mj.load(tmp_path / "base", adapter=str(tmp_path)).logits(tokens.tolist())
    np.testing.assert_allclose(got, want, atol=F32)
    convert(tmp_path / "base", tmp_path / "merged", ConvertOptions(adapter=str(tmp_path)))
    merged = mj.load(tmp_path / "merged").logits(tokens.tolist())
    np.testing.assert_allclose(merged, want, atol=F32)
