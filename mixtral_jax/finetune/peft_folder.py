"""Factors as a PEFT folder, as peft itself writes them for the Mixtral of transformers 5.

There the experts of a layer are two parameters, gate and up joined, so the factors of those two are
joined as well: A one above the other, B in two blocks beside zeros, twice the rank and twice alpha
(as peft joins adapters of single experts). A ``[E * r, in]`` has the experts outermost, B
``[out, r * E]`` innermost (ParamWrapper of peft, tuners/lora/layer.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from mixtral_jax.convert.adapter import CONFIG_NAME, PREFIX, TENSORS_NAME
from mixtral_jax.convert.base_identity import identity_of
from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.finetune.lora import Pair, is_pair
from mixtral_jax.finetune.options import TrainOptions
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.sharding import hosts

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_ROUTER = "mlp.gate.weight"


class _Joined(NamedTuple):
    """Factors of a layer's gate and up as one parameter: A ``[E, R, I]``, B ``[E, O, R]``."""

    a: np.ndarray
    b: np.ndarray


def write_adapter(
    folder: Path,
    lm: LanguageModel,
    options: TrainOptions,
    trained: Mapping[str, Any],
    *,
    base: str | None = None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; process 0 does, all must call it.

    Args:
        folder: is made; files of those names in it are replaced, each at once.
        lm: the base, whose digest goes into the files.
        options: rank, alpha and what they are for.
        trained: Pairs by leaf path.
        base: a name of the base on the Hub; its folder, if not given.

    Raises:
        MixtralError: exit code 78 where something trains whole, which PEFT has no factors for.
    """
    whole = [path for path, leaf in trained.items() if not is_pair(leaf)]
    if whole:
        raise MixtralError(
            f"adapter {folder}: {whole[0]} trains whole",
            fix="save the whole model",
            code=BAD_CONFIG,
        )
    pairs = {path: Pair(*hosts.fetch(tuple(pair))) for path, pair in trained.items()}
    if not hosts.is_first():
        return
    if base is None and lm.folder is not None:
        base = str(lm.folder)
    config, tensors = _config(pairs, base, options), _tensors(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **identity_of(lm.folder)}
    _replace(folder / TENSORS_NAME, lambda path: save_file(tensors, path, metadata=metadata))
    _replace(folder / CONFIG_NAME, lambda path: path.write_text(json.dumps(config, indent=2)))


def _replace(path: Path, write: Any) -> None:
    """A file appears whole, or stays as it was."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)


def _config(pairs: Mapping[str, Pair], base: str | None, options: TrainOptions) -> dict[str, Any]:
    rank, alpha = options.lora_r, options.lora_alpha
    modules = [name for name in _ATTENTION if any(p.endswith(name) for p in pairs)]
    has = {
        part: any(p.endswith(f"experts.{part}") for p in pairs) for part in ("gate", "up", "down")
    }
    parameters, patterns = [], {"rank_pattern": {}, "alpha_pattern": {}}
    if has["gate"] or has["up"]:
        parameters.append(_GATE_UP)
    if has["down"]:
        parameters.append(_DOWN)
    if any(p.endswith("router.weight") for p in pairs):
        parameters.append(_ROUTER)
    if has["gate"] and has["up"]:
        key = r".*\.gate_up_proj"
        patterns["rank_pattern"][key] = 2 * rank
        # So that the scale stays as it is: alpha / r, or alpha / sqrt(r).
        patterns["alpha_pattern"][key] = alpha * (math.sqrt(2) if options.use_rslora else 2)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": options.lora_dropout,
        "target_modules": modules or None,
        "target_parameters": parameters or None,
        "use_rslora": options.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **patterns,
    }


def _tensors(pairs: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def put(module: str, a: np.ndarray, b: np.ndarray) -> None:
        found[f"{PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        found[f"{PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)

    layers = sorted({path.split(".")[1] for path in pairs}, key=int)
    for i in layers:
        name, ours = f"model.layers.{i}", f"layers.{i}"
        for target in _ATTENTION:
            if pair := pairs.get(f"{ours}.attention.{target}"):
                put(f"{name}.self_attn.{target}", *pair)
        if pair := pairs.get(f"{ours}.moe.router.weight"):
            put(f"{name}.mlp.gate", *pair)
        gate, up, down = (pairs.get(f"{ours}.moe.experts.{n}") for n in ("gate", "up", "down"))
        experts = f"{name}.mlp.experts"
        joined = _join(gate, up)
        # peft wraps one parameter after another: the first it names is the innermost.
        if joined is not None:
            put(f"{experts}.base_layer" if down is not None else experts, *_as_parameter(joined))
        if down is not None:
            put(experts, *_as_parameter(_Joined(*down)))
    return found


def _join(gate: Pair | None, up: Pair | None) -> _Joined | None:
    """Factors of ``gate_up_proj [E, 2F, D]``: gate's rows first."""
    if gate is None and up is None:
        return None
    present = gate if gate is not None else up
    assert present is not None
    zeros = np.zeros_like(present.b)
    if gate is None or up is None:
        halves = (present.b, zeros) if up is None else (zeros, present.b)
        return _Joined(np.asarray(present.a), np.concatenate(halves, axis=1))
    a = np.concatenate([gate.a, up.a], axis=1)
    b = np.block([[np.asarray(gate.b), zeros], [zeros, np.asarray(up.b)]])
    return _Joined(a, b)


def _as_parameter(factors: _Joined) -> tuple[np.ndarray, np.ndarray]:
    """As ParamWrapper has them: A ``[E * R, I]``, B ``[O, R * E]``."""
    a = np.asarray(factors.a)
    b = np.asarray(factors.b).transpose(1, 2, 0)
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
