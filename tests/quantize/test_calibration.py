"""Calibration text: which tokens a window holds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.quantize.calibration import digest, read_windows
from mixtral_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(EMBEDDED_FOLDER)


def windows(path: Path, samples: int = 100, length: int = 16) -> list[list[int]]:
    found = read_windows(path, TOKENIZER, samples=samples, length=length)
    return [window.tolist() for window in found]


def test_text_is_cut_into_windows_that_begin_with_bos(tmp_path):
    text = "one two three\nfour five six\n" * 20
    path = tmp_path / "a.txt"
    path.write_text(text)
    found = windows(path)
    assert all(window[0] == TOKENIZER.bos_id for window in found)
    assert {len(window) for window in found[:-1]} == {16}
    joined = [token_id for window in found for token_id in window[1:]]
    assert joined == TOKENIZER.encode(text, bos=False)
    assert windows(path, samples=3) == found[:3]


def test_documents_of_a_jsonl_do_not_share_windows(tmp_path):
    path = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "12+30="}, {"role": "assistant", "content": "42"}]
    rows = [{"text": "red"}, {"messages": chat}, {"text": "blue"}, {"messages": chat[:1]}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    red, answered, blue, asked = windows(path, length=64)
    assert red == TOKENIZER.encode("red")
    assert blue == TOKENIZER.encode("blue")
    assert answered[: len(asked)] == asked
    assert answered[-1] == TOKENIZER.eos_id
    assert TOKENIZER.decode(answered[len(asked) : -1]) == "42"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}\n", "line 1: expected an object with 'text' or 'messages'"),
        (b'{"text": "a"}\nno\n', "line 2: expected JSON"),
        (b'{"text": "\xff"}\n', "line 1: expected UTF-8"),
        (b'{"messages": [{"role": "x"}]}\n', "line 1: messages"),
        (b"\n", "expected some text"),
    ],
)
def test_lines_that_hold_no_text_are_named(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(MixtralError, match=words) as refusal:
        windows(path)
    assert refusal.value.code == BAD_DATA


def test_the_digest_tells_windows_apart(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one two three four five six seven eight nine ten")
    read = [read_windows(path, TOKENIZER, samples=9, length=n) for n in (8, 8, 9)]
    assert digest(read[0]) == digest(read[1]) != digest(read[2])
