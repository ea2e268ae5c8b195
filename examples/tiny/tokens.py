"""Text to token ids: the SentencePiece model, and rows packed with whole documents."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
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

PROMPT_WEIGHT = 0.1  # of a prompt's token in the loss, beside 1 for an answer's
PLAIN_WEIGHT = 0.3
POOL = 64  # documents that wait for a row with room for them


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
    """Token ids of a document, and the weight of each in the loss."""

    token_ids: list[int]
    weights: list[float]


def encode(document: Conversation | Plain, tokenizer: Tokenizer) -> Encoded:
    """A document as training sees it; conversations as ``mixtral_jax.chat`` writes them."""
    token_ids, weights = [tokenizer.bos_id], [0.0]

    def add(ids: list[int], weight: float) -> None:
        token_ids.extend(ids)
        weights.extend([weight] * len(ids))

    if isinstance(document, Plain):
        add([*tokenizer.encode(document.text, bos=False), tokenizer.eos_id], PLAIN_WEIGHT)
        return Encoded(token_ids, weights)
    begin, end = tokenizer.control_id("[INST]"), tokenizer.control_id("[/INST]")
    last = len(document.turns) - 1
    for i, turn in enumerate(document.turns):
        text = turn.prompt
        if i == last and document.system:
            text = f"{document.system}\n\n{text}"
        add([begin, *tokenizer.encode(text, bos=False), end], PROMPT_WEIGHT)
        add([*tokenizer.encode(turn.answer, bos=False), tokenizer.eos_id], 1.0)
    return Encoded(token_ids, weights)


# Of numpy where rows are packed, of JAX inside an update.
Numbers: TypeAlias = Any


class Batch(NamedTuple):
    """Packed rows. ``segments`` counts the documents of a row from 1; 0 is padding.

    ``positions`` are the places (in the flattened rows) whose next token is scored, ``targets``
    those tokens and ``weights`` what each counts; answers first, then as many prompt tokens as fit,
    weighted up for those left out.
    """

    tokens: Numbers  # int32 [B, T]
    segments: Numbers  # int32 [B, T]
    positions: Numbers  # int32 [P]
    targets: Numbers  # int32 [P]
    weights: Numbers  # float32 [P]


class Packer:
    """Fills rows with whole documents: short ones in short rows, where attention costs less.

    Args:
        encoded: documents without end; one too long for the longest rows is left out.
        shapes: (rows, tokens) of the batches, short rows first.
        seed: chooses the prompt tokens that are scored.
    """

    def __init__(self, encoded: Iterator[Encoded], shapes: Sequence[tuple[int, int]], *, seed: int):
        self._encoded, self._shapes = encoded, tuple(shapes)
        self._waiting: list[list[Encoded]] = [[] for _ in shapes]
        self._draw = np.random.default_rng(seed)

    def batches(self, count: int) -> list[Batch]:
        """So many batches of one shape: the first for which enough text has come."""
        while True:
            for i, (rows, length) in enumerate(self._shapes):
                enough = count * rows * length + POOL * length
                if sum(len(document.token_ids) for document in self._waiting[i]) >= enough:
                    sources = self._waiting[i::-1]  # what is left of a long row: short documents
                    return [self._batch(sources, rows, length) for _ in range(count)]
            for _ in range(POOL):
                document = next(self._encoded)
                for waiting, (_, length) in zip(self._waiting, self._shapes, strict=True):
                    if len(document.token_ids) <= length:
                        waiting.append(document)
                        break

    def _batch(self, sources: list[list[Encoded]], rows: int, length: int) -> Batch:
        """``[rows, length]`` tokens, half of them scored."""
        tokens, segments = np.zeros((2, rows, length), np.int32)
        weights = np.zeros((rows, length), np.float32)
        for row in range(rows):
            at, segment = 0, 1
            while (taken := _longest(sources, length - at)) is not None:
                ids, counts = taken
                here = slice(at, at + len(ids))
                tokens[row, here], segments[row, here] = ids, segment
                weights[row, here] = counts
                at, segment = at + len(ids), segment + 1
        return self._scored(tokens, segments, weights, num_scored=rows * length // 2)

    def _scored(
        self, tokens: np.ndarray, segments: np.ndarray, weights: np.ndarray, *, num_scored: int
    ) -> Batch:
        # The weight of a token is charged where it is predicted: one place earlier.
        charged = np.zeros_like(weights)
        charged[:, :-1] = weights[:, 1:] * (segments[:, 1:] == segments[:, :-1])
        following = np.roll(tokens, -1, axis=1).reshape(-1)
        charged = charged.reshape(-1)
        first, rest = np.flatnonzero(charged == 1), np.flatnonzero((charged > 0) & (charged < 1))
        first = first[:num_scored]
        kept = self._draw.permutation(rest)[: num_scored - len(first)]
        positions = np.concatenate([first, kept]).astype(np.int32)
        factors = charged[positions]
        factors[len(first) :] *= len(rest) / max(len(kept), 1)
        padding = num_scored - len(positions)
        positions, factors = np.pad(positions, (0, padding)), np.pad(factors, (0, padding))
        return Batch(tokens, segments, positions, following[positions], factors)


def _longest(sources: list[list[Encoded]], room: int) -> Encoded | None:
    """Takes the longest document that fits, of the first of each source."""
    for waiting in sources:
        lengths = [len(document.token_ids) for document in waiting[:POOL]]
        fitting = [(length, i) for i, length in enumerate(lengths) if length <= room]
        if fitting:
            return waiting.pop(max(fitting)[1])
    return None
