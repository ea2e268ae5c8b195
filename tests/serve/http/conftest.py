"""A fake engine, the application around it, and a client that speaks to it without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from mixtral_jax.serve.app import create_app
from tests.serve.http.fake import FakeEngine, options
from tests.test_chat import V3
from tests.test_tokenizer import V1


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(V1, adapters=("poet",))


@pytest.fixture
def engine_v3() -> FakeEngine:
    return FakeEngine(V3)


def application(engine: FakeEngine, *, keys: tuple[bytes, ...] = (), **fields: Any) -> FastAPI:
    """The application around ``engine``."""
    return create_app(engine, engine.tokenizer, options(**fields), keys=keys)


def client_of(engine: FakeEngine, *, keys: tuple[bytes, ...] = (), **fields: Any):
    """An asynchronous client of an application around ``engine``."""
    transport = httpx.ASGITransport(application(engine, keys=keys, **fields))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.fixture(scope="session")
def shared() -> FastAPI:
    """One application for the tests that ask nothing special of it: making one takes 0.1 s."""
    return application(FakeEngine(V1))


@pytest.fixture
async def client(engine: FakeEngine, shared: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    shared.state.service.engine = engine
    transport = httpx.ASGITransport(shared)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as made:
        yield made
