"""The engine: what any thread may call, and the one thread that works.

HTTP or a test submits a request and reads its ticket. All of jax happens in the engine's thread.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from typing import Any

from mixtral_jax.decode.generate import PREFILL_CHUNK, check_token_ids
from mixtral_jax.decode.timing import num_compiled
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.serve.answer import Answer
from mixtral_jax.serve.commands import Command, Stop
from mixtral_jax.serve.device import Device, DevicePlan, warm
from mixtral_jax.serve.loop import Loop, LoopFacts
from mixtral_jax.serve.metrics import Metrics
from mixtral_jax.serve.prefix import PrefixCache
from mixtral_jax.serve.request import (
    EngineLimits,
    EngineState,
    EngineStats,
    Failed,
    ModelFacts,
    Refused,
    ServeRequest,
)
from mixtral_jax.serve.scheduler import MAX_WAITING_TOKENS, Scheduler
from mixtral_jax.serve.slots import FEWEST_ROWS, plan_classes
from mixtral_jax.serve.ticket import EngineTicket
from mixtral_jax.serve.work import Work, check_sampling

_MOST_TOTAL_TOKENS = 4096  # of a request, unless asked for more
_IDLE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How much the engine takes; TGI's names and meanings where it has them.

    Attributes:
        max_input_tokens: of a prompt; all of ``max_total_tokens`` but one, if None.
        max_total_tokens: of a prompt and its answer; what the model has positions for, up to
            4096, if None.
        max_batch_prefill_tokens: prompt tokens being read at one time; 4096, or the longest
            prompt, if None.
        max_batch_total_tokens: tokens of all slots; see ``plan_classes`` for None.
        max_batch_size: requests that run at one time; as many as there are slots, if None.
        max_concurrent_requests: waiting and running; further ones are refused.
        waiting_served_ratio: fewer waiting requests than this share of the running ones wait for
            up to ``max_waiting_tokens`` steps.
        max_waiting_tokens: see there.
        prefill_chunk: prompt tokens read between two calls of decoding, and the unit of the
            prefix cache.
        prefill_rows: prompts that are read at one time.
        prefix_cache_bytes: kept keys and values of prompts; 0 keeps none.
        steps_per_call: tokens that a row writes between two looks from outside, while others wait;
            twice as many while nobody does.
    """

    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_batch_size: int | None = None
    max_concurrent_requests: int = 128
    waiting_served_ratio: float = 0.3
    max_waiting_tokens: int = MAX_WAITING_TOKENS
    prefill_chunk: int = 256
    prefill_rows: int = 4
    prefix_cache_bytes: int = 256 << 20
    steps_per_call: int = 4

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in ("prefix_cache_bytes", "waiting_served_ratio") else 1
            if value is not None and not value >= least:
                what = "--" + name.replace("_", "-")
                raise MixtralError(what, expected=f"at least {least}", got=value, code=USAGE)
        chunk = self.prefill_chunk
        if chunk & (chunk - 1) or not _SMALLEST_CHUNK <= chunk <= PREFILL_CHUNK:
            expected = f"a power of two from {_SMALLEST_CHUNK} to {PREFILL_CHUNK}"
            raise MixtralError("--prefill-chunk", expected=expected, got=chunk, code=USAGE)


_SMALLEST_CHUNK = 16
_TAIL = 32  # prompts shorter than this, or ends of prompts, are read by a smaller program


def plan_limits(lm: LanguageModel, options: EngineOptions) -> tuple[EngineLimits, DevicePlan]:
    """What an engine takes, and the shapes it needs for that.

    Raises:
        MixtralError: exit code 64 for limits that do not fit each other or the model.
    """
    longest = lm.config.max_position_embeddings
    total = options.max_total_tokens or min(longest, _MOST_TOTAL_TOKENS)
    inputs = options.max_input_tokens or total - 1
    prefill = options.max_batch_prefill_tokens or max(4096, inputs)
    for what, is_fine, expected, got in (
        ("--max-total-tokens", total <= longest, f"at most {longest} (the model's)", total),
        ("--max-input-tokens", inputs < total, f"less than --max-total-tokens {total}", inputs),
        ("--max-batch-prefill-tokens", prefill >= inputs, f"at least {inputs}", prefill),
    ):
        if not is_fine:
            raise MixtralError(what, expected=expected, got=got, code=USAGE)
    multiple = FEWEST_ROWS * lm.spec.data
    classes = plan_classes(
        total,
        max_batch_total_tokens=options.max_batch_total_tokens,
        max_batch_size=options.max_batch_size,
        multiple=multiple,
    )
    slots = tuple((c.length, c.rows) for c in classes)
    all_tokens = options.max_batch_total_tokens or sum(n * rows for n, rows in slots)
    limits = EngineLimits(
        max_input_tokens=inputs,
        max_total_tokens=total,
        max_batch_prefill_tokens=prefill,
        max_batch_total_tokens=all_tokens,
        max_concurrent_requests=options.max_concurrent_requests,
        max_batch_size=options.max_batch_size,
        waiting_served_ratio=options.waiting_served_ratio,
        slots=slots,
    )
    chunk = options.prefill_chunk
    scratch_rows = -(-options.prefill_rows // multiple) * multiple
    sizes = (chunk,) if chunk <= _TAIL else (_TAIL, chunk)
    plan = DevicePlan(
        classes=classes, scratch_rows=scratch_rows, chunk=chunk, sizes=sizes, kv_dtype=lm.kv_dtype
    )
    return limits, plan


class Engine:
    """Serves one model; see EngineProtocol.

    ``start`` makes the programs in the engine's thread; until then it is ``loading``.

    Args:
        lm: the model on its mesh.
        options: how much it takes.
        name: what clients call the model.
        digest: of the weights, where known.
        quantize: how the weights were quantized.
        tell: sends a command to other processes before it is executed here.
    """

    def __init__(
        self,
        lm: LanguageModel,
        options: EngineOptions | None = None,
        *,
        name: str = "mixtral",
        digest: str | None = None,
        quantize: str | None = None,
        tell: Callable[[Command], None] | None = None,
    ):
        self._lm, self._options = lm, options or EngineOptions()
        self.limits, self._plan = plan_limits(lm, self._options)
        config, tokenizer = lm.config, lm.tokenizer
        self.model = ModelFacts(
            name=name,
            digest=digest,
            dtype=str(lm.model.embed_tokens.get_value().dtype),
            quantize=quantize,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            eos_ids=tuple(config.eos_token_ids),
            is_v3=tokenizer is not None and tokenizer.version == "v3",
            mesh=str(lm.spec),
        )
        self._tell = tell
        self._changed = threading.Condition()  # guards all below
        self._scheduler = Scheduler(
            self.limits,
            self._plan.classes,
            scratch_rows=self._plan.scratch_rows,
            max_waiting_tokens=self._options.max_waiting_tokens,
        )
        self._state: EngineState = "loading"
        self._fault = ""
        self._must_end = False
        self._works: dict[EngineTicket, Work] = {}
        self._cancelled: list[EngineTicket] = []
        self._metrics = Metrics(config.num_hidden_layers, config.num_local_experts)
        self._prefixes = PrefixCache(self._options.prefix_cache_bytes)
        self._compiled = 0
        self._grammars: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="mixtral_jax engine")

    def start(self, *, wait: bool = False) -> None:
        """Starts the thread; with ``wait`` returns once it is ready.

        Raises:
            MixtralError: with ``wait``, if it does not become ready.
        """
        self._thread.start()
        if not wait:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._state != "loading")
            if self._state == "failed":
                raise MixtralError(self._fault)

    def submit(self, request: ServeRequest) -> EngineTicket:
        """See EngineProtocol."""
        self._check_state()
        try:
            check_token_ids([request.prompt_ids], self._lm.config)
        except MixtralError as error:
            raise Refused("invalid", str(error).replace("prompt 0", "prompt")) from None
        sampling, tokenizer = request.sampling, self._lm.tokenizer
        check_sampling(sampling, self.model.vocab_size, has_text=tokenizer is not None)
        if request.adapter_id is not None and request.adapter_id not in self.model.adapters:
            known = ", ".join(self.model.adapters) or "none (this server was started without)"
            raise Refused("invalid", f"adapter {request.adapter_id}: expected {known}")
        ticket = EngineTicket(self._cancel)
        answer = Answer(request, tokenizer, frozenset(self.model.eos_ids))
        matcher = None
        if sampling.grammar is not None:
            matcher = self._compiler().compile(sampling.grammar)
        work = Work(request, ticket, answer, matcher)
        with self._changed:
            self._check_state()
            try:
                self._scheduler.submit(work.job)
            except Refused as refused:
                self._metrics.count(f"refused_{refused.kind}")
                raise
            self._works[ticket] = work
            self._metrics.count("requests")
            self._changed.notify_all()
        return ticket

    def _compiler(self) -> Any:
        with self._changed:
            if self._grammars is None:
                try:
                    from mixtral_jax.serve.grammar import GrammarCompiler

                    assert self._lm.tokenizer is not None
                    model = self.model
                    self._grammars = GrammarCompiler(
                        self._lm.tokenizer, model.vocab_size, model.eos_ids
                    )
                except ImportError:
                    fix = "fix: pip install mixtral-jax[serve]"
                    raise Refused("invalid", f"grammar: needs llguidance; {fix}") from None
            return self._grammars

    def _check_state(self) -> None:
        state = self._state
        if state == "ready" and not self._must_end:
            return
        why = {"loading": "the model is loading", "draining": "the server is shutting down"}
        line = self._fault if state == "failed" else why.get(state, "the server has ended")
        raise Refused("unavailable", line)

    def _cancel(self, ticket: EngineTicket) -> None:
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify_all()

    def state(self) -> EngineState:
        """See EngineProtocol."""
        return self._state

    def stats(self) -> EngineStats:
        """See EngineProtocol."""
        with self._changed:
            sched = self._scheduler
            gauges = {
                "queue_size": sched.num_waiting,
                "batch_size": sched.num_admitted,
                "batch_tokens": sched.admitted_tokens,
                "slots_in_use": sched.slots.num_taken,
                "slots": sum(rows for _, rows in self.limits.slots),
                "prefix_cache_bytes": self._prefixes.num_bytes,
                "prefix_cache_max_bytes": self._prefixes.max_bytes,
                "prefix_cache_chunks": len(self._prefixes),
            }
            extra = {"compilations_since_ready": self._compiled}
            return self._metrics.snapshot(gauges, extra)

    def drain(self, seconds: float) -> bool:
        """See EngineProtocol."""
        with self._changed:
            if self._state == "ready":
                self._state = "draining"
            return self._changed.wait_for(lambda: not self._works, timeout=seconds)

    def close(self) -> None:
        """See EngineProtocol."""
        with self._changed:
            self._must_end = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
            self._end("the server has ended")
        except BaseException as error:  # whoever waits must hear of it, whatever it is
            fault = f"the engine stopped: {type(error).__name__}: {error}"
            print(f"error: {' '.join(fault.split())[:500]}", file=sys.stderr, flush=True)
            self._end(fault)

    def _end(self, fault: str) -> None:
        with self._changed:
            self._state, self._fault = "failed", fault
            works, self._works = list(self._works), {}
            self._changed.notify_all()
        for ticket in works:
            ticket.push([Failed(kind="unavailable", message=fault)])

    def _work(self) -> None:
        num_compiled()  # begins to count
        device = Device(self._lm.model, self._lm.placement, self._plan)

        def execute(command: Command) -> Any:
            if self._tell is not None:
                self._tell(command)
            return device.execute(command)

        warm(device, execute)
        loop = Loop(
            execute,
            scheduler=self._scheduler,
            prefixes=self._prefixes,
            facts=LoopFacts(
                plan=self._plan,
                slots=device.slots,
                block_bytes=device.block_bytes(),
                steps_per_call=self._options.steps_per_call,
            ),
            metrics=self._metrics,
            tokenizer=self._lm.tokenizer,
            eos_ids=self.model.eos_ids,
        )
        before = num_compiled()
        with self._changed:
            self._state = "ready"
            self._changed.notify_all()
        while not self._must_end:
            self._turn(loop)
            self._compiled = num_compiled() - before
        execute(Stop())

    def _turn(self, loop: Loop) -> None:
        with self._changed:
            is_idle = not (self._cancelled or loop.works or self._scheduler.num_waiting)
            if is_idle and not self._must_end:
                self._changed.wait(_IDLE_SECONDS)
            cancelled, self._cancelled = self._cancelled, []
            works = [self._works.get(ticket) for ticket in cancelled]
            for work in works:
                if work is not None:
                    loop.cancel(work)
            places = self._scheduler.admit()
        loop.begin(places)
        steps = loop.turn()
        with self._changed:
            self._scheduler.note_steps(steps)
            ended = [ticket for ticket in self._works if ticket.is_ended]
            for ticket in ended:
                del self._works[ticket]
            if ended:
                self._changed.notify_all()
