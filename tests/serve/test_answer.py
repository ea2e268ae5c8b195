"""Text of answers as events: what is streamed adds up to the whole, whatever the tokens."""

from __future__ import annotations

import random

import pytest

from mixtral_jax.serve.answer import Answer, token_score
from mixtral_jax.serve.request import ServeRequest, ServeSampling, TokenEvent
from mixtral_jax.tokenizer import Tokenizer

TEXTS = (
    "Once upon a time there was a fox.",
    "Größe, naïveté, 你好 — 🦊🦊 done",
    "stop at END or not",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder("mixtral_jax/data/tiny")


def write(tokenizer: Tokenizer, ids: list[int], *, is_answer: bool = False, **fields):
    request = ServeRequest(
        prompt_ids=tuple(tokenizer.encode("A fox")),
        sampling=ServeSampling(max_new_tokens=len(ids), **fields),
        is_answer=is_answer,
    )
    answer, shown = Answer(request, tokenizer, {tokenizer.eos_id}), ""
    for token_id in ids:
        event = answer.push(token_id, -0.5)
        assert isinstance(event, TokenEvent)
        shown += event.text
        assert "\N{REPLACEMENT CHARACTER}" not in shown
        if answer.is_stopped:
            break
    reason = answer.finish()
    assert shown + answer.tail == answer.text
    return answer, reason


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("is_answer", [True, False])
def test_multibyte_text_is_shown_whole(tokenizer, text, is_answer):
    ids = tokenizer.encode(text, bos=False)
    answer, reason = write(tokenizer, ids, is_answer=is_answer)
    assert answer.text == text if is_answer else answer.text.lstrip() == text
    assert reason == "length"
    assert write(tokenizer, [*ids, tokenizer.eos_id])[1] == "eos_token"
    assert write(tokenizer, [*ids, tokenizer.eos_id], ignore_eos=True)[1] == "length"


def test_stop_strings_cut_across_tokens(tokenizer):
    rng = random.Random(1)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        for _ in range(30):
            start = rng.randrange(len(text))
            stop = text[start : start + rng.randint(1, 6)]
            cut = text[: text.find(stop)]
            answer, reason = write(tokenizer, ids, is_answer=True, stop=("@@", stop))
            assert (answer.text, reason) == (cut, "stop_sequence")
            kept, _ = write(tokenizer, ids, is_answer=True, stop=("@@", stop), include_stop=True)
            assert kept.text == cut + stop


def test_tokens_are_named_as_pieces(tokenizer):
    eos = token_score(tokenizer, tokenizer.eos_id, -1.0)
    assert (eos.text, eos.is_special) == ("</s>", True)
    word = token_score(tokenizer, tokenizer.encode(" fox", bos=False)[-1], float("-inf"))
    assert word.logprob == -9999.0
    assert not word.is_special
    padding = token_score(tokenizer, tokenizer.vocab_size, float("nan"))
    assert (padding.text, padding.logprob) == ("", None)
