"""The loader, for every test here."""

from __future__ import annotations

import pytest

from tests.export.exported import Loader


@pytest.fixture
def run_py(monkeypatch, capsys) -> Loader:
    """Runs the loader of an exported folder."""
    return Loader(monkeypatch, capsys)
