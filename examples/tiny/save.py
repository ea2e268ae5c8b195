"""Writes what was trained: a Hugging Face folder, and its curve."""

from __future__ import annotations

import dataclasses
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mixtral_jax.config import ModelConfig, config_to_dict
from mixtral_jax.convert.names import pieces
from mixtral_jax.model.transformer import leaf_specs

# The versions of these may change the result.
PACKAGES = ("jax", "optax", "numpy", "sentencepiece", "num2words")


def model(
    folder: Path, config: ModelConfig, leaves: dict[str, np.ndarray], tokenizer: bytes
) -> None:
    """A folder with config.json, tokenizer.model and bf16 model.safetensors, in published names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_dict(config), indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    tensors = {}
    for piece in pieces("original", leaf_specs(config)):
        leaf, expert = leaves[piece.chunk.leaf], piece.chunk.expert
        part = leaf if expert is None else leaf[expert]
        tensors[piece.rows.tensor] = part.reshape(piece.tensor_shape).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def record(path: Path, found: dict[str, Any], options: Any) -> None:
    """What was found, with what it was made by."""
    unrelated = ("output", "record", "debug")
    made_by = {
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k not in unrelated},
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found | {"made_by": made_by}, indent=1) + "\n")
