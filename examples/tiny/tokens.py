"""Text to token ids: the SentencePiece model, and documents as training reads them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import sentencepiece

from examples.tiny.text import Conversation, Plain, documents
from mixtral_jax.tokenizer import Tokenizer

VOCAB_SIZE = 2048
NUM_DOCUMENTS = 40_000  # that the SentencePiece model is made from

# The control pieces of Mistral's v3 format, at their published ids 3 to 9.
CONTROL = (
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)


def make_tokenizer(seed: int = 0) -> bytes:
    """A BPE model in v3 format: unk 0, bos 1, eos 2, control pieces, bytes, then pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=_texts(seed),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=list(CONTROL),
        hard_vocab_limit=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _texts(seed: int) -> Iterator[str]:
    for document in itertools.islice(documents(seed), NUM_DOCUMENTS):
        if isinstance(document, Plain):
            yield document.text
        else:
            for turn in document.turns:
                yield turn.prompt
                yield turn.answer
            yield document.system or ""


class Encoded(NamedTuple):
    """Token ids of a document, and which of them are an answer's (of plain text all but the first).

    They are those that the trainer makes of its row (tests/examples/test_corpus.py).
    """

    token_ids: list[int]
    is_answer: list[bool]


def encode(document: Conversation | Plain, tokenizer: Tokenizer) -> Encoded:
    """A document as training sees it; conversations as ``mixtral_jax.chat`` writes them."""
    token_ids, is_answer = [tokenizer.bos_id], [False]

    def add(ids: list[int], answers: bool) -> None:
        token_ids.extend(ids)
        is_answer.extend([answers] * len(ids))

    if isinstance(document, Plain):
        add([*tokenizer.encode(document.text, bos=False), tokenizer.eos_id], True)
        return Encoded(token_ids, is_answer)
    begin, end = tokenizer.control_id("[INST]"), tokenizer.control_id("[/INST]")
    last = len(document.turns) - 1
    for i, turn in enumerate(document.turns):
        text = turn.prompt
        if i == last and document.system:
            text = f"{document.system}\n\n{text}"
        add([begin, *tokenizer.encode(text, bos=False), end], False)
        add([*tokenizer.encode(turn.answer, bos=False), tokenizer.eos_id], True)
    return Encoded(token_ids, is_answer)
