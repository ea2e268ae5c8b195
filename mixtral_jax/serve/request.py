"""What crosses the seam between the engine and its fronts: requests, events and figures.

Pure Python: neither jax nor any web framework is needed to speak of a request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Literal, Protocol, TypeAlias, runtime_checkable

NUM_SEEDS = 2**64
MOST_TOP_LOGPROBS = 20
MOST_BIASES = 300  # pairs of logit_bias per request, OpenAI's limit

GrammarKind = Literal["json", "json_schema", "regex", "lark"]
FinishReason = Literal["length", "eos_token", "stop_sequence"]
FailureKind = Literal["generation", "overloaded", "unavailable", "invalid", "cancelled"]
EngineState = Literal["loading", "ready", "draining", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """What the text of an answer must obey.

    Attributes:
        kind: ``json`` is any JSON object and needs no text.
        text: a JSON schema, a regular expression, or a grammar in llguidance's Lark dialect.
    """

    kind: GrammarKind
    text: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSampling:
    """What one answer asks for; names as in transformers, TGI and OpenAI.

    All are values of arrays over rows on the device, so no mix of them compiles anything.

    Attributes:
        max_new_tokens: tokens to generate at most.
        temperature: divides the logits; 0 is greedy.
        top_k: keep this many best tokens.
        top_p: keep the smallest set of best tokens whose probability reaches this.
        min_p: keep tokens at least this fraction as probable as the best.
        typical_p: keep the tokens closest to the expected information, up to this probability.
        repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely.
        frequency_penalty: taken from a token's logit for each time the answer has it.
        presence_penalty: taken from the logit of every token that the answer has.
        logit_bias: (token id, what is added to its logit).
        seed: in [0, 2^64).
        sample_id: which sample of the prompt this is (``n``, ``best_of``).
        stop: texts that end the answer.
        ignore_eos: generate past the end-of-text token.
        top_logprobs: best tokens reported beside each generated one (and, with
            ``prompt_logprobs``, beside each of the prompt).
        prompt_logprobs: report the log-probability of each prompt token given those before it.
        include_stop: leave the stop string in the text.
        grammar: what the text must obey.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    sample_id: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    include_stop: bool = False
    grammar: Grammar | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeRequest:
    """One answer to one prompt.

    Attributes:
        prompt_ids: token ids, used as they are.
        sampling: options.
        adapter_id: one of the engine's adapters, or none.
        cache_key: only requests of equal keys share cached prefixes (a digest of the API key).
        request_id: for logs and traces.
        is_answer: an answer of a chat, whose first piece is shown without its leading space.
    """

    prompt_ids: tuple[int, ...]
    sampling: ServeSampling
    adapter_id: str | None = None
    cache_key: str = ""
    request_id: str = ""
    is_answer: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenScore:
    """A token and its natural log-probability under the raw logits (None for a first token).

    ``byte`` is what a byte piece stands for. ``text`` of one beyond ASCII, which is no character by
    itself, is the name of its piece: ``<0xC3>``.
    """

    id: int
    text: str
    logprob: float | None
    is_special: bool = False
    byte: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """The prompt is read and a first token was written; comes before every TokenEvent.

    ``prompt_logprobs`` has one score per prompt token where they were asked for, and
    ``prompt_top_logprobs`` the best tokens in its place, best first, where ``top_logprobs`` are
    wanted too (none for the first token, which nothing predicts).
    """

    queue_seconds: float
    prompt_logprobs: tuple[TokenScore, ...] | None = None
    prompt_top_logprobs: tuple[tuple[TokenScore, ...], ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One generated token.

    ``text`` is what may be shown now: empty while a character is incomplete or a stop string
    possible. ``piece`` is what the token adds to the answer: empty while a character is incomplete.
    ``top`` holds the best tokens of this step, best first.
    """

    index: int
    token: TokenScore
    text: str
    piece: str = ""
    top: tuple[TokenScore, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: why it ended.
        text: the whole answer; a stop string is cut unless ``include_stop``.
        token_ids: generated ids, the end-of-text id included.
        logprobs: one per generated id.
        tail: the end of ``text`` that no TokenEvent has shown.
        seed: of the request.
        prefill_seconds: from the first chunk to the first token.
        decode_seconds: from the first token to the last.
        queue_seconds: from submission to the first chunk.
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them came out of the prefix cache.
    """

    reason: FinishReason
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tail: str
    seed: int
    prefill_seconds: float
    decode_seconds: float
    queue_seconds: float
    prompt_tokens: int
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """The other end of a request: no answer, or no more of it."""

    kind: FailureKind
    message: str


Event: TypeAlias = Started | TokenEvent | Finished | Failed


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    """A request that is not taken at all.

    Args:
        kind: ``overloaded`` (come again after ``retry_seconds``), ``invalid`` or ``unavailable``.
        message: one line for people.
        retry_seconds: when another try may help.
    """

    def __init__(self, kind: FailureKind, message: str, *, retry_seconds: float = 1.0):
        super().__init__(message)
        self.kind: FailureKind = kind
        self.message = message
        self.retry_seconds = retry_seconds


@runtime_checkable
class Ticket(Protocol):
    """One accepted request. Thread-safe; its events are read once, by one reader."""

    def events(self) -> AsyncIterator[Event]:
        """The events, for asyncio; never blocks the loop. The last is Finished or Failed."""
        ...

    def iterate(self) -> Iterator[Event]:
        """The events, for a plain thread."""
        ...

    def cancel(self) -> None:
        """Frees the slot within a step; the last event is Failed("cancelled"). Idempotent."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What the engine takes, in TGI's names.

    Attributes:
        max_input_tokens: of a prompt.
        max_total_tokens: of a prompt and its answer.
        max_batch_prefill_tokens: prompt tokens being read at one time.
        max_batch_total_tokens: prompt and answer tokens of all running requests.
        max_concurrent_requests: waiting and running; further ones are refused as overloaded.
        max_batch_size: running requests, or as many as there are slots.
        waiting_served_ratio: running requests pause for waiting ones beyond this ratio.
        slots: (length, how many slots have it), in order of length.
    """

    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int
    max_concurrent_requests: int
    max_batch_size: int | None = None
    waiting_served_ratio: float = 0.3
    slots: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is served. ``digest`` is that of the converted weights, where known."""

    name: str
    digest: str | None
    dtype: str
    quantize: str | None
    vocab_size: int
    max_position_embeddings: int
    eos_ids: tuple[int, ...]
    adapters: tuple[str, ...] = ()
    is_v3: bool = False
    mesh: str = "1x1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of observations at most each bound, cumulative, as Prometheus has them."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one per bound
    count: int
    sum: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot for /metrics.

    Attributes:
        counters: only grow: requests by end (``finished_length``, ``failed_generation``, ...),
            ``prompt_tokens``, ``cached_tokens``, ``generated_tokens``, ``prefill_calls``,
            ``decode_calls``, ``compilations_since_ready``, ...
        gauges: ``queue_size``, ``batch_size``, ``batch_tokens``, ``slots_in_use``,
            ``prefix_cache_bytes``, ...
        histograms: seconds of prefill and decode calls, batch sizes, ...
        expert_load: assignments per layer and expert of requests that ran and ended, however.
        dropped: assignments left out, per layer (0 unless overflow="drop").
    """

    counters: Mapping[str, int]
    gauges: Mapping[str, float]
    histograms: Mapping[str, Histogram]
    expert_load: tuple[tuple[int, ...], ...] = ()
    dropped: tuple[int, ...] = ()


@runtime_checkable
class EngineProtocol(Protocol):
    """What a front may ask of an engine. Thread-safe."""

    @property
    def limits(self) -> EngineLimits:
        """What it takes."""
        ...

    @property
    def model(self) -> ModelFacts:
        """What it serves."""
        ...

    def submit(self, request: ServeRequest) -> Ticket:
        """Takes a request, or raises Refused at once."""
        ...

    def state(self) -> EngineState:
        """Whether it serves."""
        ...

    def stats(self) -> EngineStats:
        """Counters and gauges."""
        ...

    def drain(self, seconds: float) -> bool:
        """Takes no new requests and waits for the running ones; whether all ended in time."""
        ...

    def close(self) -> None:
        """Ends it; whoever still waits gets Failed("unavailable")."""
        ...
