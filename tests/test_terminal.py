"""Pictures made of characters."""

from __future__ import annotations

import numpy as np

from mixtral_jax.terminal import BLOCKS, expert_load


def test_bars_are_as_high_as_the_shares():
    text = expert_load(np.array([[8, 0, 4, 4], [1, 1, 1, 1]]))
    assert text.splitlines() == [
        "expert   0      1      2      3",
        "layer 0  ██ 50% ▁▁  0% ▅▅ 25% ▅▅ 25%",
        "layer 1  ▅▅ 25% ▅▅ 25% ▅▅ 25% ▅▅ 25%",
    ]


def test_many_experts_have_bars_alone():
    counts = np.arange(1, 33)[None]
    (line,) = expert_load(counts).splitlines()
    label, bars, *shares = line.split("  ")
    assert label == "layer 0"
    assert len(bars) == 32
    assert (bars[0], bars[-1]) == (BLOCKS[0], BLOCKS[-1])
    assert sorted(bars) == list(bars)
    assert shares == ["0.2% to 6.1%"]


def test_no_tokens_are_no_error():
    assert "0%" in expert_load(np.zeros((1, 8), int))
