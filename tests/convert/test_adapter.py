"""PEFT adapters written by hand: what they add equals merged weights, and what is wrong is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import mixtral_jax as mj
from mixtral_jax.convert.adapter import Adapter
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.weights import Adapted, ExpertSlots
from tests.convert import checkpoints
from tests.models import random_tokens

F32 = 1e-4
RANK, ALPHA = 3, 6
PREFIX = "base_model.model."
MESHES = ("1x1", "1x4", "1x2x2")
ONE = ("1x1",)  # where the question is which tensors a factor goes to
LAYER = "model.layers.1"
EXPERT = LAYER + ".block_sparse_moe.experts"
Q, ROUTER = LAYER + ".self_attn.q_proj", LAYER + ".block_sparse_moe.gate"

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(num_local_experts=4)


@pytest.fixture(scope="module")
def tensors(config) -> Tensors:
    return checkpoints.mild_tensors(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory, config, tensors) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("base") / "hf", config, tensors)


def write(folder: Path, factors: Tensors, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": None} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {PREFIX + name: np.ascontiguousarray(w) for name, w in factors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def pair(module: str, shape: tuple[int, ...], rank: int = RANK, seed: int = 0) -> Tensors:
    """Random factors of a matrix ``[out, in]``."""
    draw = np.random.default_rng([seed, *module.encode()])
    return {
        f"{module}.lora_A.weight": 0.3 * draw.standard_normal((rank, shape[1]), np.float32),
        f"{module}.lora_B.weight": 0.3 * draw.standard_normal((shape[0], rank), np.float32),
    }


def pairs(tensors: Tensors, *modules: str, rank: int = RANK) -> Tensors:
    found: Tensors = {}
    for module in modules:
        found |= pair(module, tensors[f"{module}.weight"].shape, rank)
    return found


def merged(tensors: Tensors, factors: Tensors, scales: dict[str, float] | None = None) -> Tensors:
    """The base with every update added, by numpy; ``scales`` by module, where not alpha / rank."""
    found = dict(tensors)
    for name, a in factors.items():
        if ".lora_A." in name:
            module = name.removesuffix(".lora_A.weight")
            scale = (scales or {}).get(module, ALPHA / RANK)
            found[f"{module}.weight"] = found[f"{module}.weight"] + scale * (
                factors[f"{module}.lora_B.weight"] @ a
            )
    return found


def logits(folder: Path, config: mj.ModelConfig, mesh: str = "1x1", **options: Any) -> np.ndarray:
    tokens = random_tokens(config, (2, 12)).tolist()
    return mj.load(folder, mesh=mesh, **options).logits(tokens)


def same_as_merged(
    folder: Path, want: Tensors, base: Path, config, adapter: Path, meshes: tuple[str, ...] = MESHES
) -> None:
    """On every mesh the adapted base is the merged checkpoint, and is not the base."""
    expected = logits(checkpoints.write(folder / "merged", config, want), config)
    for mesh in meshes:
        got = logits(base, config, mesh, adapter=str(adapter))
        np.testing.assert_allclose(got, expected, atol=F32)
    assert np.abs(logits(base, config) - expected).max() > 100 * F32


def refusal(folder: Path, config: mj.ModelConfig, code: int = BAD_DATA) -> str:
    with pytest.raises(MixtralError) as caught:
        Adapter(folder, config)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    assert "; fix: " in str(caught.value) or code == INPUT_NOT_FOUND
    return str(caught.value)


def test_attention_router_and_experts(tmp_path, config, tensors, base):
    modules = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    experts = [f"{EXPERT}.{e}.w{n}" for e in range(4) for n in (1, 2, 3)]
    factors = pairs(tensors, *modules, *experts, ROUTER)
    adapter = write(tmp_path / "adapter", factors, target_modules=["q_proj", "k_proj", "v_proj"])
    same_as_merged(tmp_path, merged(tensors, factors), base, config, adapter)

    def tokens(folder: Path, mesh: str, **options: Any) -> list[int]:
        lm = mj.load(folder, mesh=mesh, **options)
        fields = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        return lm.generate(prompt_token_ids=[[1, 5, 9]], **fields)[0].token_ids

    want = tokens(tmp_path / "merged", "1x1")
    assert want != tokens(base, "1x1")
    assert want == tokens(base, "1x4", adapter=str(adapter))
    assert want == tokens(base, "1x4", adapter=str(adapter), kernels="gpu")  # stacked experts
    offloaded = {"offload": "experts", "device_memory": "2MB"}
    assert want == tokens(base, "1x1", adapter=str(adapter), **offloaded)


def test_experts_without_an_adapter_and_of_other_ranks_and_scales(tmp_path, config, tensors, base):
    one, two, three = f"{EXPERT}.0.w1", f"{EXPERT}.2.w1", f"{EXPERT}.3.w2"
    factors = pairs(tensors, one, three) | pairs(tensors, two, rank=5)
    adapter = write(
        tmp_path / "adapter",
        factors,
        rank_pattern={"2.w1": 5},
        alpha_pattern={r"experts\.[03]\.w\d": 9, "w1": 4},  # the first that matches counts
    )
    scales = {one: 9 / RANK, two: 4 / 5, three: 9 / RANK}
    same_as_merged(tmp_path, merged(tensors, factors, scales), base, config, adapter, ONE)


def test_a_pattern_matches_whole_dotted_endings(tmp_path, config, tensors, base):
    q, o = f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.o_proj"
    factors = pairs(tensors, q, o)
    patterns = {"alpha_pattern": {"proj": 100, "self_attn": 100, "q_proj": 12}}
    adapter = write(tmp_path / "adapter", factors, use_rslora=True, **patterns)
    scales = {q: 12 / RANK**0.5, o: ALPHA / RANK**0.5}
    same_as_merged(tmp_path, merged(tensors, factors, scales), base, config, adapter, ONE)


def stacked(factors: list[Tensors]) -> list[np.ndarray]:
    """A with the experts outermost in its rows, B with them innermost in its columns."""
    a = [next(w for name, w in one.items() if "lora_A" in name) for one in factors]
    b = [next(w for name, w in one.items() if "lora_B" in name) for one in factors]
    return [np.concatenate(a), np.stack(b, axis=-1).reshape(b[0].shape[0], -1)]


@pytest.mark.parametrize("is_down_inside", [False, True])
def test_one_pair_for_all_experts(tmp_path, config, tensors, base, is_down_inside):
    D, F = config.hidden_size, config.intermediate_size
    gate_up = [pair(f"gate_up.{e}", (2 * F, D)) for e in range(4)]
    down = [pair(f"{EXPERT}.{e}.w2", (D, F)) for e in range(4)]
    inner, outer = (down, gate_up) if is_down_inside else (gate_up, down)
    module = f"{LAYER}.mlp.experts"
    factors = {}
    for stem, stack in ((f"{module}.base_layer", stacked(inner)), (module, stacked(outer))):
        for letter, w in zip("AB", stack, strict=True):
            factors[f"{stem}.lora_{letter}.weight"] = w
    parameters = ["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]
    adapter = write(tmp_path / "adapter", factors, target_parameters=parameters)
    want = dict(tensors)
    for e in range(4):
        a, b = gate_up[e].values()
        for name, rows in (("w1", slice(0, F)), ("w3", slice(F, None))):
            update = {f"{EXPERT}.{e}.{name}.lora_A.weight": a}
            update |= {f"{EXPERT}.{e}.{name}.lora_B.weight": b[rows]}
            want = merged(want, update)
        want = merged(want, down[e])
    same_as_merged(tmp_path, want, base, config, adapter)


def test_the_base_stays_as_it_was_and_factors_take_its_dtype(tmp_path, config, tensors, base):
    adapter = write(tmp_path, pairs(tensors, Q, f"{EXPERT}.0.w1"))
    plain = mj.load(base, mesh="1x4", dtype="bfloat16").model.layers[1]
    lm = mj.load(base, mesh="1x4", dtype="bfloat16", adapter=str(adapter))
    layer = lm.model.layers[1]
    q, gate = layer.attention.q_proj[...], layer.moe.experts.gate[...]
    assert isinstance(q, Adapted)
    assert isinstance(gate, ExpertSlots)
    assert all(isinstance(slot, Adapted) for slot in gate.slots)
    assert {q.base.dtype, q.a.dtype, q.b.dtype, gate.slots[0].a.dtype} == {q.dtype}
    assert checkpoints.same_bits(q.base, plain.attention.q_proj[...])
    base_slot = plain.moe.experts.gate[...].slots[0]
    assert checkpoints.same_bits(gate.slots[0].base, base_slot)
    assert gate.slots[0].a.sharding.spec[0] == "expert"
    assert not isinstance(layer.attention.k_proj[...], Adapted)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, got IA3"),
        ({"use_dora": True}, "use_dora: expected none"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias: expected none, got 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"r": 0}, "r: expected a whole number"),
        ({"r": True}, "r: expected a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a number"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a number"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: expected an object of regexes"),
        ({"rank_pattern": {"(x+x+)+y": 2}}, "rank_pattern: expected regexes that are matched in"),
        ({"alpha_pattern": {"(.|.)" * 30 + "x": 2}}, "alpha_pattern: expected regexes that are"),
        ({"alpha_pattern": {".*.*.*.*.*x": 2}}, "alpha_pattern: expected regexes that are"),
        ({"rank_pattern": {"(?=.*)x": 2}}, "rank_pattern: expected regexes that are"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: expected an object of regexes"),
        ({"rank_pattern": {"q_proj": "2"}}, "r: expected a whole number"),
        ({"target_modules": ["v_proj"]}, "no tensors for model.layers.0.self_attn.v_proj"),
        ({"target_modules": ["w1"]}, "no tensors for model.layers.1.block_sparse_moe.experts.3.w1"),
    ],
)
def test_a_config_that_is_refused(tmp_path, config, tensors, fields, told):
    assert told in refusal(write(tmp_path, pairs(tensors, Q), **fields), config)


def test_patterns_as_people_write_them_are_matched(tmp_path, config, tensors, base):
    q = f"{LAYER}.self_attn.q_proj"
    factors = pairs(tensors, q)
    pattern = r".*\.(?:0|1|2|3|4|5|6|7)\.self_attn\.(q|k|v|o)_proj"
    patterns = {"alpha_pattern": {r"layers\.[0-9]+\.mlp.*": 100, pattern: 12}}
    adapter = write(tmp_path / "adapter", factors, **patterns)
    same_as_merged(tmp_path, merged(tensors, factors, {q: 12 / RANK}), base, config, adapter, ONE)


@pytest.mark.parametrize(
    ("name", "is_other"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("Qwen/Qwen2.5-7B", True),
        ("mistralai/Mistral-7B-v0.1", True),
        ("mistralai/Mixtral-8x7B-v0.1", False),
        ("TheBloke/mixtral-not-llama", False),
        ("/data/base", False),
        ("", False),
    ],
)
def test_a_base_of_another_family_is_noted(tmp_path, config, tensors, name, is_other):
    adapter = write(tmp_path, pairs(tensors, Q), base_model_name_or_path=name)
    notes = Adapter(adapter, config).notes
    assert [f"trained on {name!r}" in line for line in notes] == [True] * is_other


def test_all_wrong_tensors_are_in_one_line(tmp_path, config, tensors):
    factors = pairs(tensors, Q, ROUTER, f"{EXPERT}.0.w1")
    del factors[f"{Q}.lora_B.weight"]
    factors |= pair("model.layers.7.self_attn.q_proj", (32, 32))
    factors |= pair(f"{LAYER}.self_attn.v_proj", (32, 32))  # 16 outputs in the base
    factors |= pair("lm_head", (64, 32))
    factors[f"{ROUTER}.lora_A.weight"] = np.zeros((RANK, 32), np.int32)
    told = refusal(write(tmp_path, factors), config)
    assert "7 problem(s)" in told  # 2 of layer 7, 2 of the head, and three more
    assert f"missing {PREFIX}{Q}.lora_B.weight" in told
    assert f"extra {PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight" in told
    assert f"extra {PREFIX}lm_head.lora_B.weight" in told
    assert f"{LAYER}.self_attn.v_proj.lora_B.weight: expected shape [16, 3], got [32, 3]" in told
    assert f"{ROUTER}.lora_A.weight: expected dtype" in told


def test_the_wrong_base_is_told_by_its_tensor(tmp_path, config, small_config, tensors):
    adapter = write(tmp_path, pairs(tensors, Q))
    told = refusal(adapter, small_config(hidden_size=48, num_local_experts=4))
    assert f"{PREFIX}{Q}.lora_A.weight: expected shape [3, 48], got [3, 32]" in told


def test_one_pair_of_another_number_of_experts(tmp_path, config):
    a, b = stacked([pair(str(e), (32, 64)) for e in range(8)])
    module = f"{LAYER}.mlp.experts"
    factors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    assert "expected shape [12, 64], got [24, 64]" in refusal(write(tmp_path, factors), config)
    factors = {f"{module}.lora_A.weight": a[:, :32], f"{module}.lora_B.weight": b}
    told = refusal(write(tmp_path, factors), config)
    assert "expected factors of [4, 32, 64] or [4, 128, 32], got [24, 32] and [32, 24]" in told


def test_two_pairs_for_one_parameter(tmp_path, config):
    a, b = stacked([pair(str(e), (32, 64)) for e in range(4)])
    factors = {}
    for stem in (f"{LAYER}.mlp.experts", f"{LAYER}.mlp.experts.base_layer"):
        factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    assert "expected factors of [4, 128, 32], got" in refusal(write(tmp_path, factors), config)


def test_an_adapter_without_tensors(tmp_path, config):
    assert "no tensors" in refusal(write(tmp_path, {}), config)


def test_what_is_not_there(tmp_path, config, tensors, base):
    with pytest.raises(MixtralError, match="adapter nowhere: expected a folder") as caught:
        mj.load(base, adapter="nowhere")
    assert caught.value.code == INPUT_NOT_FOUND
    assert "adapter_config.json" in refusal(tmp_path, config, INPUT_NOT_FOUND)
    write(tmp_path, pairs(tensors, Q))
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(tmp_path, config, INPUT_NOT_FOUND)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    assert "adapter_model.bin is a pickle" in refusal(tmp_path, config)


def test_a_truncated_file_and_an_outside_link(tmp_path, config, tensors):
    path = write(tmp_path / "one", pairs(tensors, Q)) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "adapter_model.safetensors" in refusal(path.parent, config)
    outside = write(tmp_path / "two", pairs(tensors, Q)) / "adapter_model.safetensors"
    path.unlink()
    path.symlink_to(outside)
    assert "a link that leaves the checkpoint" in refusal(path.parent, config)


def test_the_names_of_a_list_need_no_tensors_where_layers_are_chosen(tmp_path, config, tensors):
    factors = pairs(tensors, Q)
    Adapter(write(tmp_path, factors, target_modules=["q_proj"], layers_to_transform=[1]), config)
    Adapter(write(tmp_path, factors, target_modules=["q_proj"], exclude_modules=".*0.*"), config)
    assert "no tensors" in refusal(write(tmp_path, factors, target_modules=["q_proj"]), config)


def test_a_file_that_changes_while_the_model_loads(tmp_path, config, tensors):
    adapter = Adapter(write(tmp_path, pairs(tensors, Q)), config)
    write(tmp_path, pairs(tensors, Q, f"{LAYER}.self_attn.k_proj"))
    with pytest.raises(MixtralError, match="changed while"):
        adapter.attach({}, pytest.fail)
