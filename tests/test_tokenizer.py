"""SentencePiece in and out: refusals, control pieces, and text that arrives piece by piece."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import sentencepiece
from hypothesis import given

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.tokenizer import IncrementalDetokenizer, Tokenizer, _any_of, find_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CORPUS = ["the cat sat on the mat", "hello world, hello there", "a dog ate 12 fish", "[INST] hi"]
VOCAB_SIZE = 300


def train(control_symbols: list[str], **options: Any) -> Tokenizer:
    model = io.BytesIO()
    options = {"remove_extra_whitespaces": False} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=VOCAB_SIZE + len(control_symbols),
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        control_symbols=control_symbols,
        minloglevel=2,
        **options,
    )
    return Tokenizer(model.getvalue())


V1 = train([])
V3 = train(["[INST]", "[/INST]", "[TOOL_CALLS]"])
# Decoders of other settings drop other spaces at the start.
TRIMMED = train([], remove_extra_whitespaces=True)
NO_PREFIX = train([], add_dummy_prefix=False)
ALL = {"v1": V1, "v3": V3, "trimmed": TRIMMED, "no prefix": NO_PREFIX}
FIRST_BYTE = next(i for i in range(V1.vocab_size) if V1.byte_of(i) == 0)

tokenizers = pytest.mark.parametrize("tokenizer", ALL.values(), ids=ALL.keys())
unicode_text = st.text(st.characters(exclude_categories=["Cs"]))


def byte_ids(*values: int) -> list[int]:
    return [FIRST_BYTE + value for value in values]


def token_ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids with many bytes that begin or continue a character, controls and spaces."""
    first = next(i for i in range(tokenizer.vocab_size) if tokenizer.byte_of(i) == 0)
    lead = st.sampled_from([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xFF])
    one = st.integers(0, tokenizer.vocab_size - 1) | lead.map(lambda byte: first + byte)
    space = tokenizer.encode("  ", bos=False) or [0]
    return st.lists(one | st.sampled_from([0, 1, 2, *space]), max_size=12)


def stream(tokenizer: Tokenizer, token_ids: list[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


def test_versions_and_control_pieces():
    assert (V1.version, V3.version) == ("v1", "v3")
    assert V1.control_ids == {"<s>": 1, "</s>": 2}
    assert (V3.bos_id, V3.eos_id, V3.control_id("[INST]"), V3.control_id("[/INST]")) == (1, 2, 3, 4)
    assert [V3.is_control(i) for i in (0, 1, 2, 3, 4, 5, 6)] == [False, *[True] * 5, False]
    assert V1.vocab_size == sentencepiece_size(V1)
    with pytest.raises(MixtralError, match=r"control piece \[INST\].*; fix: ") as caught:
        V1.control_id("[INST]")
    assert caught.value.code == BAD_DATA


def sentencepiece_size(tokenizer: Tokenizer) -> int:
    """Counts the ids that decode at all."""
    size = 0
    while True:
        try:
            tokenizer.decode([size])
        except MixtralError:
            return size
        size += 1


@given(text=unicode_text)
def test_text_survives_a_round_trip(text: str):
    text = text.replace("▁", " ")
    assert V1.encode(text)[0] == V1.bos_id
    assert V1.encode(text)[1:] == V1.encode(text, bos=False)
    assert V1.decode(V1.encode(text)) == text
    assert V3.decode(V3.encode(text)) == text


@pytest.mark.parametrize("text", ["<s>", "</s>", "[INST] x [/INST]", "<unk>", "<0x41>"])
def test_control_pieces_spelled_in_a_text_stay_text(text: str):
    token_ids = V3.encode(text, bos=False)
    assert not any(V3.is_control(token_id) for token_id in token_ids)
    assert V3.decode(token_ids) == text


PUBLISHED = ["<s>", "</s>", "[INST]", "[/INST]", *(f"[control_{n}]" for n in range(8, 771))]


@given(st.lists(st.sampled_from([*PUBLISHED[:7], "[control_", "1", "08]", "[", "<", "a|b"])))
def test_any_of_many_names_is_found_as_one_by_one(parts: list[str]):
    names = sorted([*PUBLISHED, "[INST", "a|b"], key=len, reverse=True)  # one begins another
    text = "".join(parts)
    expected = re.findall("|".join(map(re.escape, names)), text)
    assert re.findall(_any_of(names), text) == expected


def test_many_names_cost_a_text_no_more_than_one():
    def seconds(pattern: str) -> float:
        compiled, start = re.compile(pattern), time.perf_counter()
        assert compiled.search("[control_" * 40_000) is None
        return time.perf_counter() - start

    one_by_one = "|".join(map(re.escape, PUBLISHED))
    assert seconds(_any_of(PUBLISHED)) < seconds(one_by_one) / 4  # a twentieth


def test_decode_leaves_control_pieces_out():
    hello = V3.encode("hello", bos=False)
    assert V3.decode([1, 3, *hello, 4, 2, 1]) == "hello"
    assert V3.decode([]) == ""


@pytest.mark.parametrize("token_id", [-1, V1.vocab_size, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(token_id: int):
    for call in (
        lambda: V1.decode([1, token_id]),
        lambda: V1.is_control(token_id),
        lambda: IncrementalDetokenizer(V1).push(token_id),
    ):
        with pytest.raises(MixtralError, match=rf"expected 0 to {V1.vocab_size - 1}, got") as error:
            call()
        assert error.value.code == BAD_DATA


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(MixtralError, match="text at character 2: expected Unicode") as caught:
        V1.encode("ab\ud800")
    assert caught.value.code == BAD_DATA


@tokenizers
@given(data=st.data())
def test_pushes_and_flush_give_the_decoding(tokenizer: Tokenizer, data: st.DataObject):
    token_ids = data.draw(token_ids_of(tokenizer))
    assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@tokenizers
@given(data=st.data(), text=unicode_text, cut=st.integers(0, 40))
def test_a_continuation_is_the_whole_less_the_prompt(
    tokenizer: Tokenizer, data: st.DataObject, text: str, cut: int
):
    token_ids = data.draw(token_ids_of(tokenizer) | st.just(tokenizer.encode(text)))
    prompt, rest = token_ids[:cut], token_ids[cut:]
    whole, before = tokenizer.decode(token_ids), tokenizer.decode(prompt)
    after = "".join(stream(tokenizer, rest, prompt))
    if whole.startswith(before):
        assert before + after == whole
    else:  # the continuation completes a character that the prompt began
        begun = next(n for n in (1, 2, 3) if whole.startswith(before[:-n]))
        assert before[-begun:] == REPLACEMENT * begun
        assert before[:-begun] + after == whole


@given(text=unicode_text.filter(lambda text: REPLACEMENT not in text), prompt=unicode_text)
def test_no_push_shows_half_a_character(text: str, prompt: str):
    token_ids = V1.encode(text.replace("▁", " "), bos=False)
    assert all(REPLACEMENT not in piece for piece in stream(V1, token_ids))
    assert all(REPLACEMENT not in piece for piece in stream(V1, token_ids, V1.encode(prompt)))


def test_a_character_comes_with_its_last_byte():
    assert stream(V1, byte_ids(*"😀".encode())) == ["", "", "", "😀", ""]
    assert stream(V1, byte_ids(*"é".encode(), 0xF0, 0x9F)) == ["", "é", "", "", REPLACEMENT * 2]


def test_a_control_piece_ends_a_character():
    half, rest = byte_ids(*"é".encode())
    assert stream(V1, [half, V1.eos_id, rest]) == ["", REPLACEMENT, REPLACEMENT, ""]


def test_the_space_at_the_start_belongs_to_a_continuation():
    world = V1.encode("world", bos=False)
    assert "".join(stream(V1, world, V1.encode("hello"))) == " world"
    assert "".join(stream(V1, world)) == "world"
    assert "".join(stream(V1, world, [V1.bos_id])) == "world"


def test_a_character_begun_by_the_prompt_is_completed():
    half, rest = byte_ids(*"é".encode())
    prompt = [*V1.encode("cat"), half]
    assert stream(V1, [rest], prompt) == ["é", ""]
    assert stream(V1, [], prompt) == [""]
    assert stream(V1, V1.encode(" dog", bos=False), prompt)[0].startswith(" ")


def test_the_cost_of_a_token_does_not_grow(monkeypatch: pytest.MonkeyPatch):
    """Whatever came before, a push looks at its own piece: counted, not timed."""
    looked_at = 0
    original = Tokenizer._checked

    def counting(self: Tokenizer, token_id: int) -> int:
        nonlocal looked_at
        looked_at += 1
        return original(self, token_id)

    monkeypatch.setattr(Tokenizer, "_checked", counting)
    detokenizer = IncrementalDetokenizer(V1, V1.encode("hello " * 2000))
    assert looked_at < 40
    most = 0
    for token_id in [*V1.encode("the cat é😀 " * 200), *byte_ids(*[0x80] * 2000)]:
        looked_at = 0
        detokenizer.push(token_id)
        most = max(most, looked_at)
    assert 0 < most <= 4
    assert len(detokenizer._bytes) < 4


def test_find_tokenizer_knows_the_published_names(tmp_path: Path):
    assert find_tokenizer(tmp_path) is None
    for name in ("a_tokenizer_1.model.v3", "tokenizer.model.v1", "tokenizer.model.v3"):
        (tmp_path / name).write_bytes(b"x")
        assert find_tokenizer(tmp_path) == tmp_path / name
    (tmp_path / "tokenizer.model").mkdir()
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.model.v3"


def test_a_folder_with_only_tokenizer_json_says_what_is_read(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for read in (
        lambda: Tokenizer.from_folder(tmp_path),
        lambda: Tokenizer.from_file(tmp_path / "tokenizer.model"),
        lambda: Tokenizer.from_file(tmp_path / "tokenizer.json"),
    ):
        with pytest.raises(MixtralError, match=r"only SentencePiece .* is read; fix: ") as caught:
            read()
        assert caught.value.code == INPUT_NOT_FOUND


def test_a_folder_without_a_tokenizer(tmp_path: Path):
    with pytest.raises(MixtralError, match=r"no tokenizer at .*; fix: ") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.code == INPUT_NOT_FOUND


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"version https://git-lfs\noid 1", b"{}"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(MixtralError, match="expected a SentencePiece model, got") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.code == BAD_DATA
    assert "\n" not in str(caught.value)


def test_a_model_without_bos_is_refused():
    with pytest.raises(MixtralError, match="pieces <s> and </s>") as caught:
        train([], bos_id=-1)
    assert caught.value.code == BAD_DATA


def test_importing_text_and_chat_loads_no_jax():
    code = "import sys, mixtral_jax.chat, mixtral_jax.tokenizer; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "False"
