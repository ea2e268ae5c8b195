"""The quantization of a published folder: which method its configuration names, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mixtral_jax.config import CONFIG_NAME
from mixtral_jax.convert.quantized.awq import AWQ
from mixtral_jax.convert.quantized.bitsandbytes import EightBit, FourBit
from mixtral_jax.convert.quantized.form import Method, Note
from mixtral_jax.convert.quantized.fp8 import FP8
from mixtral_jax.convert.quantized.gptq import GPTQ
from mixtral_jax.convert.reader import safe_path
from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.json_file import read_json

QUANTIZATION = "quantization_config"
# Older files beside config.json, and the method that they are of.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}

# What does not touch the weights as they lie in the files: how they were made, how kernels of
# other libraries run them, and which modules were left out (the tensors tell).
_UNUSED = frozenset([
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "exllama_config",
    "hessian", "lm_head", "max_input_length", "meta", "model_file_base_name", "model_name_or_path",
    "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse",
    "pad_token_id", "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16",
    "use_exllama", "modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse",
    "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules", "llm_int8_threshold", "_load_in_4bit", "_load_in_8bit",
    "global_compression_ratio", "ignore", "ignored_layers", "quantization_status", "version",
    "activation_scheme", "kv_cache_scheme", "kv_cache_quant_method",
])  # fmt: skip


def read_method(folder: Path, note: Note) -> Method | None:
    """The method of a published folder.

    Args:
        folder: where the files are.
        note: called with one line for each thing a person should know.

    Returns:
        None where no file says that the weights are quantized.

    Raises:
        MixtralError: exit code 78 for a method, or a variant of one, that is not read.
    """
    config = folder / CONFIG_NAME
    raw = read_json(config).get(QUANTIZATION) if config.is_file() else None
    source = f"{config} {QUANTIZATION}"
    for name, method in FILES.items():
        path = safe_path(folder, name)
        if not path.is_file():
            continue
        beside = {"quant_method": method, **read_json(path)}
        if raw is None:
            raw, source = beside, str(path)
        elif isinstance(raw, dict):
            raw = _joined(raw, beside, source, str(path))
    return None if raw is None else method_of(raw, source=source, note=note)


def _joined(
    raw: Mapping[str, Any], beside: Mapping[str, Any], source: str, path: str
) -> dict[str, Any]:
    """Both files as one; where they contradict each other nobody knows which is right."""
    for key in ("quant_method", "bits", "group_size", "desc_act", "sym", "checkpoint_format"):
        values = [found[key] for found in (raw, beside) if found.get(key) is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise MixtralError(
                f"{source} {key} is {values[0]!r}, but {values[1]!r} in {path}",
                fix="remove the file that does not belong to the weights",
                code=BAD_CONFIG,
            )
    return {**beside, **raw}


def method_of(raw: Any, *, source: str, note: Note = lambda line: None) -> Method:
    """Reads a quantization_config.

    Args:
        raw: the parsed JSON.
        source: what it is called, for error lines.
        note: called with one line if keys are not used.

    Raises:
        MixtralError: as ``read_method``.
    """
    if not isinstance(raw, dict):
        raise MixtralError(
            source, expected="an object", got=type(raw).__name__, fix=_AGAIN, code=BAD_CONFIG
        )
    fields = _Fields(raw, source)
    name = raw.get("quant_method")
    if name is None and (raw.get("load_in_4bit") or raw.get("load_in_8bit")):
        name = "bitsandbytes"
    fields.take("quant_method")
    if not isinstance(name, str) or name not in _METHODS:
        fields.refuse("quant_method", " or ".join(_METHODS), name)
    method = _METHODS[name](fields)
    unknown = sorted(raw.keys() - fields.taken - _UNUSED)
    if unknown:
        note(f"{source}: not used: {', '.join(map(repr, unknown))}")
    return method


_AGAIN = "use the file that was published with the weights"
_PLAIN = "use the checkpoint it was made from, or another quantization of it"


class _Fields:
    """The keys of a quantization_config, and which of them were looked at."""

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw, self.source = raw, source
        self.taken: set[str] = set()

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of the first of several spellings that is there and not null."""
        self.taken.update(names)
        return next((self.raw[name] for name in names if self.raw.get(name) is not None), default)

    def refuse(self, name: str, expected: str, got: object, fix: str = _PLAIN) -> NoReturn:
        raise MixtralError(
            f"{self.source} {name}", expected=expected, got=repr(got), fix=fix, code=BAD_CONFIG
        )

    def one_of(self, allowed: tuple[Any, ...], *names: str, default: Any = None) -> Any:
        """A value that must be one of some; a string in any case."""
        value = self.take(*names, default=default)
        folded = value.lower() if isinstance(value, str) else value
        # True == 1 and False == 0 in Python, and no number is meant by a truth value here.
        if not any(folded == a and type(folded) is type(a) for a in allowed):
            self.refuse(names[0], " or ".join(map(repr, allowed)), value)
        return folded

    def absent(self, name: str, allowed: tuple[Any, ...] = (None, False, [], {})) -> None:
        """Refuses a key that would change the layout, unless it says nothing."""
        value = self.raw.get(name)
        self.taken.add(name)
        if value not in allowed:
            self.refuse(name, "none", value)

    def group_size(self, *names: str) -> int | None:
        """Inputs per group; None for -1 (or null), which is all of them."""
        value = self.take(*names, default=-1)
        is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not is_size and value != -1:
            self.refuse(names[0], "a positive number, or -1", value)
        return value if is_size else None


def _gptq(fields: _Fields) -> Method:
    for name in ("is_marlin_format", "rotation"):
        fields.absent(name)
    fields.one_of(("int32",), "pack_dtype", default="int32")
    overrides = fields.take("dynamic", default={})
    skips = isinstance(overrides, dict) and all(key.startswith("-:") for key in overrides)
    if not skips:  # "-:pattern" leaves modules unquantized, which their tensors tell
        fields.refuse("dynamic", "one setting for all modules", overrides)
    return GPTQ(
        bits=fields.one_of((2, 3, 4, 8), "bits"),
        group_size=fields.group_size("group_size"),
        is_symmetric=fields.one_of((True, False), "sym", default=True),
        has_order=fields.one_of((True, False), "desc_act", default=True),
        is_v2=fields.one_of(("gptq", "gptq_v2"), "checkpoint_format", "format", default="gptq")
        == "gptq_v2",
    )


def _awq(fields: _Fields) -> Method:
    fields.one_of((4,), "bits", "w_bit")
    fields.one_of((True,), "zero_point", default=True)
    fields.one_of(("gemm",), "version", "format", default="gemm")
    return AWQ(group_size=fields.group_size("group_size", "q_group_size"))


def _bitsandbytes(fields: _Fields) -> Method:
    four, eight = (
        fields.one_of((True, False), name, default=False)
        for name in ("load_in_4bit", "load_in_8bit")
    )
    if four == eight:
        fields.refuse("load_in_4bit", "either it or load_in_8bit", four)
    return FourBit() if four else EightBit()


def _fp8(fields: _Fields) -> Method:
    fields.absent("weight_block_size")
    fields.one_of(("e4m3",), "fmt", default="e4m3")
    return FP8()


def _compressed_tensors(fields: _Fields) -> Method:
    fields.one_of(("float-quantized", "naive-quantized"), "format")
    sparsity = fields.take("sparsity_config", default={})
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        fields.refuse("sparsity_config", "none", sparsity)
    groups = fields.take("config_groups", default={})
    if not isinstance(groups, dict) or not groups:
        fields.refuse("config_groups", "groups of modules", groups, _AGAIN)
    wanted: dict[str, tuple[Any, ...]] = {
        "num_bits": (8,),
        "type": ("float",),
        "strategy": ("tensor", "channel"),
        "symmetric": (True, None),
        "dynamic": (False, None),
    }
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        for key, allowed in wanted.items():
            if weights.get(key) not in allowed:
                expected = " or ".join(repr(a) for a in allowed if a is not None)
                fields.refuse(f"config_groups {name} weights {key}", expected, weights.get(key))
    return FP8()


_METHODS: dict[str, Callable[[_Fields], Method]] = {
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
}
