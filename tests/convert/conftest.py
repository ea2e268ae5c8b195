"""Small checkpoints that every test of conversion may read, and must not change."""

from __future__ import annotations

import pytest

from tests.convert import checkpoints


@pytest.fixture(scope="session")
def config(small_config):
    return small_config(dtype="bfloat16")


@pytest.fixture(scope="session")
def tensors(config):
    return checkpoints.random_tensors(config)


@pytest.fixture(scope="session")
def original(tmp_path_factory, config, tensors):
    return checkpoints.write(tmp_path_factory.mktemp("hf") / "original", config, tensors)


@pytest.fixture(scope="session")
def converted(tmp_path_factory, original):
    from mixtral_jax.convert import convert

    folder = tmp_path_factory.mktemp("ours") / "converted"
    convert(original, folder)
    return folder
