"""Who runs next: a queue, admission by tokens, slots. Pure Python; names and rules as TGI's.

A request waits, is being read (its prompt goes through a row of the scratch state, chunk by
chunk), then runs in its slot. Both places are taken when it is admitted, so a prompt that
is read always finds its slot.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import deque
from collections.abc import Hashable, Sequence

from mixtral_jax.serve.request import EngineLimits, Refused
from mixtral_jax.serve.slots import LengthClass, Slot, Slots

MAX_WAITING_TOKENS = 20  # TGI's --max-waiting-tokens


@dataclasses.dataclass(frozen=True)
class Job:
    """What the scheduler knows of a request."""

    key: Hashable
    prompt_tokens: int
    max_new_tokens: int

    @property
    def total(self) -> int:
        """Tokens it may come to."""
        return self.prompt_tokens + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class Admitted:
    """A job with its places: a row of the scratch state, then its slot."""

    job: Job
    slot: Slot
    scratch_row: int


class Scheduler:
    """Order and admission. Thread-safe: clients submit, the engine's thread does the rest.

    First come, first served, with one exception: a request may pass others that wait for slots of
    longer classes than it needs, since they could not use its slot.

    Args:
        limits: see EngineLimits.
        classes: the pools.
        scratch_rows: prompts that are read at one time.
        max_waiting_tokens: steps after which waiting requests no longer wait for
            ``waiting_served_ratio`` to be reached.
    """

    def __init__(
        self,
        limits: EngineLimits,
        classes: Sequence[LengthClass],
        *,
        scratch_rows: int,
        max_waiting_tokens: int = MAX_WAITING_TOKENS,
    ):
        self.limits, self.max_waiting_tokens = limits, max_waiting_tokens
        self.slots = Slots(classes)
        self._scratch = list(range(scratch_rows - 1, -1, -1))
        self._waiting: deque[Job] = deque()
        self._places: dict[Hashable, Admitted] = {}
        self._reading: set[Hashable] = set()
        self._steps = 0  # since the last admission
        self._lock = threading.RLock()

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_admitted(self) -> int:
        """Requests that are read or run."""
        return len(self._places)

    @property
    def admitted_tokens(self) -> int:
        """Tokens that the admitted requests may come to."""
        with self._lock:
            return sum(place.job.total for place in self._places.values())

    @property
    def reading_tokens(self) -> int:
        """Prompt tokens of the requests being read."""
        with self._lock:
            return sum(self._places[key].job.prompt_tokens for key in self._reading)

    def check(self, job: Job) -> None:
        """Whether ``submit`` would take a request now.

        Raises:
            Refused: ``invalid`` if it can never run, ``overloaded`` if too many wait.
        """
        limits = self.limits
        if job.prompt_tokens > limits.max_input_tokens:
            raise Refused(
                "invalid",
                f"prompt: expected at most {limits.max_input_tokens} tokens, "
                f"got {job.prompt_tokens}; fix: shorten or truncate it",
            )
        if job.total > limits.max_total_tokens:
            raise Refused(
                "invalid",
                f"prompt and max_new_tokens: expected at most {limits.max_total_tokens} tokens "
                f"together, got {job.prompt_tokens} + {job.max_new_tokens}; "
                "fix: shorten the prompt or lower max_new_tokens",
            )
        with self._lock:
            if self.num_waiting + self.num_admitted >= limits.max_concurrent_requests:
                raise Refused(
                    "overloaded",
                    f"the server is full: {limits.max_concurrent_requests} requests wait or run; "
                    "fix: come again later",
                )

    def submit(self, job: Job) -> None:
        """Takes a request into the queue, or raises as ``check`` does."""
        with self._lock:
            self.check(job)
            self._waiting.append(job)

    def admit(self) -> list[Admitted]:
        """Requests that start being read now."""
        with self._lock:
            return self._admit()

    def _admit(self) -> list[Admitted]:
        admitted: list[Admitted] = []
        if not self._waiting or self._must_wait():
            return admitted
        blocked: set[int] = set()
        rest: deque[Job] = deque()
        while self._waiting and self._scratch:
            job = self._waiting.popleft()
            if not self._fits_batch(job):
                rest.append(job)  # nobody passes it: it would never fit
                break
            class_id = self._choose_class(job, blocked)
            if class_id is None:
                rest.append(job)
                # What this one waits for is not for those behind it.
                blocked.update(self.slots.fitting(job.total))
                continue
            place = Admitted(job, self.slots.take(class_id), self._scratch.pop())
            self._places[job.key] = place
            self._reading.add(job.key)
            admitted.append(place)
        self._waiting = rest + self._waiting
        if admitted:
            self._steps = 0
        return admitted

    def could_admit(self) -> bool:
        """Whether the request that has waited longest would find its places now."""
        with self._lock:
            if not (self._waiting and self._scratch) or self._must_wait():
                return False
            first = self._waiting[0]
            return self._fits_batch(first) and self._choose_class(first, set()) is not None

    def _must_wait(self) -> bool:
        """TGI's rule: a few waiting requests do not interrupt many running ones, for a while."""
        if self._steps >= self.max_waiting_tokens:
            return False
        enough = math.floor(self.num_admitted * self.limits.waiting_served_ratio)
        return self.num_waiting < enough

    def _fits_batch(self, job: Job) -> bool:
        limits = self.limits
        most = limits.max_batch_size
        if most is not None and self.num_admitted >= most:
            return False
        if self.admitted_tokens + job.total > limits.max_batch_total_tokens:
            return False
        reading = self.reading_tokens
        return not reading or reading + job.prompt_tokens <= limits.max_batch_prefill_tokens

    def _choose_class(self, job: Job, blocked: set[int]) -> int | None:
        for class_id in self.slots.fitting(job.total):
            if class_id not in blocked and self.slots.num_free(class_id):
                return class_id
        return None

    def has_read(self, key: Hashable) -> None:
        """Its prompt is read: the scratch row is free."""
        with self._lock:
            self._reading.remove(key)
            self._scratch.append(self._places[key].scratch_row)

    def note_steps(self, num_steps: int) -> None:
        """Decode steps were taken."""
        self._steps += num_steps

    def end(self, key: Hashable) -> None:
        """It finished, failed or was cancelled, wherever it was: its places are free."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                self._waiting = deque(job for job in self._waiting if job.key != key)
                return
            if key in self._reading:
                self.has_read(key)
            del self._places[key]
            self.slots.free(place.slot)
