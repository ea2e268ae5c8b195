"""Long matrices of tests: a few cases always, the others with ``-m slow``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """All cases, those that are not kept behind the slow marker; a kept one must be a case."""
    cases = list(cases)
    assert set(kept) <= set(cases), set(kept) - set(cases)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]
