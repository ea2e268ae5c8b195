"""--adapter: base plus update in every tensor that the adapter knows; nothing lost in silence."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.merge import product
from mixtral_jax.convert.orbax import read_leaf
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, INTERRUPTED, OUTPUT_EXISTS, MixtralError
from tests.convert import checkpoints, native
from tests.convert.test_adapter import ALPHA, EXPERT, LAYER, RANK, ROUTER, Q, merged, pairs, write
from tests.convert.test_layouts import tensors_in

TOUCHED = (Q, f"{LAYER}.self_attn.o_proj", ROUTER, f"{EXPERT}.2.w1", f"{EXPERT}.2.w2")


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(num_local_experts=4)


@pytest.fixture(scope="module")
def tensors(config):
    return checkpoints.random_tensors(config)


@pytest.fixture(scope="module")
def base(tmp_path_factory, config, tensors) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("merge") / "hf", config, tensors)


def refusal(src, dst, adapter, code=BAD_DATA, **options) -> str:
    with pytest.raises(MixtralError) as caught:
        convert(src, dst, ConvertOptions(adapter=str(adapter), **options))
    assert caught.value.code == code
    assert not dst.exists()
    return str(caught.value)


def assert_merged(found, base, want, touched) -> None:
    """Touched tensors are those of ``want`` and not those of the base; the others keep bytes."""
    assert found.keys() == want.keys()
    for name in want:
        if name.removesuffix(".weight") in touched:
            np.testing.assert_allclose(found[name], want[name], rtol=1e-5, atol=1e-6)
            assert not checkpoints.same_bits(found[name], base[name]), name
        else:
            assert checkpoints.same_bits(found[name], base[name]), name


@pytest.mark.parametrize("layout", ["original", "fused", "native", "native_stacked", "ours"])
def test_adapter_is_added_to_every_layout(tmp_path, config, tensors, base, layout):
    src = tmp_path / "src"
    if layout == "ours":
        convert(base, src)
    elif layout == "original":
        src = base
    elif layout == "fused":
        checkpoints.write(src, config, checkpoints.fused(tensors, config))
    else:
        native.write_layout(layout, src, config, tensors)
    factors = pairs(tensors, *TOUCHED)
    adapter = str(write(tmp_path / "adapter", factors))
    options = ConvertOptions(adapter=adapter, format="safetensors", verify=True)
    convert(src, tmp_path / "out", options)
    convert(src, tmp_path / "out", options)  # a finished output is proved with the adapter, too
    assert_merged(tensors_in(tmp_path / "out"), tensors, merged(tensors, factors), TOUCHED)
    assert ALPHA / RANK != 1


def test_one_pair_for_all_experts(tmp_path, config, tensors, base):
    """The style of transformers 5: A has the experts outermost, B innermost."""
    E, F, D = config.num_local_experts, config.intermediate_size, config.hidden_size
    draw = np.random.default_rng(0)
    stem = "model.layers.0.mlp.experts"
    factors, want, touched = {}, dict(tensors), []
    for nested, (out, summed) in ((".base_layer", (2 * F, D)), ("", (D, F))):
        a = draw.standard_normal((E, RANK, summed), np.float32)
        b = draw.standard_normal((out, RANK, E), np.float32)
        factors[f"{stem}{nested}.lora_A.weight"] = a.reshape(E * RANK, summed)
        factors[f"{stem}{nested}.lora_B.weight"] = b.reshape(out, RANK * E)
        for e in range(E):
            delta = ALPHA / RANK * (b[:, :, e] @ a[e])
            parts = {"w1": delta[:F], "w3": delta[F:]} if nested else {"w2": delta}
            for w, part in parts.items():
                name = f"model.layers.0.block_sparse_moe.experts.{e}.{w}"
                want[f"{name}.weight"] = want[f"{name}.weight"] + part
                touched.append(name)
    adapter = write(tmp_path / "adapter", factors)
    convert(base, tmp_path / "out", ConvertOptions(adapter=str(adapter), format="safetensors"))
    assert_merged(tensors_in(tmp_path / "out"), tensors, want, touched)


def test_bfloat16_rounds_once_and_float32_not_at_all(tmp_path, small_config):
    config = small_config(num_local_experts=4, dtype="bfloat16")
    tensors = checkpoints.random_tensors(config)
    factors = pairs(tensors, Q)
    wide = {name: w.astype(np.float32) for name, w in tensors.items()}
    want = merged(wide, factors)[f"{Q}.weight"]
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    adapter = str(write(tmp_path / "adapter", factors))
    leaf = "layers.1.attention.q_proj"
    convert(src, tmp_path / "bf16", ConvertOptions(adapter=adapter))
    convert(src, tmp_path / "f32", ConvertOptions(adapter=adapter, dtype="float32"))
    exact = read_leaf(tmp_path / "f32", leaf)
    np.testing.assert_allclose(exact, want, rtol=1e-5, atol=1e-6)
    assert checkpoints.same_bits(
        read_leaf(tmp_path / "bf16", leaf), exact.astype(ml_dtypes.bfloat16)
    )


def test_a_change_that_rounding_would_lose_is_refused(tmp_path, small_config):
    config = small_config(num_local_experts=4, dtype="bfloat16")
    src = checkpoints.write(tmp_path / "hf", config, checkpoints.random_tensors(config))
    tensors = checkpoints.random_tensors(config)
    factors = pairs(tensors, Q, f"{EXPERT}.2.w1")
    factors[f"{EXPERT}.2.w1.lora_B.weight"] *= np.float32(1e-9)
    adapter = write(tmp_path / "adapter", factors)
    line = refusal(src, tmp_path / "out", adapter)
    assert f"{EXPERT}.2.w1.weight: the adapter changes nothing" in line
    assert "lost when rounded to bfloat16; fix: merge with --dtype float32" in line
    options = ConvertOptions(adapter=str(adapter), dtype="float32")
    assert convert(src, tmp_path / "out", options)


def test_adapter_of_zeros_is_refused_and_some_zeros_are_noted(tmp_path, tensors, base):
    factors = pairs(tensors, *TOUCHED)
    for name in (Q, f"{EXPERT}.2.w2"):
        factors[f"{name}.lora_B.weight"] *= 0
    adapter = write(tmp_path / "some", factors)
    notes: list[str] = []
    options = ConvertOptions(adapter=str(adapter), format="safetensors")
    convert(base, tmp_path / "out", options, note=notes.append)
    assert notes == [f"{adapter}: 2 of 5 updates are zero and change nothing"]
    touched = [name for name in TOUCHED if name not in (Q, f"{EXPERT}.2.w2")]
    assert_merged(tensors_in(tmp_path / "out"), tensors, merged(tensors, factors), touched)
    none = {name: w * 0 if ".lora_B." in name else w for name, w in factors.items()}
    line = refusal(base, tmp_path / "none", write(tmp_path / "zeros", none))
    assert "every update of the adapter is zero" in line


@pytest.mark.parametrize("fault", ["extra", "half", "misshapen", "nan", "foreign"])
def test_an_adapter_that_does_not_fit_writes_nothing(tmp_path, tensors, base, fault):
    factors = pairs(tensors, *TOUCHED)
    name = f"{Q}.lora_A.weight"
    if fault == "extra":
        name = "model.layers.7.self_attn.q_proj.lora_A.weight"
        factors[name] = factors[f"{Q}.lora_A.weight"]
    elif fault == "half":
        name = f"{Q}.lora_B.weight"
        del factors[name]
    elif fault == "misshapen":
        factors[name] = factors[name][:, 1:]
    elif fault == "nan":
        factors[name] = np.full_like(factors[name], np.nan)
    else:
        name = "lm_head.lora_magnitude_vector"
        factors[name] = np.ones(3, np.float32)
    line = refusal(base, tmp_path / "out", write(tmp_path / "adapter", factors))
    assert name in line
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_adapter_files_that_are_missing_or_damaged(tmp_path, tensors, base):
    adapter = write(tmp_path / "adapter", pairs(tensors, Q))
    path = adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert str(path) in refusal(base, tmp_path / "out", adapter)
    path.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    assert "is a pickle" in refusal(base, tmp_path / "out", adapter)
    path.write_bytes(content)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refusal(base, tmp_path / "out", adapter)
    assert "nowhere" in refusal(base, tmp_path / "out", "nowhere", INPUT_NOT_FOUND)


def test_another_adapter_is_another_conversion(tmp_path, tensors, base):
    factors = pairs(tensors, *TOUCHED)
    first = ConvertOptions(adapter=str(write(tmp_path / "first", factors)))
    with pytest.raises(MixtralError) as caught:
        convert(base, tmp_path / "out", first, stop=iter([False] * 9 + [True]).__next__)
    assert caught.value.code == INTERRUPTED
    changed = {name: w * 2 for name, w in factors.items()}
    others = [
        write(tmp_path / "changed", changed),
        write(tmp_path / "scaled", factors, lora_alpha=ALPHA * 2),
    ]
    for other in others:
        with pytest.raises(MixtralError, match="other options") as caught:
            convert(base, tmp_path / "out", ConvertOptions(adapter=str(other)))
        assert caught.value.code == OUTPUT_EXISTS
    resumed = convert(base, tmp_path / "out", first)
    assert resumed.digest == convert(base, tmp_path / "whole", first).digest
    assert resumed.digest != convert(base, tmp_path / "plain").digest


def test_merged_bytes_depend_on_no_blas():
    """Rank after rank: each element is the sum that Python's own arithmetic gives."""
    draw = np.random.default_rng(0)
    b, a = (draw.standard_normal(shape).astype(np.float32) for shape in ((3, 7), (7, 5)))
    got = product(b, a)
    for row in range(3):
        for column in range(5):
            total = np.float32(0)
            for r in range(7):
                total = np.float32(total + np.float32(b[row, r] * a[r, column]))
            assert got[row, column] == total


def test_an_update_that_is_zero_as_a_product_or_by_its_scale_is_refused(tmp_path, tensors, base):
    factors = pairs(tensors, Q)
    a, b = (factors[f"{Q}.lora_{letter}.weight"] for letter in "AB")
    a[:], b[:] = 0, 0
    a[0], b[:, 1] = 1, 1  # neither is zero, their product is
    adapter = write(tmp_path / "product", factors)
    assert f"{Q}.weight: the adapter changes nothing" in refusal(base, tmp_path / "a", adapter)
    adapter = write(tmp_path / "scale", pairs(tensors, Q), lora_alpha=0)
    assert "every update of the adapter is zero" in refusal(base, tmp_path / "b", adapter)


def test_experts_without_an_update_keep_the_sign_of_their_zeros(tmp_path, config, tensors):
    w1, w2 = (f"{EXPERT}.{e}.w1.weight" for e in (0, 2))
    signed = {**tensors, w1: tensors[w1].copy()}
    signed[w1][0] = -0.0
    src = checkpoints.write(tmp_path / "src", config, signed)
    adapter = write(tmp_path / "adapter", pairs(tensors, w2.removesuffix(".weight")))
    convert(src, tmp_path / "out", ConvertOptions(adapter=str(adapter), format="safetensors"))
    assert checkpoints.same_bits(tensors_in(tmp_path / "out")[w1], signed[w1])


def test_another_adapter_of_the_same_shape_is_another_conversion(tmp_path, tensors, base):
    """Also where it differs outside any sample of its bytes."""
    factors = pairs(tensors, Q, f"{LAYER}.self_attn.o_proj")
    options = ConvertOptions(adapter=str(write(tmp_path / "adapter", factors)))
    convert(base, tmp_path / "out", options)
    for factor in factors.values():
        factor[-1, -1] *= -1
    write(tmp_path / "adapter", factors)
    with pytest.raises(MixtralError) as caught:
        convert(base, tmp_path / "out", options)
    assert caught.value.code == OUTPUT_EXISTS


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "no tensors for lm_head"),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
            "no tensors for model.layers.0.mlp.experts.gate_up_proj",
        ),
    ],
)
def test_half_an_adapter_is_refused(tmp_path, tensors, base, fields, missing):
    every = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    adapter = write(tmp_path / "adapter", pairs(tensors, *every), **fields)
    assert missing in refusal(base, tmp_path / "out", adapter)


def test_targets_that_no_model_of_ours_has_are_noted(tmp_path, tensors, base):
    every = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    fields = {"target_modules": ["q_proj", "gate_proj"]}
    adapter, notes = write(tmp_path / "adapter", pairs(tensors, *every), **fields), []
    convert(base, tmp_path / "out", ConvertOptions(adapter=str(adapter)), note=notes.append)
    assert any("this model has no 'gate_proj'" in line for line in notes)


def test_merged_values_too_large_say_so(tmp_path, small_config):
    config = small_config(dtype="float16")
    tensors = checkpoints.random_tensors(config)
    src = checkpoints.write(tmp_path / "src", config, tensors)
    factors = {name: 900 * factor for name, factor in pairs(tensors, Q).items()}
    line = refusal(src, tmp_path / "out", write(tmp_path / "adapter", factors))
    assert "merged with the adapter has values too large for float16" in line
