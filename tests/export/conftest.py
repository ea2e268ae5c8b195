"""The loader, and the embedded model with its export, for every test here."""

from __future__ import annotations

from pathlib import Path

import pytest

import mixtral_jax as mj
from tests.export.exported import Loader, write_export


@pytest.fixture(scope="session")
def tiny() -> mj.LanguageModel:
    """The embedded model."""
    return mj.load("tiny", mesh="1x1")


@pytest.fixture(scope="session")
def exported_tiny(tmp_path_factory) -> Path:
    """Its export for the CPU; copy it to change it."""
    dst = tmp_path_factory.mktemp("export") / "tiny"
    write_export("tiny", dst)
    return dst


@pytest.fixture
def run_py(monkeypatch, capsys) -> Loader:
    """Runs the loader of an exported folder."""
    return Loader(monkeypatch, capsys)
