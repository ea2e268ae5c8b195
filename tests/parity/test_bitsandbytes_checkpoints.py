"""Per-expert checkpoints of bitsandbytes: loaded packed, with the logits that it has itself."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.weights import QTensor, expert_matrices
from tests.convert.quantized import published
from tests.convert.quantized.published import GATE, LARGE, bnb_config
from tests.reference import mixtral as reference

pytestmark = pytest.mark.parity
TOKENS = np.arange(24).reshape(2, 12) * 7 % 64


@pytest.fixture(scope="module")
def bnb() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def four_bit(torch, bnb, kind: str, nested: bool, storage: str):
    """(tensors by ending, the matrix that bitsandbytes makes of them again)."""

    def quantize(w: np.ndarray):
        tensor = torch.from_numpy(w).to(torch.bfloat16)
        codes, state = bnb.quantize_4bit(
            tensor,
            blocksize=64,
            quant_type=kind,
            compress_statistics=nested,
            quant_storage=getattr(torch, storage),
        )
        parts = {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {".weight": codes, **parts}, bnb.dequantize_4bit(codes, state).float().numpy()

    return quantize


def eight_bit(torch, bnb):
    def quantize(w: np.ndarray):
        codes, scales, _ = bnb.int8_vectorwise_quant(torch.from_numpy(w).to(torch.float16))
        parts = {
            ".weight": codes,
            ".SCB": scales,
            ".weight_format": torch.zeros((), dtype=torch.uint8),
        }
        dense = bnb.int8_vectorwise_dequant(codes, scales)
        return parts, dense.to(torch.float16).float().numpy()

    return quantize


CASES = {
    "nf4": ("nf4", False, "uint8"),
    "nf4 nested": ("nf4", True, "uint8"),
    "fp4 nested in bf16": ("fp4", True, "bfloat16"),
    "int8": None,
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("has_router", [False, True])
def test_its_checkpoints_have_its_logits(tmp_path, torch, bnb, name, has_router):
    save = importlib.import_module("safetensors.torch").save_file
    case = CASES[name]
    if case is None:
        quantize, quantization = (
            eight_bit(torch, bnb),
            {"load_in_4bit": False, "load_in_8bit": True},
        )
    else:
        quantize, quantization = four_bit(torch, bnb, *case), {"bnb_4bit_quant_type": case[0]}
    dtype = "float16" if case is None else "bfloat16"
    config = reference.small_config(
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=8,
        num_key_value_heads=4,
        torch_dtype=dtype,
    )
    plain = getattr(torch, dtype)
    weights, tensors = reference.random_weights(config, seed=1), {}
    for key, w in weights.items():
        if LARGE.fullmatch(key) or (has_router and GATE.fullmatch(key)):
            parts, weights[key] = quantize(w)
            tensors |= {key.removesuffix(".weight") + end: part for end, part in parts.items()}
        else:
            tensors[key] = torch.from_numpy(w).to(plain)
            weights[key] = tensors[key].float().numpy()
    folder = tmp_path / "src"
    folder.mkdir()
    save(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = {**config, "quantization_config": bnb_config(**quantization)}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    lm = mj.load(folder, mesh="1x1", dtype="float32")
    for i, layer in enumerate(lm.model.layers):
        for w, leaf in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            for e, matrix in enumerate(expert_matrices(getattr(layer.moe.experts, leaf)[...])):
                assert isinstance(matrix, QTensor)
                theirs = weights[f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight"]
                ours = np.asarray(matrix.dequantize())
                rounded = ours.astype(published.DTYPES[dtype]).astype(np.float32)
                np.testing.assert_array_equal(rounded, theirs)
    # Its weights are rounded to 16 bits, ours are not.
    expected = reference.logits(weights, config, TOKENS)
    np.testing.assert_allclose(lm.logits(TOKENS), expected, rtol=0.02, atol=0.03)
