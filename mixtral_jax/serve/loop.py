"""The turns of the engine's own thread: admit, read a chunk, take some steps, make text.

Everything that the device does is a command (commands.py), so that it can be repeated elsewhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from mixtral_jax.serve import commands
from mixtral_jax.serve.answer import token_score
from mixtral_jax.serve.commands import Command, Scores, Stepped
from mixtral_jax.serve.device import DevicePlan
from mixtral_jax.serve.metrics import Metrics
from mixtral_jax.serve.prefix import PrefixCache, chunk_digests
from mixtral_jax.serve.request import Event, Failed, FailureKind, Finished, Started, TokenScore
from mixtral_jax.serve.scheduler import Admitted, Scheduler
from mixtral_jax.serve.work import Pairs, Work, controls
from mixtral_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopFacts:
    """What the turns need to know of the device.

    Attributes:
        plan: shapes.
        slots: cache slots of the rows that prompts are read into.
        block_bytes: of a kept chunk.
        steps_per_call: while others wait for a turn; twice as many while nobody does.
    """

    plan: DevicePlan
    slots: int
    block_bytes: int
    steps_per_call: int


def _best(work: Work, found: Stepped | Scores, row: int, i: int) -> Pairs:
    """As many of the likeliest tokens at a place as the request wants."""
    number = work.request.sampling.top_logprobs
    if not number or found.best_ids is None or found.best_logprobs is None:
        return []
    ids, logprobs = found.best_ids[row, i, :number], found.best_logprobs[row, i, :number]
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True))


class Loop:
    """Runs what the scheduler admits. One thread owns it.

    Args:
        execute: does a command on the device (or on all).
        scheduler: shared with those who submit: used under their lock only in ``turn``'s caller.
        prefixes: which chunks are kept.
        facts: of the device.
        metrics: what happened.
        tokenizer: for the texts of tokens.
        eos_ids: ids that end an answer.
    """

    def __init__(
        self,
        execute: Callable[[Command], Any],
        *,
        scheduler: Scheduler,
        prefixes: PrefixCache,
        facts: LoopFacts,
        metrics: Metrics,
        tokenizer: Tokenizer | None,
        eos_ids: Collection[int],
    ):
        self._execute, self._scheduler, self._prefixes = execute, scheduler, prefixes
        self._facts, self._metrics = facts, metrics
        self._tokenizer, self._eos_ids = tokenizer, frozenset(eos_ids)
        num_classes = len(facts.plan.classes)
        self._reading: dict[int, Work] = {}  # by scratch row
        self._running: list[dict[int, Work]] = [{} for _ in range(num_classes)]  # by slot

    @property
    def works(self) -> list[Work]:
        """All admitted requests."""
        return [w for rows in (self._reading, *self._running) for w in rows.values()]

    def begin(self, places: list[Admitted]) -> None:
        """Starts to read the prompts of requests that were just admitted."""
        if places:
            self._metrics.observe("next_batch_size", len(places))
        for place in places:
            work = place.job.key
            assert isinstance(work, Work)
            work.place, work.began = place, time.monotonic()
            self._reading[place.scratch_row] = work
            self._restart(work, place)

    def _restart(self, work: Work, place: Admitted) -> None:
        request, facts = work.request, self._facts
        self._execute(commands.Restart(row=place.scratch_row, adapter=work.adapter))
        if self._prefixes.max_bytes < facts.block_bytes:
            return
        chunk = facts.plan.chunk
        # A chunk is whole in the ring only while the row has not wrapped around.
        most = facts.slots // chunk
        digests = chunk_digests(
            request.prompt_ids, chunk, cache_key=request.cache_key, adapter_id=request.adapter_id
        )
        work.digests = list(digests)[:most]

    def _restore(self, work: Work, row: int) -> None:
        """Takes the next chunks that are kept, also those that another row has just read."""
        if work.request.sampling.prompt_logprobs:
            return  # its prompt must be read to be scored
        chunk, before = self._facts.plan.chunk, work.num_read
        for block_id in self._prefixes.longest(work.digests)[before // chunk :]:
            start = work.num_read
            tokens = tuple(work.request.prompt_ids[start : start + chunk])
            self._execute(commands.Restore(row=row, start=start, block_id=block_id, tokens=tokens))
            work.num_read += chunk
        work.num_cached += work.num_read - before
        self._metrics.count("cached_tokens", work.num_read - before)

    def _to_read(self) -> dict[int, Work]:
        """Who reads a chunk now: of rows whose next chunk is the same, one reads it for all."""
        works, digests = dict[int, Work](), set[bytes]()
        for row, work in self._reading.items():
            self._restore(work, row)
            digest = work.next_digest(self._facts.plan.chunk)
            must_read = work.request.sampling.prompt_logprobs or digest not in digests
            if must_read and not work.is_read:
                works[row] = work
            if digest is not None:
                digests.add(digest)
        return works

    def cancel(self, work: Work) -> None:
        """Ends a request that nobody waits for; its slot is free at once."""
        self._fail(work, "cancelled", "the request was cancelled")

    def turn(self) -> int:
        """Reads one chunk, and takes steps in every pool that has rows; returns steps taken."""
        self._insert_read()
        if self._reading:
            works = self._to_read()
            if works:
                self._read(works)
            self._insert_read()
        return max((self._step(c) for c, rows in enumerate(self._running) if rows), default=0)

    def _read(self, works: dict[int, Work]) -> None:
        """The next chunk of every prompt."""
        plan, started = self._facts.plan, time.monotonic()
        parts = {
            row: work.request.prompt_ids[work.num_read : work.num_to_read][: plan.chunk]
            for row, work in works.items()
        }
        longest = max(map(len, parts.values()))
        asked = [work.request.sampling for work in works.values()]
        is_scored = any(sampling.prompt_logprobs for sampling in asked)
        wants_best = any(s.prompt_logprobs and s.top_logprobs for s in asked)
        size = plan.chunk if is_scored else next(s for s in plan.sizes if s >= longest)
        tokens = np.zeros((plan.scratch_rows, size), np.int32)
        targets, counts = np.zeros_like(tokens), np.zeros((plan.scratch_rows,), np.int32)
        for row, part in parts.items():
            start, work = works[row].num_read, works[row]
            tokens[row, : len(part)] = part
            targets[row, : len(part)] = work.request.prompt_ids[start + 1 : start + 1 + len(part)]
            counts[row] = len(part)
        scores: Scores | None = self._execute(
            commands.Read(
                tokens=tokens,
                counts=counts,
                targets=targets if is_scored else None,
                wants_best=wants_best,
            )
        )
        for row, part in parts.items():
            work = works[row]
            if scores is not None and work.request.sampling.prompt_logprobs:
                work.prompt_logprobs += scores.logprobs[row, : len(part)].tolist()
                work.prompt_best += [_best(work, scores, row, i) for i in range(len(part))]
            self._keep(work, row, len(part))
            work.num_read += len(part)
        self._metrics.count("prefill_calls")
        self._metrics.count("prefill_tokens", int(counts.sum()))
        self._metrics.observe("prefill_call_seconds", time.monotonic() - started)

    def _keep(self, work: Work, row: int, size: int) -> None:
        """Keeps a chunk that was just read, if it is whole and new."""
        chunk = self._facts.plan.chunk
        index = work.num_read // chunk
        if size < chunk or index >= len(work.digests) or self._prefixes.has(work.digests[index]):
            return
        before = work.digests[:index]
        size = self._facts.block_bytes
        block_id, left = self._prefixes.keep(work.digests[index], size, before)
        if left:
            self._execute(commands.Forget(block_ids=tuple(left)))
        if block_id is not None:
            start = work.num_read
            self._execute(commands.Keep(row=row, start=start, block_id=block_id))

    def _insert_read(self) -> None:
        """Moves prompts that are read into their slots."""
        for row in [row for row, work in self._reading.items() if work.is_read]:
            work = self._reading.pop(row)
            assert work.place is not None
            slot, sampling = work.place.slot, work.request.sampling
            self._execute(
                commands.Insert(
                    class_id=slot.class_id,
                    from_row=row,
                    to_row=slot.row,
                    token=work.request.prompt_ids[-1],
                    budget=sampling.max_new_tokens,
                    adapter=work.adapter,
                    controls=controls(sampling),
                )
            )
            self._scheduler.has_read(work)
            self._running[slot.class_id][slot.row] = work

    def _step(self, class_id: int) -> int:
        """Some steps in one pool; returns how many."""
        works, masks = self._running[class_id], {}
        for row, work in list(works.items()):
            if work.matcher is not None:
                try:
                    masks[row] = work.matcher.mask()
                except ValueError as error:
                    self._fail(work, "generation", f"grammar: {error}")
        if not works:
            return 0
        is_crowded = self._reading or self._scheduler.num_waiting
        num_steps = self._facts.steps_per_call * (1 if is_crowded else 2)
        if masks or self._scheduler.could_admit():
            num_steps = 1  # a step costs as much with few rows: first those who wait, as in TGI
        started = time.monotonic()
        stepped: Stepped = self._execute(
            commands.Step(class_id=class_id, num_steps=num_steps, running=tuple(works), masks=masks)
        )
        now = time.monotonic()
        taken = int(stepped.counts.max())
        self._metrics.count("decode_calls")
        self._metrics.observe("decode_call_seconds", now - started)
        self._metrics.observe("decode_step_seconds", (now - started) / max(taken, 1))
        self._metrics.observe("batch_size", len(works))
        self._metrics.set_dropped(class_id, stepped.dropped)
        self._metrics.set_dropped(None, stepped.read_dropped)
        for row, work in list(works.items()):
            self._take(work, row, stepped, started, now)
        self._metrics.observe("text_seconds", time.monotonic() - now)
        return taken

    def _take(self, work: Work, row: int, stepped: Stepped, started: float, now: float) -> None:
        """Makes events of what a call wrote to a row."""
        count, events = int(stepped.counts[row]), list[Event]()
        work.expert_counts = stepped.expert_counts[row]
        if count and not work.answer.token_ids:
            # All tokens of a call come at once; the steps before the last took their share.
            work.first_token = started + (now - started) / count
            events.append(self._started(work))
            self._metrics.observe("time_to_first_token_seconds", now - work.submitted)
        num_before = len(work.answer.token_ids)
        for i in range(count):
            token_id = int(stepped.tokens[row, i])
            best = _best(work, stepped, row, i)
            events.append(work.answer.push(token_id, float(stepped.logprobs[row, i]), best))
            if work.answer.is_stopped:
                break
            if work.matcher is not None and token_id not in self._eos_ids:
                try:
                    work.matcher.take(token_id)
                except ValueError as error:
                    work.ticket.push(events)
                    self._fail(work, "generation", f"grammar: {error}")
                    return
        self._metrics.count("generated_tokens", len(work.answer.token_ids) - num_before)
        is_done = bool(stepped.is_done[row])
        work.ticket.push(events)
        # A row that met a stop string wrote on to the end of its call; that is not its text.
        if stepped.is_bad[row] and not work.answer.is_stopped:
            count = len(work.answer.token_ids)
            line = f"logits are NaN after {count} tokens; the weights are damaged"
            self._fail(work, "generation", line)
        elif is_done or work.answer.is_stopped:
            self._finish(work, now)

    def _started(self, work: Work) -> Started:
        scores = tops = None
        if work.request.sampling.prompt_logprobs:
            ids = work.request.prompt_ids
            scores = self._scores(zip(ids, [None, *work.prompt_logprobs], strict=True))
            if work.request.sampling.top_logprobs:
                tops = ((), *(self._scores(best) for best in work.prompt_best))
        queue_seconds = work.began - work.submitted
        self._metrics.observe("queue_seconds", queue_seconds)
        return Started(
            queue_seconds=queue_seconds, prompt_logprobs=scores, prompt_top_logprobs=tops
        )

    def _scores(self, pairs: Iterable[tuple[int, float | None]]) -> tuple[TokenScore, ...]:
        return tuple(token_score(self._tokenizer, i, p) for i, p in pairs)

    def _finish(self, work: Work, now: float) -> None:
        answer, request = work.answer, work.request
        reason = answer.finish()
        event = Finished(
            reason=reason,
            text=answer.text,
            token_ids=tuple(answer.token_ids),
            logprobs=tuple(answer.logprobs),
            tail=answer.tail,
            seed=request.sampling.seed,
            prefill_seconds=work.first_token - work.began,
            decode_seconds=now - work.first_token,
            queue_seconds=work.began - work.submitted,
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=work.num_cached,
        )
        count, metrics = len(answer.token_ids), self._metrics
        metrics.count(f"finished_{reason}")
        metrics.count("prompt_tokens", len(request.prompt_ids))
        metrics.observe("request_seconds", now - work.submitted)
        metrics.observe("time_per_token_seconds", (now - work.began) / max(count, 1))
        metrics.observe("prompt_length", len(request.prompt_ids))
        metrics.observe("generated_length", count)
        metrics.observe("max_new_length", request.sampling.max_new_tokens)
        self._leave(work)
        work.ticket.push([event])

    def _fail(self, work: Work, kind: FailureKind, message: str) -> None:
        self._metrics.count(f"failed_{kind}")
        self._leave(work)
        work.ticket.push([Failed(kind=kind, message=message)])

    def _leave(self, work: Work) -> None:
        """Frees its places: first here, then in the scheduler, so that who is told finds them."""
        if work.expert_counts is not None:
            self._metrics.add_experts(work.expert_counts)
        if work.place is not None:
            slot = work.place.slot
            if self._running[slot.class_id].get(slot.row) is work:
                del self._running[slot.class_id][slot.row]
            elif self._reading.get(work.place.scratch_row) is work:
                del self._reading[work.place.scratch_row]
        self._scheduler.end(work)
