"""Long matrices of tests: a few cases always, the others with ``-m slow``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def mostly_slow(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """All cases, those that are not kept behind the slow marker; a kept one must be a case."""
    cases = list(cases)
    assert set(kept) <= set(cases), set(kept) - set(cases)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def in_turn(cases: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """All pairs; a case with one of the others, which take turns, always, and the rest slow."""
    return [
        pytest.param(case, other, marks=[] if i % len(others) == k else [pytest.mark.slow])
        for i, case in enumerate(cases)
        for k, other in enumerate(others)
    ]
