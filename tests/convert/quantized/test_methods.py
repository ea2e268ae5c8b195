"""What a quantization_config may say, and that everything else is refused in one line."""

from __future__ import annotations

import pytest

from mixtral_jax.convert.quantized.awq import AWQ
from mixtral_jax.convert.quantized.bitsandbytes import EightBit, FourBit
from mixtral_jax.convert.quantized.fp8 import FP8
from mixtral_jax.convert.quantized.gptq import GPTQ
from mixtral_jax.convert.quantized.methods import method_of
from mixtral_jax.errors import BAD_CONFIG, MixtralError
from tests.convert.quantized.published import (
    AWQ_CONFIG,
    bnb_config,
    compressed_config,
    gptq_config,
)

GPTQ_CONFIG = gptq_config(4, 128, True, True)
V1 = GPTQ(bits=4, group_size=128, is_symmetric=True, has_order=True, is_v2=False)
# As the first releases of Mixtral had it, with the keys of their time.
OLD = GPTQ_CONFIG | {
    "batch_size": 1,
    "block_name_to_quantize": "model.layers",
    "cache_block_outputs": True,
    "dataset": None,
    "disable_exllama": False,
    "exllama_config": {"version": 1},
    "group_size": -1,
    "max_input_length": None,
    "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": [["self_attn.k_proj"]],
    "pad_token_id": None,
    "tokenizer": None,
    "use_cuda_fp16": False,
    "use_exllama": True,
}


@pytest.mark.parametrize(
    ("raw", "method"),
    [
        (GPTQ_CONFIG, V1),
        (OLD, GPTQ(bits=4, group_size=None, is_symmetric=True, has_order=True, is_v2=False)),
        (GPTQ_CONFIG | {"format": "gptq", "pack_dtype": "int32", "meta": {}, "lm_head": False}, V1),
        (GPTQ_CONFIG | {"dynamic": {"-:.*gate": {}}}, V1),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, V1),
        (
            GPTQ_CONFIG | {"checkpoint_format": "gptq_v2", "desc_act": False, "sym": False},
            GPTQ(bits=4, group_size=128, is_symmetric=False, has_order=False, is_v2=True),
        ),
        (AWQ_CONFIG, AWQ(group_size=64)),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": -1, "version": "GEMM"},
            AWQ(group_size=None),
        ),
        (bnb_config(), FourBit()),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, FourBit()),
        (bnb_config(load_in_4bit=False, load_in_8bit=True), EightBit()),
        (compressed_config("channel"), FP8()),
        (compressed_config("tensor") | {"sparsity_config": {"format": "dense"}}, FP8()),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, FP8()),
    ],
)
def test_published_configs_are_read_in_silence(raw, method):
    notes: list[str] = []
    assert method_of(raw, source="config", note=notes.append) == method
    assert notes == []


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], "config: expected an object, got list"),
        ({"quant_method": "hqq"}, "quant_method: expected gptq or awq or .*, got 'hqq'"),
        ({"quant_method": ["gptq"]}, "quant_method: expected"),
        ({}, "quant_method: expected .*, got None"),
        (GPTQ_CONFIG | {"bits": 5}, "bits: expected 2 or 3 or 4 or 8, got 5"),
        (GPTQ_CONFIG | {"bits": "4"}, "bits: expected .*, got '4'"),
        (GPTQ_CONFIG | {"bits": None}, "bits: expected .*, got None"),
        (GPTQ_CONFIG | {"group_size": 0}, "group_size: expected a positive number, or -1, got 0"),
        (GPTQ_CONFIG | {"group_size": True}, "group_size: expected"),
        (GPTQ_CONFIG | {"sym": 1}, "sym: expected True or False, got 1"),
        (GPTQ_CONFIG | {"checkpoint_format": "marlin"}, "checkpoint_format: .*, got 'marlin'"),
        (GPTQ_CONFIG | {"is_marlin_format": True}, "is_marlin_format: expected none, got True"),
        (GPTQ_CONFIG | {"pack_dtype": "int8"}, "pack_dtype: expected 'int32', got 'int8'"),
        (GPTQ_CONFIG | {"dynamic": {"+:.*": {"bits": 8}}}, "dynamic: expected one setting"),
        (AWQ_CONFIG | {"version": "gemv"}, "version: expected 'gemm', got 'gemv'"),
        (AWQ_CONFIG | {"bits": 8}, "bits: expected 4, got 8"),
        (AWQ_CONFIG | {"zero_point": False}, "zero_point: expected True, got False"),
        (bnb_config(load_in_4bit=False), "load_in_4bit: expected either it or load_in_8bit"),
        (bnb_config(load_in_8bit=True), "load_in_4bit: expected either it or load_in_8bit"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_block_size: expected"),
        (compressed_config("group"), "strategy: expected 'tensor' or 'channel', got 'group'"),
        (compressed_config("tensor") | {"format": "pack-quantized"}, "format: expected"),
        (compressed_config("tensor") | {"config_groups": {}}, "config_groups: expected groups"),
        (compressed_config("tensor") | {"config_groups": {"a": 1}}, "num_bits: expected 8"),
        (
            compressed_config("tensor") | {"sparsity_config": {"format": "sparse-bitmask"}},
            "sparsity_config: expected none",
        ),
    ],
)
def test_what_would_be_read_wrongly_is_refused(raw, words):
    with pytest.raises(MixtralError, match=words) as caught:
        method_of(raw, source="config")
    assert caught.value.code == BAD_CONFIG
    assert "\n" not in str(caught.value)


def test_keys_that_nobody_knows_are_told():
    notes: list[str] = []
    method_of(GPTQ_CONFIG | {"zebra": 1, "aardvark": 2}, source="config", note=notes.append)
    assert notes == ["config: not used: 'aardvark', 'zebra'"]
