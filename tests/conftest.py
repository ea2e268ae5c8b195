"""For every test: eight simulated devices, checked shapes, and small configurations."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from tests.environ import DEVICES_FLAG, EMITTERS, HAS_OLDER_EMITTERS, without_devices

# Before JAX is imported: it reads both once. A GPU run asks for its platform by name, as in
# `MIXTRAL_JAX_TEST_PLATFORM=cuda pytest -m gpu`.
NUM_SIMULATED_DEVICES = 8
os.environ["JAX_PLATFORMS"] = os.environ.get("MIXTRAL_JAX_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{without_devices()['XLA_FLAGS']} {DEVICES_FLAG}={NUM_SIMULATED_DEVICES}".strip()
)
# Most of the time goes into compiling, which takes half as long with the older emitters of loops.
# `make slow` and `make parity` keep LLVM's optimizations and what users run.
if "MIXTRAL_JAX_TEST_OPTIMIZED" not in os.environ:
    os.environ["XLA_FLAGS"] += (
        " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    )
    if HAS_OLDER_EMITTERS:
        os.environ["XLA_FLAGS"] += f" --{EMITTERS}=false"

# What one process compiles serves the others: workers of this run, and commands that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mixtral-jax-tests-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Before the hook: ModelConfig checks its own fields, and its refusals are what its tests read.
from mixtral_jax.config import ModelConfig
from tests import typechecker

# Annotated shapes and types are checked at every call of what is imported from here on.
install_import_hook("mixtral_jax", f"{typechecker.__name__}.check")

# A first example compiles, so its time says nothing. In CI the examples are the same every time.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_finish() -> None:
    """Tracing makes millions of small objects: a tenth of the time went into looking for cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


MOST_MAPPINGS = 40_000  # of the 65,530 that Linux allows; a compiled program holds hundreds


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Forgets compiled programs before their memory mappings run out, which would be a crash."""
    yield
    try:
        with open("/proc/self/maps", "rb") as maps:
            mappings = sum(1 for _ in maps)
    except OSError:
        return
    if mappings > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def small_config() -> Callable[..., ModelConfig]:
    """A factory of configurations that compile in moments; any field can be given."""

    def make(**fields: Any) -> ModelConfig:
        small: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 128,
            "rope_theta": 1e4,
            "dtype": "float32",
        }
        return ModelConfig(**(small | fields))

    return make
