"""The embedded model is what its script makes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mixtral_jax.config import PRESETS, read_config
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.tokenizer import Tokenizer
from tools import make_tiny

FILE = EMBEDDED_FOLDER / "model.safetensors"
MAX_BYTES = 1_100_000


@pytest.fixture(scope="module")
def committed() -> dict[str, np.ndarray]:
    return load_file(FILE)


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


def test_config_is_the_preset():
    assert read_config(EMBEDDED_FOLDER) == PRESETS["tiny"]


def test_weights_are_reproduced_bit_for_bit(committed):
    assert same_bits(make_tiny.weights(PRESETS["tiny"]), committed)


def test_another_seed_or_one_flipped_bit_is_seen(committed):
    assert not same_bits(make_tiny.weights(PRESETS["tiny"], seed=1), committed)
    name = min(committed)
    flipped = committed[name].copy()
    flipped.view(np.uint16).flat[0] ^= 1
    assert not same_bits({**committed, name: flipped}, committed)


def test_file_opens_in_transformers():
    with safe_open(FILE, framework="np") as tensors:
        assert tensors.metadata() == {"format": "pt"}
    config = json.loads((EMBEDDED_FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MixtralForCausalLM"]


def test_tokenizer_fits_the_model():
    tokenizer = Tokenizer.from_folder(EMBEDDED_FOLDER)
    config = PRESETS["tiny"]
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.bos_id == config.bos_token_id
    assert (tokenizer.eos_id,) == config.eos_token_ids
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in make_tiny.sentences())


def test_folder_is_small_and_readable():
    files = sorted(EMBEDDED_FOLDER.iterdir())
    assert {file.name for file in files} >= {"config.json", "model.safetensors", "tokenizer.model"}
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
