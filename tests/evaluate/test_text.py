"""A text in blocks gives the token ids of the whole text."""

from __future__ import annotations

import io
import os
import tracemalloc

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.evaluate import text as module
from mixtral_jax.evaluate.study import documents_of
from mixtral_jax.evaluate.text import TextFile
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.tokenizer import Tokenizer

WORDS = "the red house 12 + 30 = 42. le jour «bleu» \n Nächte  und\r\nŽluť 日本 🙂 ▁ e\u0301 a_b"


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED_FOLDER)


@pytest.fixture(scope="module")
def joining() -> Tokenizer:
    """Pieces that hold spaces inside, which Mixtral's have not."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the red house of the red house, the red house"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        split_by_whitespace=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def streamed(tokenizer, text, folder, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    path = folder / "text.txt"
    path.write_bytes(text.encode())
    return list(TextFile(path).token_ids(tokenizer))


PIECES = st.one_of(st.sampled_from(WORDS.split(" ")), st.sampled_from([" ", "\n", "  "]), st.text())


@pytest.mark.parametrize("which", ["embedded", "joining"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(text=st.lists(PIECES, min_size=1).map("".join), block=st.integers(1, 40))
@example(text=WORDS, block=1)
@example(text="the red house of the red house", block=5)
def test_ids_are_those_of_the_whole(which, text, block, request, tmp_path, monkeypatch):
    text = text.encode(errors="ignore").decode() or "."
    tokenizer = request.getfixturevalue(which)
    assert streamed(tokenizer, text, tmp_path, monkeypatch, block) == tokenizer.encode(text)


def test_joined_pieces_matter(joining, tmp_path, monkeypatch):
    """The negative control: cut before any space, and the ids are others."""
    text = "the red house of the red house"
    assert any(" " in piece.replace("▁", " ")[1:] for piece in joining.pieces)
    monkeypatch.setattr(module, "_joined_to_ends", lambda tokenizer: set())
    assert streamed(joining, text, tmp_path, monkeypatch, 5) != joining.encode(text)


def test_dataset(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc")
    found = TextFile(path).dataset
    assert (found.file, found.bytes) == ("a.txt", 3)
    # sha256 of "abc", FIPS 180-2
    assert found.sha256.startswith(
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_memory_is_bounded(embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4096)
    path = tmp_path / "long.txt"
    path.write_text("the red house and 12 + 30 = 42.\n" * 60_000)
    text = TextFile(path)
    text_bytes = text.dataset.bytes
    seen: list[int] = []
    tracemalloc.start()
    count = sum(1 for _ in text.token_ids(embedded, seen.append))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > text_bytes / 8
    assert seen[-1] == text_bytes
    assert peak < text_bytes / 4


@pytest.mark.parametrize(
    ("data", "where"), [(b"ab\xff", "at byte 2"), (b"abcde\xc3", "at byte 5"), (b"\xc3a", "byte 0")]
)
def test_what_is_not_utf8_is_refused(data, where, embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(MixtralError) as caught:
        list(TextFile(tmp_path / "a.txt").token_ids(embedded))
    assert caught.value.code == BAD_DATA
    assert where in str(caught.value)


def test_refusals(embedded, tmp_path):
    with pytest.raises(MixtralError) as caught:
        TextFile(tmp_path / "none.txt")
    assert caught.value.code == INPUT_NOT_FOUND
    path = tmp_path / "a.txt"
    path.touch()
    with pytest.raises(MixtralError) as caught:
        TextFile(path)
    assert caught.value.code == BAD_DATA
    path.write_text("one text")
    text = TextFile(path)
    path.write_text("two text")
    with pytest.raises(MixtralError, match="changed while read") as caught:
        list(text.token_ids(embedded))
    assert caught.value.code == BAD_DATA


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL"])
def test_documents_of_lines_are_those_of_the_digest(embedded, tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    text, told = TextFile(path), list[int]()
    found = [list(ids) for ids in documents_of(text, embedded, told.append)]
    assert found == [embedded.encode("one"), embedded.encode("two")]
    assert told[-1] == text.dataset.bytes
    path.write_text('{"text": "one"}\n\n{"text": "six"}\n')
    with pytest.raises(MixtralError, match="changed while read") as caught:
        list(documents_of(text, embedded))
    assert caught.value.code == BAD_DATA


def test_what_can_be_read_once_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(MixtralError, match="no file that can be read more than once") as caught:
        TextFile(tmp_path / "pipe.txt")
    assert caught.value.code == INPUT_NOT_FOUND
