"""Text while it is written: what is shown is never taken back, stop strings are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.decode.text import TextStream
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.tokenizer import IncrementalDetokenizer, Tokenizer

TOKENIZER = Tokenizer.from_folder(EMBEDDED_FOLDER)
FIRST_BYTE = next(i for i in range(TOKENIZER.vocab_size) if TOKENIZER.byte_of(i) == 0)


def by_bytes(text: str) -> list[int]:
    """One token per byte, so that every text can be divided anywhere."""
    return [FIRST_BYTE + byte for byte in text.encode("utf-8")]


def written(ids: list[int], stop: tuple[str, ...], prompt_ids: list[int] | None = None):
    """Pushes ids as generation does; returns the stream and the pieces shown, flush last."""
    stream = TextStream(TOKENIZER, prompt_ids or [], stop)
    shown = []
    for token_id in ids:
        shown.append(stream.push(token_id))
        if stream.is_stopped:
            break
    shown.append(stream.flush())
    return stream, shown


def whole_text(ids: list[int]) -> str:
    detokenizer = IncrementalDetokenizer(TOKENIZER, [])
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the stop string that is complete first (of two, the longer)."""
    for end in range(len(text) + 1):
        sizes = [len(s) for s in stop if text[:end].endswith(s)]
        if sizes:
            return text[: end - max(sizes)]
    return text


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", (), "one two three"),
        ("one two three", ("four",), "one two three"),
        ("one two three", (" two",), "one"),
        ("one", ("one",), ""),
        ("one", ("o",), ""),
        ("one", ("e",), "on"),
        ("one two one", ("one", "two"), ""),
        ("aab", ("ab",), "a"),
        ("aaab", ("aab",), "a"),
        ("abab", ("abac", "bab"), "a"),
        ("abcd", ("abcd", "bc"), "a"),  # complete first, though it begins later
        ("xabc", ("bc", "abc"), "x"),  # complete together: the longer
        ("one tw", (" two",), "one tw"),  # only begun
        ("maison près\n\nUser:", ("\n\nUser:",), "maison près"),
        ("día 日本 noche", ("本",), "día 日"),
        ("smile 😀😁", ("😁",), "smile 😀"),
    ],
)
@pytest.mark.parametrize("division", ["bytes", "pieces"])
def test_stop_strings_are_cut(text, stop, expected, division):
    ids = by_bytes(text) if division == "bytes" else TOKENIZER.encode(text, bos=False)
    stream, shown = written(ids, stop)
    assert stream.text == "".join(shown) == expected
    assert stream.is_stopped == (expected != text)


def test_a_beginning_is_held_back_until_it_is_no_stop():
    stream = TextStream(TOKENIZER, [], ("abc",))
    assert [stream.push(i) for i in by_bytes("xababd")] == ["x", "", "", "ab", "", "abd"]
    assert stream.flush() == ""


def test_what_is_held_at_the_end_is_released():
    stream = TextStream(TOKENIZER, [], ("abc",))
    assert [stream.push(i) for i in by_bytes("xab")] == ["x", "", ""]
    assert stream.flush() == "ab"
    assert not stream.is_stopped


def test_nothing_is_held_without_stop_strings():
    stream, shown = written(by_bytes("maïs"), ())
    assert shown == ["m", "a", "", "ï", "s", ""]
    assert stream.text == "maïs"


def test_a_stop_may_be_met_by_the_flush_alone():
    stream, shown = written(by_bytes("ab日")[:-1], ("b\N{REPLACEMENT CHARACTER}",))
    assert stream.is_stopped
    assert stream.text == "".join(shown) == "a"


def test_nothing_follows_a_stop():
    stream, _ = written(by_bytes("abc"), ("b",))
    assert stream.is_stopped
    assert stream.flush() == ""


def test_a_continuation_keeps_its_space_and_an_answer_does_not():
    prompt, ids = TOKENIZER.encode("the red"), TOKENIZER.encode("house", bos=False)
    assert written(ids, (), prompt)[0].text == " house"
    assert written(ids, ())[0].text == "house"


def test_a_stop_is_not_sought_in_the_prompt():
    stream, _ = written(by_bytes("c"), ("abc",), by_bytes("ab"))
    assert stream.text == "c"
    assert not stream.is_stopped


few_letters = st.text("ab é日", min_size=1, max_size=4)
stops = st.lists(few_letters, max_size=3).map(tuple)
# Bytes of few letters meet stops often; any ids at all give broken characters and control pieces.
letter_ids = st.text("ab é日", max_size=24).map(by_bytes)
any_ids = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=24)


@given(st.data(), letter_ids | any_ids, stops)
def test_shown_text_is_the_final_text_is_the_whole_text_cut(data, ids, stop):
    text = whole_text(ids)
    if text and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(text) - 1))
        stop = (*stop, text[start : start + data.draw(st.integers(1, 5))])
    stream, shown = written(ids, stop)
    expected = cut(text, stop)
    assert "".join(shown) == stream.text == expected
    assert stream.is_stopped == any(s in text for s in stop)


@given(letter_ids | any_ids, stops)
def test_only_the_beginning_of_a_stop_is_held_back(ids, stop):
    stream, shown = TextStream(TOKENIZER, [], stop), ""
    for token_id in ids:
        shown += stream.push(token_id)
        if stream.is_stopped:
            assert shown == stream.text
            break
        held = stream.text[len(shown) :]
        assert stream.text == shown + held
        assert not held or any(s.startswith(held) and s != held for s in stop)


@given(st.text("ab ", max_size=24), stops)
def test_the_text_does_not_depend_on_how_tokens_divide_it(text, stop):
    pieces = TOKENIZER.encode(text, bos=False)
    assert written(pieces, stop)[0].text == written(by_bytes(whole_text(pieces)), stop)[0].text


def test_an_id_past_the_tokenizer_is_shown_as_unknown():
    ids = TOKENIZER.encode("ab", bos=False)
    stream, shown = written([*ids, TOKENIZER.vocab_size + 5, *ids], ())
    assert "".join(shown) == stream.text == "ab\N{REPLACEMENT CHARACTER} ab"
