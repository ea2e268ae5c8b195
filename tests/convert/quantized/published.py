"""Writes small quantized Mixtral checkpoints, each beside the plain weights that it stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from tests.convert.quantized import packers
from tests.convert.quantized.packers import Packer
from tests.reference import mixtral as reference

GATE = re.compile(r".*\.block_sparse_moe\.gate\.weight")
LARGE = re.compile(r".*\.(self_attn\.[qkvo]_proj|block_sparse_moe\.experts\.\d+\.w[123])\.weight")
UNFUSED = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class Case(NamedTuple):
    """A way of publishing: how a matrix is packed, and what the configuration says."""

    pack: Packer
    quantization: dict[str, Any]
    dtype: str = "float16"
    is_unfused: bool = False
    has_router: bool = False  # the router is quantized as well
    has_head: bool = False  # and lm_head


def gptq_config(bits: int, group_size: int, order: bool, sym: bool, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "damp_percent": 0.1,
        "desc_act": order,
        "sym": sym,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        **more,
    }


def gptq_case(
    bits: int = 4,
    group_size: int = 128,
    *,
    order: bool = False,
    sym: bool = True,
    v2: bool = False,
    **fields: Any,
) -> Case:
    pack = packers.gptq(bits=bits, group_size=group_size, order=order, sym=sym, v2=v2)
    more = {"checkpoint_format": "gptq_v2"} if v2 else {}
    return Case(pack, gptq_config(bits, group_size, order, sym, **more), **fields)


def bnb_config(**fields: Any) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    } | fields


def compressed_config(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    weights |= {"dynamic": False, "group_size": None, "block_structure": None, "observer": "minmax"}
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*block_sparse_moe.gate"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
    }


AWQ_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 64,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["gate"],
}
CASES = {
    "gptq4 128": gptq_case(),
    "gptq4 one group order": gptq_case(4, -1, order=True),
    "gptq4 32 order unfused": gptq_case(4, 32, order=True, is_unfused=True),
    "gptq3 32 asym": gptq_case(3, 32, sym=False),
    "gptq3 128 order v2": gptq_case(3, 128, order=True, v2=True),
    "gptq2 64 v2 asym": gptq_case(2, 64, sym=False, v2=True, is_unfused=True),
    "gptq8 one group": gptq_case(8, -1, has_router=True),
    "gptq8 128 order head": gptq_case(8, 128, order=True, has_head=True),
    "awq": Case(packers.awq(group_size=64), AWQ_CONFIG),
    "fp8 channel": Case(packers.fp8(per_row=True), compressed_config("channel"), "bfloat16"),
    "fp8 tensor": Case(
        packers.fp8(per_row=False, scale_dtype=np.float32, input_scale=True),
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        "bfloat16",
    ),
    "nf4": Case(packers.four_bit("nf4"), bnb_config(), "bfloat16"),
    "nf4 nested router": Case(
        packers.four_bit("nf4", nested=True),
        bnb_config(bnb_4bit_use_double_quant=True),
        "bfloat16",
        has_router=True,
    ),
    "fp4 in bf16": Case(
        packers.four_bit("fp4", storage=ml_dtypes.bfloat16),
        bnb_config(bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="bfloat16"),
        "bfloat16",
    ),
    "int8": Case(packers.eight_bit(), bnb_config(load_in_4bit=False, load_in_8bit=True), "float16"),
}


class Published(NamedTuple):
    """The tensors of a checkpoint, its config.json, and the plain weights it stands for (f32)."""

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    quantized: frozenset[str]  # names of the weights that are

    def write(self, folder: Path, **files: Mapping[str, Any]) -> Path:
        """Writes a folder; ``files`` are more JSON files by their stems."""
        folder.mkdir(parents=True)
        for stem, content in {"config": self.config, **files}.items():
            (folder / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def publish(case: Case, seed: int = 0, **fields: Any) -> Published:
    """A random checkpoint of 2 layers and 8 experts."""
    fields = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8} | fields
    config = reference.small_config(
        num_key_value_heads=4, torch_dtype=case.dtype, sliding_window=4096, **fields
    )
    rng = np.random.default_rng(seed)
    tensors, quantized = {}, set()
    weights = reference.random_weights(config, seed)
    for name, w in weights.items():
        spelled = unfused(name) if case.is_unfused else name
        is_wanted = LARGE.fullmatch(name) or (case.has_router and GATE.fullmatch(name))
        if is_wanted or (case.has_head and name == "lm_head.weight"):
            packed = case.pack(rng, *w.shape)
            stem = spelled.removesuffix(".weight")
            tensors |= {stem + ending: array for ending, array in packed.tensors.items()}
            weights[name] = packed.matrix
            quantized.add(name)
        else:
            tensors[spelled] = w.astype(DTYPES[case.dtype])
            weights[name] = tensors[spelled].astype(np.float32)
    config = {**config, "quantization_config": case.quantization}
    return Published(tensors, config, weights, frozenset(quantized))


def unfused(name: str) -> str:
    """A name as GPTQModel spells it."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"\.(w[123])\.weight", lambda m: f".{UNFUSED[m[1]]}.weight", name)
