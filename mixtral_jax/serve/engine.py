"""The engine: what any thread may call, and the one thread that works.

HTTP or a test submits a request and reads its ticket. All of jax happens in the engine's thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from mixtral_jax.decode.generate import check_token_ids
from mixtral_jax.decode.timing import num_compiled
from mixtral_jax.errors import INTERNAL, MixtralError
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.serve.answer import Answer
from mixtral_jax.serve.commands import Command, Stop
from mixtral_jax.serve.device import Device, warm
from mixtral_jax.serve.follow import tell as tell_others
from mixtral_jax.serve.grammar import GrammarCompiler, Matcher
from mixtral_jax.serve.limits import EngineOptions, plan_limits
from mixtral_jax.serve.loop import Loop, LoopFacts
from mixtral_jax.serve.metrics import Metrics
from mixtral_jax.serve.prefix import PrefixCache
from mixtral_jax.serve.request import (
    EngineState,
    EngineStats,
    Failed,
    Grammar,
    ModelFacts,
    Refused,
    ServeRequest,
)
from mixtral_jax.serve.scheduler import Job, Scheduler
from mixtral_jax.serve.ticket import EngineTicket
from mixtral_jax.serve.work import Work, check_sampling
from mixtral_jax.tokenizer import Tokenizer

END_SECONDS = 20.0  # for a device to finish what it does
_IDLE_SECONDS = _JOIN_SECONDS = 1.0
_ENDED = "the server has ended"


class _EndedError(Exception):
    """Asked to end while it was loading."""


class Engine:
    """Serves one model; see EngineProtocol.

    ``start`` makes the programs in the engine's thread; until then it is ``loading``.

    Args:
        lm: the model on its mesh.
        options: how much it takes.
        name: what clients call the model.
        digest: of the weights, where known.
        quantize: how the weights were quantized.
        adapters: names of those that ``with_adapters`` gave the model, in order.
        tell: sends a command to other processes, if there are any, before it is executed here.
    """

    def __init__(
        self,
        lm: LanguageModel,
        options: EngineOptions | None = None,
        *,
        name: str = "mixtral",
        digest: str | None = None,
        quantize: str | None = None,
        adapters: Sequence[str] = (),
        tell: Callable[[Command], None] = tell_others,
    ):
        self._lm, self._options = lm, options or EngineOptions()
        self.limits, self._plan = plan_limits(lm, self._options, len(adapters))
        config, tokenizer = lm.config, lm.tokenizer
        self.model = ModelFacts(
            name=name,
            digest=digest,
            dtype=str(lm.model.embed_tokens.get_value().dtype),
            quantize=quantize,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            eos_ids=tuple(config.eos_token_ids),
            adapters=tuple(adapters),
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
        self._must_end = self._is_warm = False
        self._works: dict[EngineTicket, Work] = {}
        self._cancelled: list[EngineTicket] = []
        self._metrics = Metrics(config.num_hidden_layers, config.num_local_experts)
        self._prefixes = PrefixCache(self._options.prefix_cache_bytes)
        self._compiled = 0
        self._grammars: GrammarCompiler | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="mixtral_jax engine")

    def start(self, *, wait: bool = False) -> None:
        """Starts the thread; with ``wait`` returns once it is ready, as ``wait`` does."""
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns once it no longer loads.

        Raises:
            MixtralError: exit code 70 if it failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._state != "loading")
            if self._state == "failed":
                raise MixtralError(self._fault, code=INTERNAL)

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
            # Who finds no room must not cost anything.
            job = Job(ticket, len(request.prompt_ids), sampling.max_new_tokens)
            self._count_refusal(lambda: self._scheduler.check(job))
            matcher = self._compile(sampling.grammar)
        names = (None, *self.model.adapters)
        work = Work(request, ticket, answer, matcher, adapter=names.index(request.adapter_id))
        with self._changed:
            self._check_state()
            self._count_refusal(lambda: self._scheduler.submit(work.job))
            self._works[ticket] = work
            self._metrics.count("requests")
            self._changed.notify_all()
        return ticket

    def _count_refusal(self, ask: Callable[[], None]) -> None:
        try:
            ask()
        except Refused as refused:
            self._metrics.count(f"refused_{refused.kind}")
            raise

    def _compile(self, grammar: Grammar) -> Matcher:
        if self._grammars is None:
            fix = "fix: pip install mixtral-jax[serve]"
            needs = "llguidance and a model with an end-of-text token"
            raise Refused("invalid", f"grammar: needs {needs}; {fix}")
        return self._grammars.compile(grammar)

    def _make_compiler(self) -> GrammarCompiler | None:
        """Before it is ready, since the tables of a large vocabulary take a second."""
        model, tokenizer = self.model, self._lm.tokenizer
        if tokenizer is None or not model.eos_ids:
            return None
        try:
            return GrammarCompiler(tokenizer, model.vocab_size, model.eos_ids)
        except ImportError:
            return None

    def _check_state(self) -> None:
        state = self._state
        if state == "ready" and not self._must_end:
            return
        why = {"loading": "the model is loading", "draining": "the server is shutting down"}
        line = self._fault if state == "failed" else why.get(state, _ENDED)
        raise Refused("unavailable", line)

    def _cancel(self, ticket: EngineTicket) -> None:
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify_all()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the model; None where its checkpoint has none."""
        return self._lm.tokenizer

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
            if self._state in ("ready", "loading"):
                self._state = "draining"
            return self._changed.wait_for(lambda: not self._works, timeout=seconds)

    def close(self) -> None:
        """See EngineProtocol."""
        with self._changed:
            self._must_end = True
            self._changed.notify_all()
            if not self._thread.is_alive():
                return
            has_ended = self._changed.wait_for(lambda: self._state == "failed", END_SECONDS)
        if not has_ended:
            self._end(f"{_ENDED}: its device did not answer")
        self._thread.join(_JOIN_SECONDS)

    @property
    def has_ended(self) -> bool:
        """Whether its thread is gone; not where ``close`` gave up on a device that hangs."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
            self._end(_ENDED)
        except _EndedError:
            self._end(_ENDED)
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
        self._grammars = self._make_compiler()
        device = Device(self._lm.model, self._lm.placement, self._plan)

        def execute(command: Command) -> Any:
            if self._must_end and not self._is_warm:
                self._tell(Stop())
                raise _EndedError
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
        self._is_warm = True
        with self._changed:
            if self._state == "loading":  # or nobody wants it any more
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
