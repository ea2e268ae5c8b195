"""Sizes as people write them, and a sum that never passes its budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.errors import INTERNAL, USAGE, MixtralError
from mixtral_jax.offload.ledger import Ledger, parse_size, size_for


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("256MB", 256 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("24 GB", 24 * 10**9),
        ("512k", 512_000),
        ("7", 7),
        (4096, 4096),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "20GBps", "1e9", "0MB", "1,5GB", "20 G B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(MixtralError, match="a size like 20GB") as error:
        parse_size(text)
    assert error.value.code == USAGE


@given(st.integers(1, 10**13))
def test_a_size_that_is_told_is_enough(num_bytes):
    assert num_bytes <= parse_size(size_for(num_bytes)) < num_bytes + 10**6


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=30))
def test_the_sum_stays_within_the_budget(entries):
    ledger, highest = Ledger(100), 0
    for kind, size in entries:
        before = dict(ledger.held)
        total = ledger.total - before.get(kind, 0) + size
        if total <= 100:
            ledger.replace(kind, size)
            assert ledger.total == total
            assert ledger.room == 100 - total
            highest = max(highest, total)
        else:
            with pytest.raises(MixtralError) as error:
                ledger.replace(kind, size)
            assert error.value.code == INTERNAL
            return
    assert ledger.peak == highest == sum(ledger.at_peak.values())
