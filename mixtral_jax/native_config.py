"""params.json, the configuration beside Mistral's own files, in the spelling of config.json.

Two kinds were published: with the keys of transformers (the first release) and with those of
mistral-inference (``dim``, ``n_layers``, ``moe``; its args.py and moe.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixtral_jax.errors import BAD_CONFIG, MixtralError

_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "_sliding_window": "sliding_window",
    "max_seq_len": "max_position_embeddings",
    "num_experts": "num_local_experts",
}
# What mistral-inference takes where its file is silent; the window and context are Mixtral's.
_ROPE_THETA = 1e6
_DTYPE = "bfloat16"


def spelled_as_config(
    raw: Mapping[str, Any],
    *,
    source: str,
    max_positions: Callable[[Mapping[str, Any]], int],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """A params.json mapping under the names of config.json.

    Args:
        raw: the parsed file.
        source: the file's name, for error lines.
        max_positions: the context length, in tokens, of a model of these sizes; mistral-inference
            does not record it.
        note: called with one line for each value that the file does not hold.

    Raises:
        MixtralError: exit code 78 for a model without experts, or a value given twice.
    """
    found: dict[str, Any] = {}
    experts = raw.get("moe")
    if experts is not None and not isinstance(experts, Mapping):
        raise _wrong(source, "moe", "a JSON object", experts)
    fields = {key: value for key, value in raw.items() if key != "moe"} | dict(experts or {})
    for key, value in fields.items():
        name = _NAMES.get(key, key)
        if value is None:
            continue
        if name in found and found[name] != value:
            raise _wrong(source, key, f"{found[name]!r}, as under its other name", value)
        found[name] = value
    if found.get("num_local_experts") is None:
        raise _wrong(source, "moe", "the number of experts of a Mixtral", None)
    for name in ("quantization", "quantization_config"):
        if found.get(name) is not None:
            raise _wrong(source, name, "weights in f32, bf16 or f16", "a quantized checkpoint")
    if found.get("rope_theta") is None and found.get("rope_parameters") is None:
        found["rope_theta"] = _ROPE_THETA
        note(f"{source} has no rope_theta: {_ROPE_THETA:.0f}, as mistral-inference takes")
    if found.get("max_position_embeddings") is None:
        found["max_position_embeddings"] = max_positions(found)
        tokens = found["max_position_embeddings"]
        note(f"{source} has no context length: {tokens} tokens, as published for these sizes")
    if found.get("dtype") is None and found.get("torch_dtype") is None:
        found["dtype"] = _DTYPE
    return found


def _wrong(source: str, field: str, expected: str, got: object) -> MixtralError:
    return MixtralError(
        f"{source} field {field}",
        expected=expected,
        got=repr(got),
        fix="use the params.json that was published with the weights",
        code=BAD_CONFIG,
    )
