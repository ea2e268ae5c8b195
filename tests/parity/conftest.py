"""The reference implementations. A parity run without them is an error, never a skip."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture(scope="session")
def torch() -> Any:
    return importlib.import_module("torch")


@pytest.fixture(scope="session")
def transformers() -> Any:
    module = importlib.import_module("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module
