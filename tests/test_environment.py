"""What commands compile is kept: a second process finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert import checkpoints

COMMAND = (sys.executable, "-m", "mixtral_jax.sample")
ASK = ("--prompt-ids", "1,2,3", "--mesh", "1x1", "--max-new-tokens", "2", "--ignore-eos")


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_config) -> Path:
    config = small_config(num_hidden_layers=1, num_local_experts=2)
    tensors = checkpoints.random_tensors(config)
    return checkpoints.write(tmp_path_factory.mktemp("model") / "hf", config, tensors)


def sample(model: Path, cache: Path, **more: str) -> str:
    """Runs the command with its caches in a folder of their own; gives what it says."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERS"))
    }
    env = kept | {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"} | more
    command = (*COMMAND, str(model), *ASK)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300)
    return done.stdout


def programs(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*-cache")}


def test_a_second_process_compiles_nothing(model, tmp_path):
    said = sample(model, tmp_path)
    first = programs(tmp_path / "mixtral-jax" / "xla")
    assert len(first) >= 3, "prefill, decode_step and the empty state at least"
    assert sample(model, tmp_path) == said
    assert programs(tmp_path / "mixtral-jax" / "xla") == first


def test_it_can_be_turned_off_and_moved(model, tmp_path):
    sample(model, tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not programs(tmp_path)
    mine = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    sample(model, tmp_path, **mine, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert programs(tmp_path / "mine")
    assert not (tmp_path / "mixtral-jax" / "xla" / "mine").exists()


def test_a_home_that_cannot_be_written_costs_nothing_but_time(model, tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    assert sample(model, file)
