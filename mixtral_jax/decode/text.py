"""The text of a row while it is written: whole characters, and stop strings cut away."""

from __future__ import annotations

from collections.abc import Sequence

from mixtral_jax.tokenizer import REPLACEMENT, IncrementalDetokenizer, Tokenizer


class TextStream:
    """Turns the tokens of one row into text that may be shown.

    Text that could still become a stop string is held back until it cannot. Of several stop strings
    the one that is complete first cuts, so the text does not depend on how tokens divide it.

    Args:
        tokenizer: of the model.
        prompt_ids: what the row continues; empty for the answer of a chat, which then starts
            without the space that a continuation keeps.
        stop: texts that end the row and are cut from it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str]):
        self._vocab_size = tokenizer.vocab_size
        known = [token_id for token_id in prompt_ids if token_id < self._vocab_size]
        self._detokenizer = IncrementalDetokenizer(tokenizer, known)
        self._stop = tuple(stop)
        self._shown = 0
        self.text = ""
        self.piece = ""  # what the last token added, shown or held back
        self.stopped_by = ""  # the stop string that was met

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was met."""
        return bool(self.stopped_by)

    def push(self, token_id: int) -> str:
        """Takes the next token; returns text that may be shown now. Check ``is_stopped`` after."""
        if token_id < self._vocab_size:
            self.piece = self._detokenizer.push(token_id)
        else:  # a model may have more rows than its tokenizer has pieces (padded vocabularies)
            self.piece = self._detokenizer.flush() + REPLACEMENT
        return self._extend(self.piece, at_end=False)

    def flush(self) -> str:
        """The rest, at the end of the row."""
        return "" if self.is_stopped else self._extend(self._detokenizer.flush(), at_end=True)

    def _extend(self, text: str, *, at_end: bool) -> str:
        longest = max(map(len, self._stop), default=0)
        search_from = max(0, len(self.text) - longest)
        self.text += text
        hits = [(self.text.find(stop, search_from), len(stop)) for stop in self._stop]
        found = [(hit + size, hit) for hit, size in hits if hit >= 0]
        if found:
            end, start = min(found)
            self.stopped_by = self.text[start:end]
            self.text = self.text[:start]
            at_end = True
        safe = len(self.text) if at_end else len(self.text) - self._held_back()
        shown = self.text[self._shown : safe]
        self._shown = max(self._shown, safe)
        return shown

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(self.text) + 1))
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )
