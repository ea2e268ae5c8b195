"""Every token but the first is scored once, behind as many tokens as the docstring says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.config import PRESETS
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.evaluate.windows import DEFAULT_CONTEXT, Window, Windowing, stack, windows


def published(num_tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) of the windows of the example in transformers' documentation."""
    found, previous = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + context, num_tokens)
        found.append((begin, max(previous, begin + 1), end))
        previous = end
        if end == num_tokens:
            break
    return found


@given(st.integers(0, 70), st.integers(2, 20), st.data())
def test_every_token_but_the_first_is_scored_once(num_tokens, context, data):
    stride = data.draw(st.integers(1, context))
    scored: list[int] = []
    for window in windows(iter(range(num_tokens)), context, stride):
        end = window.begin + len(window.token_ids)
        assert window.token_ids == list(range(window.begin, end))
        assert len(window.token_ids) - 1 <= context, "a window's last token is not read"
        for token in range(window.first, end):
            behind = token - window.begin
            assert 1 <= behind <= (context if stride == context else context - 1)
            if window.begin > 0:
                assert behind >= max(context - stride, 1)
            scored.append(token)
    assert scored == list(range(1, num_tokens))


@given(st.integers(2, 70), st.integers(2, 20), st.data())
def test_windows_are_those_of_the_published_example(num_tokens, context, data):
    stride = data.draw(st.integers(1, context - 1))
    ours = [
        (window.begin, window.first, window.begin + len(window.token_ids))
        for window in windows(range(num_tokens), context, stride)
    ]
    assert ours == published(num_tokens, context, stride)


def test_a_stream_is_read_no_further_than_the_window():
    source = iter(range(10**9))
    first = next(windows(source, 8, 4))
    assert first.token_ids == list(range(8))
    assert next(source) == 8


def test_rows():
    cut = list(windows([5, 6, 7, 8, 9], 4, 2))
    rows = stack(cut, 4, 16)
    assert rows.tokens[0, :4].tolist() == [5, 6, 7, 7]
    assert rows.targets[0, :3].tolist() == [6, 7, 8]
    assert rows.targets[rows.is_scored].tolist() == [6, 7, 8, 9]
    assert rows.begin.tolist() == [0, 2, 0, 0]
    assert rows.valid.sum(axis=1).tolist() == [3, 2, 0, 0]
    assert (rows.tokens[2:] == rows.tokens[1]).all()


def test_defaults():
    long, short = PRESETS["mixtral-8x7b"], PRESETS["tiny"]
    assert Windowing().fit([long]) == (DEFAULT_CONTEXT, DEFAULT_CONTEXT // 2)
    longest = short.max_position_embeddings
    assert Windowing(context=longest, stride=longest).fit([long, short]) == (longest, longest)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"context": 1}, "--context: expected at least 2, got 1"),
        ({"stride": 0}, "--stride: expected at least 1, got 0"),
        ({"context": 8, "stride": 9}, "--stride: expected at most the context (8), got 9"),
        ({"context": 10**6}, "(max_position_embeddings), got 1000000"),
    ],
)
def test_refusals(fields, line):
    with pytest.raises(MixtralError) as caught:
        Windowing(**fields).fit([PRESETS["tiny"]])
    assert caught.value.code == USAGE
    assert line in str(caught.value)


def test_nothing_stands_before_the_first_token():
    """A window that scores its own first token would score none at all."""
    with pytest.raises(AssertionError):
        stack([Window(0, 0, [1, 2, 3])], 1, 16)
