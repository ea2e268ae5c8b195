"""Token ids are those of the chat format; packing loses and mixes nothing."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from examples.tiny import tokens
from examples.tiny.text import Conversation, Example, Plain, documents
from mixtral_jax.chat import encode_chat
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.tokenizer import Tokenizer

RESULTS = Path(tokens.__file__).parent / "results"
SHAPES = ((6, 64), (2, 128), (2, 256))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED_FOLDER)


def some(count: int, seed: int = 2) -> list[Conversation | Plain]:
    return list(itertools.islice(documents(seed), count))


def messages(conversation: Conversation) -> list[dict[str, str]]:
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    turns = [
        {"role": role, "content": content}
        for turn in conversation.turns
        for role, content in (("user", turn.prompt), ("assistant", turn.answer))
    ]
    return [*system, *turns]


def test_conversations_are_encoded_as_the_chat_does(tokenizer):
    seen = collections.Counter()
    for document in some(400):
        if isinstance(document, Conversation):
            chat = encode_chat(tokenizer, messages(document), continue_final_message=True)
            assert tokens.encode(document, tokenizer).token_ids == [*chat, tokenizer.eos_id]
            seen[bool(document.system), len(document.turns) > 1] += 1
    assert len(seen) == 4, "with and without a system text, one turn and more"


def test_answers_weigh_most(tokenizer):
    turn = Example("sum", "en", "12+30=", "42")
    ids, weights = tokens.encode(Conversation((turn, turn)), tokenizer)
    answer = [*tokenizer.encode("42", bos=False), tokenizer.eos_id]
    heavy = [token_id for token_id, weight in zip(ids, weights, strict=True) if weight == 1]
    assert heavy == answer * 2
    assert weights[0] == 0, "nothing predicts the first token"
    assert set(weights[1:]) == {1, tokens.PROMPT_WEIGHT}


def packed(tokenizer: Tokenizer, count: int) -> Iterator[tokens.Batch]:
    encoded = (tokens.encode(document, tokenizer) for document in documents(5))
    packer = tokens.Packer(encoded, SHAPES, seed=0)
    for _ in range(count):
        yield from packer.batches(1)


def test_packed_rows_hold_whole_documents_once(tokenizer):
    given = collections.Counter(
        tuple(tokens.encode(document, tokenizer).token_ids) for document in some(12000, seed=5)
    )
    shapes = set()
    for batch in packed(tokenizer, 400):
        shapes.add(batch.tokens.shape)
        for row, segments in zip(batch.tokens, batch.segments, strict=True):
            for segment in range(1, segments.max() + 1):
                given[tuple(row[segments == segment].tolist())] -= 1
            assert set(row[segments == 0]) <= {0}
        assert (batch.segments > 0).mean() > 0.85
    assert min(given.values()) == 0, "no document is cut, made up or used twice"
    assert shapes == set(SHAPES)


def test_scored_tokens_follow_their_places(tokenizer):
    for batch in packed(tokenizer, 6):
        rows, length = batch.tokens.shape
        flat, segments = batch.tokens.reshape(-1), batch.segments.reshape(-1)
        used = batch.positions[batch.weights > 0]
        assert len(set(used.tolist())) == len(used)
        assert len(batch.positions) == rows * length // 2
        np.testing.assert_array_equal(flat[used + 1], batch.targets[batch.weights > 0])
        np.testing.assert_array_equal(segments[used + 1], segments[used])
        assert (segments[used] > 0).all()
        assert (used % length < length - 1).all()
        assert (batch.weights == 1).sum() > 50


def test_vocabulary_is_made_by_its_script(tokenizer):
    made_by = json.loads((RESULTS / "score.json").read_text())["made_by"]
    for name in ("sentencepiece", "num2words"):
        if made_by[name] != version(name):
            pytest.skip(f"made by {name} {made_by[name]}; {version(name)} may divide otherwise")
    made = Tokenizer(tokens.make_tokenizer())
    again = [made.text_of(i) for i in range(made.vocab_size)]
    assert again == [tokenizer.text_of(i) for i in range(tokenizer.vocab_size)]
