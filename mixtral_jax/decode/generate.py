"""Generation: prompts of token ids in, tokens out, chunk by chunk.

The batch is padded to a bucket of rows and the cache to a bucket of slots, so that other prompts
and budgets meet the programs already compiled. Text (detokenizing, stop strings) belongs to the
caller, who may end a row between two chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode import steps
from mixtral_jax.decode.executor import Executor, Resident
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling
from mixtral_jax.decode.speculation import Speculated, Speculator
from mixtral_jax.decode.timing import Stopwatch
from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.kernels.scaled_kv import KVDtype
from mixtral_jax.kernels.table import cache_dtype
from mixtral_jax.model.cache import num_slots
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.sharding import hosts

LENGTH_BUCKET = 128
PREFILL_CHUNK = 512  # prompt tokens read per call at most
MIN_ROWS = 2  # a product of one row differs from the same row among two in its last bit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One row: a prompt, its options, and which of its samples this is.

    ``prompt_index`` counts the caller's prompts, for error lines.
    """

    prompt_ids: tuple[int, ...]
    options: SamplingOptions
    sample_id: int = 0
    prompt_index: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Tokens written since the last chunk, per row, with their log-probabilities."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]


@dataclasses.dataclass(kw_only=True)
class Progress:
    """What a generation reports while and after it runs.

    ``is_bad`` marks rows that ended because their logits were NaN; ``dropped`` counts expert
    assignments left out per layer; ``expert_counts[row, layer, expert]`` how often the tokens that
    a row read, of its prompt and its answer, chose an expert (nothing reads the last token; a row
    that meets a stop string reads on to the end of its chunk), known once all rows have ended;
    seconds are wall time, compilation apart; ``speculated`` is None where nobody asked for it.
    With speculation ``dropped`` counts the assignments of rejected drafts too, ``expert_counts``
    does not.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    dropped: list[int] = dataclasses.field(default_factory=list)
    is_bad: list[bool] = dataclasses.field(default_factory=list)
    expert_counts: np.ndarray | None = None
    speculated: Speculated | None = None


def check_token_ids(rows: Sequence[Sequence[int]], config: ModelConfig) -> None:
    """Refuses ids past the vocabulary: JAX would clamp them silently.

    Raises:
        MixtralError: exit code 65, or 64 for an empty row.
    """
    for row, ids in enumerate(rows):
        if not ids:
            raise MixtralError(f"prompt {row} is empty", fix="give it a token", code=USAGE)
        wrong = [i for i in ids if not 0 <= i < config.vocab_size]
        if wrong:
            expected = f"0 to {config.vocab_size - 1}"
            got = wrong[0]
            raise MixtralError(f"prompt {row}, token id", expected=expected, got=got, code=BAD_DATA)


def check_requests(requests: Sequence[Request], config: ModelConfig) -> None:
    """Refuses, before anything is traced, what the model cannot hold.

    Raises:
        MixtralError: exit code 65 for ids, 64 for lengths past ``max_position_embeddings``.
    """
    check_token_ids([request.prompt_ids for request in requests], config)
    for request in requests:
        length, budget = len(request.prompt_ids), request.options.max_new_tokens
        if length + budget > config.max_position_embeddings:
            raise MixtralError(
                f"prompt {request.prompt_index}",
                expected=f"prompt and new tokens within {config.max_position_embeddings}",
                got=f"{length} + {budget}",
                fix="shorten the prompt or lower --max-new-tokens",
                code=USAGE,
            )


def speculation_refused() -> MixtralError:
    """The error of --speculate where the experts are not all on the device."""
    return MixtralError(
        "--speculate: drafts are not supported with --offload", fix="leave one out", code=USAGE
    )


def row_bucket(num_rows: int, data: int = 1) -> int:
    """Rows that a batch is padded to: a power of two, at least MIN_ROWS, for each data shard."""
    per_shard = max(MIN_ROWS, -(-num_rows // data))
    return data * (1 << (per_shard - 1).bit_length())


def chunk_bucket(longest_prompt: int, largest: int = PREFILL_CHUNK) -> int:
    """Prompt tokens that a call of prefill reads: a power of two from 16 on, or ``largest``."""
    chunk = 16
    while chunk < min(largest, longest_prompt - 1):
        chunk *= 2
    return min(chunk, largest)


def slot_bucket(config: ModelConfig, total: int, largest: int = PREFILL_CHUNK) -> int:
    """Cache slots for ``total`` tokens per row, prompt and answer.

    For the largest chunk, so that the slots do not depend on the longest prompt.
    """
    return num_slots(config, total=length_bucket(total), chunk=largest)


def length_bucket(total: int) -> int:
    """Tokens that rows have room for."""
    return -(-total // LENGTH_BUCKET) * LENGTH_BUCKET


class Generation:
    """A batch being generated, chunk by chunk, until every row is done.

    Args:
        model: weights, placed.
        requests: one per row; any number.
        placement: where the model lies.
        data_shards: size of the data axis; rows are padded to divide it.
        prefill_chunk: prompt tokens read per call at most, at absolute multiples of it.
        speculate: tokens drafted per step at most, or None for plain decoding.
        kv_dtype: of the cache; the activations', if None.
        executor: runs the passes; the whole model on its devices, if None. Another one cannot
            speculate.

    Raises:
        MixtralError: before anything is traced, if a request cannot be served.
    """

    def __init__(
        self,
        model: Mixtral,
        requests: Sequence[Request],
        *,
        placement: Placement,
        data_shards: int = 1,
        prefill_chunk: int = PREFILL_CHUNK,
        speculate: int | None = None,
        kv_dtype: KVDtype | None = None,
        executor: Executor | None = None,
    ):
        check_requests(requests, model.config)
        if executor is not None and not isinstance(executor, Resident) and speculate is not None:
            raise speculation_refused()
        self._executor = executor or Resident(model, placement)
        self.model, self.placement = model, placement
        self.requests = list(requests)
        self.progress = Progress()
        self.rows = row_bucket(len(requests), data_shards)
        longest = max(len(request.prompt_ids) for request in requests)
        self.chunk = chunk_bucket(longest, prefill_chunk)
        self._largest_chunk = max(prefill_chunk, 1 + (speculate or 0))  # that the cache takes
        self._total = max(len(r.prompt_ids) + r.options.max_new_tokens for r in requests)
        self._speculate = speculate
        activations = model.embed_tokens.get_value().dtype
        self._kv_dtype = cache_dtype(placement.kernels, kv_dtype, activations)
        self._stopped = np.zeros((self.rows,), np.bool_)

    def stop(self, row: int) -> None:
        """Ends a row before the next chunk."""
        self._stopped[row] = True

    def _state(self) -> steps.DecodeState:
        last = [r.prompt_ids[-1] for r in self.requests]
        fill = self.rows - len(last)
        return self._executor.start(
            np.asarray(last + [0] * fill, np.int32),
            np.asarray([False] * len(last) + [True] * fill),
            slots=slot_bucket(self.model.config, self._total, self._largest_chunk),
            chunk=self.chunk,
            dtype=self._kv_dtype,
        )

    def _prefill(self, state: steps.DecodeState) -> steps.DecodeState:
        before_last = [np.asarray(r.prompt_ids[:-1], np.int32) for r in self.requests]
        longest = max(map(len, before_last))
        for start in range(0, longest, self.chunk):
            tokens = np.zeros((self.rows, self.chunk), np.int32)
            counts = np.zeros((self.rows,), np.int32)
            for row, ids in enumerate(before_last):
                part = ids[start : start + self.chunk]
                tokens[row, : len(part)] = part
                counts[row] = len(part)
            hosts.begin_step()
            state = self._executor.prefill(state, tokens, counts)
        return state

    def _speculator(self) -> Speculator | None:
        if self._speculate is None:
            return None
        speculator = Speculator(
            [r.prompt_ids for r in self.requests],
            rows=self.rows,
            size=length_bucket(self._total),
            num_drafts=self._speculate,
            placement=self.placement,
        )
        self.progress.speculated = speculator.report
        return speculator

    def _limits(self) -> steps.Limits:
        budget = [r.options.max_new_tokens for r in self.requests]
        budget += [0] * (self.rows - len(budget))
        eos_ids = np.asarray(self.model.config.eos_token_ids, np.int32)
        return steps.Limits(np.asarray(budget, np.int32), self._stopped.copy(), eos_ids)

    def chunks(self, steps_per_chunk: int = steps.STEPS_PER_CALL) -> Iterator[Chunk]:
        """Generates; ``steps_per_chunk`` steps at most between two looks from outside.

        A step writes a token to each row, with speculation up to ``speculate`` + 1.
        """
        progress = self.progress
        watch = Stopwatch()
        state = jax.block_until_ready(self._prefill(self._state()))
        progress.prefill_seconds, progress.compile_seconds = watch.read()
        progress.prefill_tokens = sum(len(r.prompt_ids) - 1 for r in self.requests)
        padding = [self.requests[0]] * (self.rows - len(self.requests))
        padded = self.requests + padding
        rows = row_sampling(
            [r.options for r in padded],
            [r.sample_id for r in padded],
            self.model.config.vocab_size,
        )
        num = len(self.requests)
        speculator = self._speculator()
        is_done = False
        while not is_done:
            watch = Stopwatch()
            limits = self._limits()
            if speculator is None:
                hosts.begin_step()
                state, emitted = self._executor.decode_step(state, rows, limits, steps_per_chunk)
            else:
                state, emitted = speculator.step(self.model, state, rows, limits, steps_per_chunk)
            tokens, logprobs, counts, done, bad, dropped = hosts.fetch(
                (*emitted, state.is_done, state.is_bad, state.dropped)
            )
            seconds, compiling = watch.read()
            progress.decode_seconds += seconds
            progress.compile_seconds += compiling
            written = int(counts[:num].sum())
            progress.decode_tokens += written
            if speculator is not None:
                speculator.learn(seconds, written)
            progress.dropped = dropped.tolist()
            progress.is_bad = bad[:num].tolist()
            is_done = bool(done.all())
            yield Chunk(
                token_ids=[tokens[b, : counts[b]].tolist() for b in range(num)],
                logprobs=[logprobs[b, : counts[b]].tolist() for b in range(num)],
            )
            is_done |= bool((done | self._stopped).all())
        progress.expert_counts = np.asarray(hosts.fetch(state.expert_counts))[:num]
