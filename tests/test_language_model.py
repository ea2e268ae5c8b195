"""The Python API on the embedded model: two paths agree, rows are independent, faults are told."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mixtral_jax as mj
from mixtral_jax.decode import steps
from mixtral_jax.decode.executor import score
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.language_model import EMBEDDED_FOLDER, LanguageModel, load

# The same sums in another order: another number of rows or devices, f32.
LOGIT_TOLERANCE = 1e-4
PROMPTS = ["the red house", "le jour", "der Fluss", "una casa y"]
LONG = "der Fluss sieht eine grüne Nacht und dann zwei rote"  # another chunk of prefill
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
WARM: dict[str, Any] = {
    "max_new_tokens": 8,
    "temperature": 1.5,
    "top_k": 40,
    "top_p": 0.95,
    "seed": 11,
}
SHORT_CONTEXT = 64


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load("tiny", mesh="1x1")


@pytest.fixture(scope="module", params=["1x1", "2x2"])
def on_mesh(request, lm) -> LanguageModel:
    return lm if request.param == "1x1" else load("tiny", mesh=request.param)


@pytest.fixture(scope="module")
def greedy(lm) -> list[mj.Completion]:
    return lm.generate(PROMPTS, **GREEDY)


def without_text(folder: Path, **fields: object) -> LanguageModel:
    """The embedded model without a tokenizer, and other fields in its config.json."""
    shutil.copytree(EMBEDDED_FOLDER, folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | fields
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load(folder, mesh="1x1", dtype="float32")


def damaged(folder: Path, token_id: int) -> LanguageModel:
    """The embedded model with NaN in the embedding of one token."""
    shutil.copytree(EMBEDDED_FOLDER, folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].copy()
    embedding[token_id] = np.nan
    (folder / "model.safetensors").unlink()
    save_file({**tensors, "model.embed_tokens.weight": embedding}, folder / "model.safetensors")
    return load(folder, mesh="1x1", dtype="float32")


def num_programs(jitted: Any) -> int:
    return jitted._cache_size()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@contextlib.contextmanager
def refused(code: int, match: str) -> Iterator[None]:
    with pytest.raises(MixtralError, match=match) as caught:
        yield
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


def same(one: mj.Completion, other: mj.Completion) -> bool:
    return one.token_ids == other.token_ids and np.allclose(
        one.logprobs, other.logprobs, atol=LOGIT_TOLERANCE
    )


# Two paths agree.


def test_scores_are_those_that_generation_saw(on_mesh, greedy):
    written = on_mesh.generate(PROMPTS, **GREEDY)
    for completion, elsewhere in zip(written, greedy, strict=True):
        assert same(completion, elsewhere)
        ids = completion.prompt_token_ids + completion.token_ids
        logits = on_mesh.logits([ids])
        assert logits.dtype == np.float32
        assert logits.shape == (1, len(ids), on_mesh.config.vocab_size)
        scores = log_softmax(logits[0, len(completion.prompt_token_ids) - 1 : -1])
        assert scores.argmax(axis=-1).tolist() == completion.token_ids
        expected = scores.max(axis=-1)
        np.testing.assert_allclose(completion.logprobs, expected, atol=LOGIT_TOLERANCE)


def test_logits_of_a_row_do_not_depend_on_the_batch(lm):
    ids = np.asarray([[1, 310, 402], [9, 5, 6]])
    whole = lm.logits(ids)
    assert whole.shape == (2, 3, lm.config.vocab_size)
    for part, expected in (
        (lm.logits(ids[1:]), whole[1:]),
        (lm.logits(ids[::-1]), whole[::-1]),
        (lm.logits(ids[:, :2]), whole[:, :2]),  # nor on what follows
    ):
        np.testing.assert_allclose(part, expected, atol=LOGIT_TOLERANCE)
    assert not np.allclose(whole[0], whole[1], atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("fields", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_ids_give_what_their_text_gives(lm, fields):
    texts = lm.generate(PROMPTS, **fields)
    ids = [lm.tokenizer.encode(prompt) for prompt in PROMPTS]
    for text, other in zip(texts, lm.generate(prompt_token_ids=ids, **fields), strict=True):
        assert same(text, other)
        assert text.generated_text == other.generated_text
        assert (text.prompt in PROMPTS, other.prompt) == (True, None)


@pytest.mark.parametrize("fields", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
def test_a_row_alone_is_the_row_in_a_batch(lm, fields, as_ids):
    def generate(prompts: list[str]) -> list[mj.Completion]:
        if as_ids:
            ids = [lm.tokenizer.encode(prompt) for prompt in prompts]
            return lm.generate(prompt_token_ids=ids, **fields)
        return lm.generate(prompts, **fields)

    prompts = [*PROMPTS[:3], LONG]
    forwards, backwards = generate(prompts), generate(prompts[::-1])
    for place, prompt in enumerate(prompts):
        (alone,) = generate([prompt])
        assert same(alone, forwards[place])
        assert same(alone, backwards[-1 - place])


def test_samples_come_in_order_and_differ(lm):
    fields = {**WARM, "num_samples": 2}
    rows = lm.generate(PROMPTS[:2], **fields)
    assert [row.prompt for row in rows] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert rows[0].token_ids != rows[1].token_ids
    assert rows[2].token_ids != rows[3].token_ids
    # The first sample is what one sample alone would have been, and the second does not move.
    for place, prompt in enumerate(PROMPTS[:2]):
        assert same(lm.generate([prompt], **WARM)[0], rows[2 * place])
        assert same(lm.generate([prompt], **fields)[1], rows[2 * place + 1])


def test_seeds(lm):
    def ids(seed: int) -> list[int]:
        return lm.generate(PROMPTS[:1], **{**WARM, "seed": seed})[0].token_ids

    assert ids(1) == ids(1)
    assert len({tuple(ids(seed)) for seed in (0, 1, 2**32 - 1)}) == 3


def test_other_lengths_and_options_meet_the_same_programs(lm):
    lm.generate(PROMPTS[:2], **GREEDY)
    programs = (num_programs(steps.prefill), num_programs(steps.decode_step))
    for length in (3, 5, 9):
        lm.generate(PROMPTS[:2], max_new_tokens=length, temperature=0.5, min_p=0.1, stop="a")
        lm.generate(prompt_token_ids=[[1] * length], max_new_tokens=length)
    assert (num_programs(steps.prefill), num_programs(steps.decode_step)) == programs


# Text: chat, streams, stop strings.

CHAT = [
    {"role": "user", "content": "jour"},
    {"role": "assistant", "content": "nuit"},
    {"role": "user", "content": "et"},
]


def test_chat_continues_the_ids_of_the_conversation(lm):
    completion = lm.chat(CHAT, **GREEDY)
    ids = lm.encode_chat(CHAT)
    assert completion.prompt_token_ids == ids
    assert same(completion, lm.generate(prompt_token_ids=[ids], **GREEDY)[0])
    assert completion.generated_text == lm.tokenizer.decode(completion.token_ids)


@pytest.mark.parametrize("fields", [GREEDY, {**WARM, "stop": ("e",)}], ids=["greedy", "stopped"])
@pytest.mark.parametrize("prompt", [PROMPTS[0], CHAT], ids=["text", "chat"])
def test_a_stream_is_the_generated_text(lm, prompt, fields):
    fields = {**fields, "max_new_tokens": 20}
    pieces = list(lm.stream(prompt, **fields))
    is_text = isinstance(prompt, str)
    whole = lm.generate([prompt], **fields)[0] if is_text else lm.chat(prompt, **fields)
    assert "".join(pieces) == whole.generated_text
    assert all(pieces)
    if not fields.get("stop"):
        assert len(pieces) > 1, "shown while it is written"


def test_a_stop_string_ends_its_row_only(lm):
    prompts = ["Monday, Tuesday,", "lundi, mardi,", "Montag, Dienstag,", "lunes, martes,"]
    free = lm.generate(prompts, **GREEDY)
    text, stop = free[0].generated_text, "day, T"
    assert text.startswith(" Wednesday, Thursday,")
    assert all(stop not in row.generated_text for row in free[1:])
    # As a list, a tuple or one text.
    for given in (stop, [stop, "never seen"], (stop,)):
        rows = lm.generate(prompts, **GREEDY, stop=given)
        assert rows[0].generated_text == " Wednes"
        assert rows[0].finish_reason == "stop_sequence"
        assert len(rows[0].token_ids) == len(rows[0].logprobs) < len(free[0].token_ids)
        assert rows[0].token_ids == free[0].token_ids[: len(rows[0].token_ids)]
        assert [row.token_ids for row in rows[1:]] == [row.token_ids for row in free[1:]]
        assert [row.finish_reason for row in rows[1:]] == ["length"] * 3


def test_the_end_of_text_ends_a_row(lm):
    asked = ("12+30=", "Count from 3 to 9.")
    ids = [lm.encode_chat([{"role": "user", "content": text}]) for text in asked]
    rows = lm.generate(prompt_token_ids=ids, max_new_tokens=60)
    assert [row.generated_text for row in rows] == [" 42", " 3, 4, 5, 6, 7, 8, 9"]
    assert [row.finish_reason for row in rows] == ["eos_token"] * 2
    ends = [row.token_ids.index(lm.tokenizer.eos_id) for row in rows]
    assert ends == [len(row.token_ids) - 1 for row in rows]
    assert ends[0] < ends[1], "each row by itself"
    longer = lm.generate(prompt_token_ids=ids, max_new_tokens=60, ignore_eos=True)
    for row, more in zip(rows, longer, strict=True):
        assert (more.finish_reason, len(more.token_ids)) == ("length", 60)
        assert more.token_ids[: len(row.token_ids)] == row.token_ids


# What is refused.


@pytest.mark.parametrize("wrong", [-1, 2048, 2**31, 2**70])
def test_ids_outside_the_vocabulary_are_refused(lm, wrong):
    with refused(BAD_DATA, "prompt 1, token id: expected 0 to 2047"):
        lm.generate(prompt_token_ids=[[1], [1, wrong, 2]])
    with refused(BAD_DATA, "expected 0 to 2047"):
        lm.logits([[1, wrong]])
    assert lm.logits([[2047]]).shape == (1, 1, 2048)


def test_the_context_may_be_filled_and_no_more(lm, tmp_path):
    free, lm = lm, without_text(tmp_path / "checkpoint", max_position_embeddings=SHORT_CONTEXT)
    prompt = [1, *range(300, 300 + SHORT_CONTEXT - 5)]
    (full,) = lm.generate(prompt_token_ids=[prompt], **{**GREEDY, "max_new_tokens": 4})
    ids = prompt + full.token_ids
    assert len(ids) == SHORT_CONTEXT
    assert full.token_ids == free.generate(prompt_token_ids=[prompt], **GREEDY)[0].token_ids[:4]
    programs = num_programs(steps.empty_state), num_programs(score)
    with refused(USAGE, "prompt 1: expected prompt and new tokens within 64, got 60 [+] 5"):
        lm.generate(prompt_token_ids=[[1], prompt], max_new_tokens=5)
    with refused(USAGE, "expected at most 64, got 65"):
        lm.logits([[*ids, 1]])
    assert (num_programs(steps.empty_state), num_programs(score)) == programs


def test_without_a_tokenizer_only_text_is_refused(lm, tmp_path):
    silent = without_text(tmp_path / "checkpoint")
    assert silent.tokenizer is None
    ids = lm.tokenizer.encode(PROMPTS[0])
    (row,) = silent.generate(prompt_token_ids=[ids], **GREEDY)
    assert row.generated_text is None
    assert same(row, lm.generate(prompt_token_ids=[ids], **GREEDY)[0])
    for ask in (
        lambda: silent.generate(PROMPTS),
        lambda: silent.chat(CHAT),
        lambda: list(silent.stream("the")),
    ):
        with refused(INPUT_NOT_FOUND, "no tokenizer.model; fix: .* token ids"):
            ask()
    with refused(USAGE, "--stop needs text"):
        silent.generate(prompt_token_ids=[ids], stop="a")


def test_what_cannot_be_asked_is_refused(lm):
    with refused(USAGE, "no option beams, tempurature"):
        lm.generate(PROMPTS, tempurature=1.0, beams=2)
    with refused(USAGE, "--top-p"):
        lm.generate(PROMPTS, top_p=2.0)
    with refused(USAGE, "prompts or prompt_token_ids"):
        lm.generate()
    with refused(USAGE, "prompts or prompt_token_ids"):
        lm.generate(PROMPTS, prompt_token_ids=[[1]])
    with refused(USAGE, "expected a list of texts, got one text"):
        lm.generate("the red house")
    with refused(USAGE, "prompt 1 is empty"):
        lm.generate(prompt_token_ids=[[1], []])
    with refused(USAGE, "rows of one length"):
        lm.logits([[1, 2], [1]])
    with refused(USAGE, "rows of one length"):
        lm.logits([])
    with refused(USAGE, "prompt 0 is empty"):
        lm.logits([[]])


def test_nothing_asked_is_nothing_given(lm):
    assert lm.generate([]) == []
    assert lm.generate(prompt_token_ids=[]) == []


@pytest.mark.parametrize(
    ("checkpoint", "fields", "code", "match"),
    [
        ("no-such-folder", {}, INPUT_NOT_FOUND, "no such folder: no-such-folder; fix: "),
        ("tiny", {"mesh": "many"}, USAGE, "--mesh"),
        ("tiny", {"mesh": "1x3"}, BAD_CONFIG, "mesh 1x3"),
        ("tiny", {"mesh": "4x4"}, BAD_CONFIG, "expected 16 devices, got 8"),
    ],
)
def test_load_refuses(checkpoint, fields, code, match):
    with refused(code, match):
        load(checkpoint, **fields)


def test_a_simulated_mesh_says_so():
    notes: list[str] = []
    load("tiny", mesh="1x2", note=notes.append)
    assert notes == ["no accelerator: simulating the 1x2 mesh with 2 CPU devices"]


def test_load_refuses_unknown_options():
    with pytest.raises(MixtralError, match="meshes") as caught:
        load("tiny", meshes="1x1")
    assert caught.value.code == USAGE


# Damage and dtypes.


@pytest.mark.parametrize("token_id", [0, 300], ids=["padding", "word"])
def test_a_nan_weight_fails_the_rows_that_meet_it(lm, tmp_path, token_id):
    broken = damaged(tmp_path / "checkpoint", token_id)
    prompts = [[1, 310, 402], [1, token_id, 5], [1, 6, 7]]  # and a row of padding
    fields = {**GREEDY, "max_new_tokens": 4}
    whole = lm.generate(prompt_token_ids=prompts, **fields)
    assert not any(token_id in row.token_ids for row in whole), "choose other prompts"
    rows = broken.generate(prompt_token_ids=prompts, **fields)
    assert [row.error is not None for row in rows] == [False, True, False]
    assert "prompt 1: logits are NaN" in str(rows[1].error)
    assert (rows[1].finish_reason, rows[1].token_ids) == (None, [])
    for place in (0, 2):
        assert same(rows[place], whole[place])
        assert rows[place].finish_reason == "length"
    logits = broken.logits([prompts[0]])
    np.testing.assert_allclose(logits, lm.logits([prompts[0]]), atol=LOGIT_TOLERANCE)
    with refused(BAD_DATA, "row 1: logits are NaN"):
        broken.logits(prompts[:2])


def test_a_stream_that_meets_nan_raises(tmp_path):
    broken = damaged(tmp_path / "checkpoint", 1)  # <s>: every text meets it
    with refused(BAD_DATA, "logits are NaN after 0 tokens"):
        list(broken.stream("the red house", max_new_tokens=4))


def test_bfloat16_loads_and_gives_float32_logits(lm):
    half = load("tiny", dtype="bfloat16")
    logits = half.logits([[1, 310, 402, 354]])
    assert logits.dtype == np.float32
    assert half.model.embed_tokens.get_value().dtype == "bfloat16"
    exact = lm.logits([[1, 310, 402, 354]])
    assert 0 < abs(logits - exact).max() < 0.3 < exact.std()


def test_one_answer_is_asked_for_where_one_is_given(lm):
    with pytest.raises(MixtralError, match="num_samples"):
        lm.chat([{"role": "user", "content": "Hello"}], num_samples=2)
    with pytest.raises(MixtralError, match="num_samples"):
        next(lm.stream("Hello", num_samples=2))


def test_other_special_ids_than_the_tokenizers_are_told(tmp_path):
    notes: list[str] = []
    folder = tmp_path / "other"
    shutil.copytree(EMBEDDED_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields = {"bos_token_id": 7, "eos_token_id": 9}
    (folder / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    load(folder, mesh=mj.MeshSpec(), note=notes.append)
    assert ["bos_token_id 7" in notes[0], "eos ids [9]" in notes[1]] == [True, True]
