"""Engines for tests: of a small random model without text, and of the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mixtral_jax.language_model import EMBEDDED_FOLDER, LanguageModel, load
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.serve.engine import Engine
from mixtral_jax.serve.limits import EngineOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.tokenizer import Tokenizer
from tests.models import random_model

# Two classes of slots, prompts of several chunks, and a cache that a few prompts fill.
SMALL = EngineOptions(
    max_total_tokens=512,
    max_batch_size=6,
    prefill_chunk=16,
    prefix_cache_bytes=0,
    max_concurrent_requests=200,
)

TEXT = EngineOptions(max_total_tokens=128, prefill_chunk=32, max_concurrent_requests=500)


@pytest.fixture(scope="session")
def small_lm(small_config) -> LanguageModel:
    config = small_config(initializer_range=0.2, max_position_embeddings=512, num_local_experts=4)
    spec = MeshSpec.parse("1x1")
    return LanguageModel(random_model(config), tokenizer=None, placement=LOCAL, spec=spec)


@pytest.fixture(scope="module")
def make_engine() -> Iterator[Callable[..., Engine]]:
    """Starts engines that end with the module."""
    engines: list[Engine] = []

    def make(lm: LanguageModel, options: EngineOptions = SMALL, **kwargs) -> Engine:
        engine = Engine(lm, options, **kwargs)
        engines.append(engine)
        engine.start(wait=True)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def small_engine(make_engine, small_lm) -> Engine:
    return make_engine(small_lm)


@pytest.fixture(scope="session")
def tiny_lm() -> LanguageModel:
    return load()


@pytest.fixture(scope="module")
def tiny_engine(make_engine, tiny_lm) -> Engine:
    return make_engine(tiny_lm, TEXT)


@pytest.fixture(scope="session")
def text_lm(small_config) -> LanguageModel:
    """Random weights with the embedded model's tokenizer: text that means nothing, soon."""
    tokenizer = Tokenizer.from_folder(EMBEDDED_FOLDER)
    config = small_config(
        initializer_range=0.2,
        max_position_embeddings=512,
        num_local_experts=2,
        num_hidden_layers=1,
        vocab_size=tokenizer.vocab_size,
    )
    spec = MeshSpec.parse("1x1")
    return LanguageModel(random_model(config), tokenizer=tokenizer, placement=LOCAL, spec=spec)


@pytest.fixture(scope="module")
def text_engine(make_engine, text_lm) -> Engine:
    return make_engine(text_lm, TEXT)
