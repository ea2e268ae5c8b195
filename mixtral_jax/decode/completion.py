"""A batch of prompts becoming completions: text, stop strings, reasons and timing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from mixtral_jax.decode.generate import Chunk, Progress, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.decode.speculation import Speculated
from mixtral_jax.decode.text import TextStream
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.tokenizer import Tokenizer

FinishReason = Literal["length", "eos_token", "stop_sequence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """Seconds and tokens per second of the batch a completion belongs to, compilation apart.

    ``speculated`` is None where nobody asked for speculation.
    """

    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_seconds: float
    decode_tokens_per_second: float
    compile_seconds: float
    speculated: Speculated | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """One generated row.

    Attributes:
        prompt: its text, None where token ids were given.
        prompt_token_ids: its ids.
        token_ids: generated ids, the end-of-text id included.
        generated_text: None without a tokenizer. A stop string is cut from it.
        logprobs: natural logarithms under the raw logits, one per generated id.
        finish_reason: why it ended; None if ``error`` is given.
        dropped: expert assignments left out in its batch, all layers (0 unless overflow="drop").
        stats: timing of its batch.
        error: set where this row's logits were NaN; other rows of the batch are not affected.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int]
    generated_text: str | None
    logprobs: list[float]
    finish_reason: FinishReason | None
    dropped: int
    stats: Stats
    error: str | None = None


class Batch:
    """Prompts times samples, one row each, and what has been written to them.

    Args:
        prompt_ids: one list per prompt; ``num_samples`` rows are made of each, in order.
        options: of every row.
        eos_ids: ids that end a row.
        prompts: the texts that the ids came from, if any.
        tokenizer: None leaves the rows without text (then there can be no stop strings).
        is_answer: rows are answers of a chat, which start without a space.
        first_samples: the number of each prompt's first sample; 0, if None.

    Raises:
        MixtralError: exit code 64 for stop strings without a tokenizer.
    """

    def __init__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        options: SamplingOptions,
        *,
        eos_ids: Sequence[int],
        prompts: Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
        is_answer: bool = False,
        first_samples: Sequence[int] | None = None,
    ):
        if options.stop and tokenizer is None:
            raise MixtralError(
                "--stop needs text, and this checkpoint has no tokenizer", code=USAGE
            )
        self.options, self._eos_ids = options, frozenset(eos_ids)
        firsts = [0] * len(prompt_ids) if first_samples is None else first_samples
        self.requests = [
            Request(prompt_ids=tuple(ids), options=options, sample_id=first + k, prompt_index=index)
            for index, (ids, first) in enumerate(zip(prompt_ids, firsts, strict=True))
            for k in range(options.num_samples)
        ]
        texts = prompts if prompts is not None else [None] * len(prompt_ids)
        self.prompts = [text for text in texts for _ in range(options.num_samples)]
        self._texts = [
            None
            if tokenizer is None
            else TextStream(tokenizer, () if is_answer else r.prompt_ids, options.stop)
            for r in self.requests
        ]
        self._token_ids: list[list[int]] = [[] for _ in self.requests]
        self._logprobs: list[list[float]] = [[] for _ in self.requests]
        self._rests = [""] * len(self.requests)
        self.progress = Progress()  # of the whole batch, once it has finished

    def take(self, chunk: Chunk, stop_row: Callable[[int], None]) -> list[str]:
        """Adds a chunk; returns each row's new text, and stops rows that met a stop string."""
        return [
            self._take_row(row, chunk.token_ids[row], chunk.logprobs[row], stop_row)
            for row in range(len(self.requests))
        ]

    def _take_row(
        self, row: int, ids: list[int], logprobs: list[float], stop_row: Callable[[int], None]
    ) -> str:
        text, shown = self._texts[row], ""
        for token_id, logprob in zip(ids, logprobs, strict=True):
            if text is not None and text.is_stopped:
                break
            self._token_ids[row].append(token_id)
            self._logprobs[row].append(logprob)
            if text is not None:
                shown += text.push(token_id)
                if text.is_stopped:
                    stop_row(row)
        return shown

    def finish(self, progress: Progress) -> None:
        """Ends the batch: the last held-back text is given, and timing is known."""
        self.progress = progress
        self._rests = ["" if text is None else text.flush() for text in self._texts]

    def rest(self, row: int) -> str:
        """Text that only ``finish`` could show."""
        return self._rests[row]

    def completions(self) -> list[Completion]:
        """The rows, once the batch has finished."""
        return [self._completion(row) for row in range(len(self.requests))]

    def _completion(self, row: int) -> Completion:
        text, ids, progress = self._texts[row], self._token_ids[row], self.progress
        error = None
        # A row that met a stop string wrote on to the end of its chunk; that is not its text.
        if progress.is_bad[row] and not (text is not None and text.is_stopped):
            error = f"prompt {row}: logits are NaN after {len(ids)} tokens; the weights are damaged"
        return Completion(
            prompt=self.prompts[row],
            prompt_token_ids=list(self.requests[row].prompt_ids),
            token_ids=ids,
            generated_text=None if text is None else text.text,
            logprobs=self._logprobs[row],
            finish_reason=None if error else self._reason(row),
            dropped=sum(progress.dropped),
            stats=Stats(
                prefill_seconds=progress.prefill_seconds,
                prefill_tokens_per_second=_rate(progress.prefill_tokens, progress.prefill_seconds),
                decode_seconds=progress.decode_seconds,
                decode_tokens_per_second=_rate(progress.decode_tokens, progress.decode_seconds),
                compile_seconds=progress.compile_seconds,
                speculated=progress.speculated,
            ),
            error=error,
        )

    def _reason(self, row: int) -> FinishReason:
        text = self._texts[row]
        if text is not None and text.is_stopped:
            return "stop_sequence"
        ids = self._token_ids[row]
        ended = bool(ids) and ids[-1] in self._eos_ids and not self.options.ignore_eos
        return "eos_token" if ended else "length"


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
