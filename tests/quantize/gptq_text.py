"""Calibration text for tests: conversations of the kind that the embedded model has learned."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

from examples.tiny.data import as_row
from examples.tiny.text import documents
from mixtral_jax.language_model import EMBEDDED_FOLDER
from tests.convert import checkpoints


def write_text(path: Path, count: int, *, seed: int) -> Path:
    """``count`` documents as .jsonl, some with messages and some with text."""
    rows = map(as_row, itertools.islice(documents(seed), count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_checkpoint(folder: Path, small_config, **fields) -> Path:
    """A random checkpoint of two layers with the embedded model's tokenizer."""
    sizes = {"hidden_size": 64, "head_dim": 16, "num_local_experts": 4, "vocab_size": 2048}
    config = small_config(**(sizes | fields))
    tensors = checkpoints.random_tensors(config)
    scaled = {name: w * 0.1 if w.ndim == 2 else w for name, w in tensors.items()}
    checkpoints.write(folder, config, scaled)
    shutil.copy(EMBEDDED_FOLDER / "tokenizer.model", folder)
    return folder
