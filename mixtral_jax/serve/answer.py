"""One answer while it is written: its tokens become text and events. Needs no jax."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from mixtral_jax.decode.text import TextStream
from mixtral_jax.serve.request import Event, FinishReason, ServeRequest, TokenEvent, TokenScore
from mixtral_jax.tokenizer import Tokenizer

UNLIKELY = 9999.0  # what stands for minus infinity is minus this, as OpenAI has it


def token_score(tokenizer: Tokenizer | None, token_id: int, logprob: float | None) -> TokenScore:
    """A token as it is reported: the text of its piece, and a number that JSON can hold."""
    if logprob is not None and not math.isfinite(logprob):
        logprob = None if math.isnan(logprob) else math.copysign(UNLIKELY, logprob)
    if tokenizer is None or token_id >= tokenizer.vocab_size:
        # A model may have more rows than its tokenizer has pieces (padded vocabularies).
        return TokenScore(id=token_id, text="", logprob=logprob, is_special=tokenizer is not None)
    is_special = tokenizer.is_control(token_id)
    text = tokenizer.pieces[token_id] if is_special else tokenizer.text_of(token_id)
    byte = tokenizer.byte_of(token_id)
    if byte is not None and byte < 128:  # a newline is such a piece in the published vocabularies
        text = chr(byte)
    return TokenScore(id=token_id, text=text, logprob=logprob, is_special=is_special, byte=byte)


class Answer:
    """Collects the tokens of a request.

    Args:
        request: what was asked.
        tokenizer: None leaves the answer without text.
        eos_ids: ids that end it.
    """

    def __init__(
        self, request: ServeRequest, tokenizer: Tokenizer | None, eos_ids: Collection[int]
    ):
        self._tokenizer, self._sampling, self._eos_ids = tokenizer, request.sampling, eos_ids
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.tail = ""
        self._stream: TextStream | None = None
        if tokenizer is not None:
            before = () if request.is_answer else request.prompt_ids
            self._stream = TextStream(tokenizer, before, request.sampling.stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stream is not None and self._stream.is_stopped

    @property
    def text(self) -> str:
        """All of it so far."""
        return "" if self._stream is None else self._stream.text + self._stop_text()

    def push(self, token_id: int, logprob: float, best: Sequence[tuple[int, float]] = ()) -> Event:
        """Takes the next token; check ``is_stopped`` after.

        Args:
            token_id: the token.
            logprob: its log-probability.
            best: the likeliest tokens and theirs, best first.
        """
        shown = piece = ""
        if self._stream is not None:
            shown = self._stream.push(token_id) + self._stop_text()
            piece = self._stream.piece
        score = token_score(self._tokenizer, token_id, logprob)
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)
        top = tuple(token_score(self._tokenizer, i, p) for i, p in best)
        index = len(self.token_ids) - 1
        return TokenEvent(index=index, token=score, text=shown, piece=piece, top=top)

    def finish(self) -> FinishReason:
        """Ends it; returns why it ended. What was held back is in ``tail``."""
        if self._stream is not None:
            self.tail = self._stream.flush()
        if self.is_stopped:
            return "stop_sequence"
        ids = self.token_ids
        ended = bool(ids) and ids[-1] in self._eos_ids and not self._sampling.ignore_eos
        return "eos_token" if ended else "length"

    def _stop_text(self) -> str:
        if self._stream is None or not self._sampling.include_stop:
            return ""
        return self._stream.stopped_by
