"""The training loop: steps, the log, evaluation, checkpoints, and an end in order.

The host runs one step ahead of the devices: measures of a step are fetched when the next one is
under way, so that batches are made while the devices compute. Whatever is written of a step (its
line of the log, a checkpoint) is written after its loss was seen to be a number.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mixtral_jax.errors import BAD_DATA, MixtralError, interrupted
from mixtral_jax.finetune import measures as gathered
from mixtral_jax.finetune.binding import check_bound
from mixtral_jax.finetune.checkpoint_record import Saved
from mixtral_jax.finetune.checkpoints import Checkpoints
from mixtral_jax.finetune.measures import Window
from mixtral_jax.finetune.metrics import MetricsLog
from mixtral_jax.finetune.options import RunOptions
from mixtral_jax.finetune.progress import Machine, ProgressLine, Speed
from mixtral_jax.finetune.stop import Stop
from mixtral_jax.sharding import hosts


@runtime_checkable
class Trainer(Protocol):
    """What makes updates (finetune/trainer.py)."""

    state: Any
    """A tree of arrays, all that an update changes."""

    @property
    def abstract(self) -> Any:
        """The same tree of ShapeDtypeStruct with shardings."""
        ...

    def step(self, batch: Any) -> Any:
        """One update; gives its Measures (finetune/step.py) and does not wait for them."""
        ...

    def evaluate(self, batch: Any) -> Any:
        """Measures of a batch, without an update."""
        ...


@runtime_checkable
class Batches(Protocol):
    """Batches without end, with a state (finetune/data/batches.py)."""

    @property
    def epoch(self) -> float:
        """How often the data was read."""
        ...

    def __next__(self) -> Any:
        """The next batch: this process's rows of it."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of the last batch, of all processes, without padding."""
        ...

    def state(self) -> dict[str, Any]:
        """For JSON: what comes after the batches that were given."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; exit code 65 if it is of other data or sizes."""
        ...

    def describe(self, state: Mapping[str, Any]) -> str:
        """The examples of the batch behind a state, for people."""
        ...


class _Pending(NamedTuple):
    """A step under way."""

    step: int
    epoch: float
    num_tokens: int
    before: dict[str, Any]  # state of the data before its batch
    measures: Any


@dataclasses.dataclass(kw_only=True)
class Loop:
    """A run of training, from its newest checkpoint to its end.

    Attributes:
        trainer: makes updates.
        batches: what it learns from.
        run: when to log, evaluate, sample and save.
        total_steps: updates in all.
        checkpoints: where it resumes from and saves to.
        stop: asks it to end early.
        bound: the options that it is bound to (binding.py).
        is_dpo: what measures mean.
        evaluation: gives all batches to evaluate with, each time anew.
        sample: answers prompts: ``prompt`` and ``text`` of each.
        machine: what a token costs.
        begun: called when nothing refused to resume, before anything is written.
        note: called with one line for people.
    """

    trainer: Trainer
    batches: Batches
    run: RunOptions
    total_steps: int
    checkpoints: Checkpoints
    stop: Stop
    bound: Mapping[str, str]
    is_dpo: bool = False
    evaluation: Callable[[], Iterable[Any]] | None = None
    sample: Callable[[], list[dict[str, str]]] | None = None
    machine: Machine | None = None
    begun: Callable[[], None] = lambda: None
    note: Callable[[str], None] = print

    def __post_init__(self):
        self.step = 0
        self.told: dict[str, Any] = {}  # the newest value of everything in the log
        self._window, self._pending = Window(), None
        self._speed, self._is_compiled = Speed(self.machine), False
        # The last steps that were: a run may be stopped before it looked at its newest one.
        self._looked: dict[str, int | None] = {"evaluated": None, "sampled": None}

    def train(self) -> dict[str, Any]:
        """Resumes, trains to ``total_steps`` and leaves a checkpoint of the end.

        Returns:
            The last values of the log; empty if there was nothing left to do.

        Raises:
            MixtralError: exit code 75 when it was asked to stop, with a checkpoint; 65 for a loss
                that is no number, a checkpoint of other options or of other data; 74 if the disk is
                full.
        """
        try:
            position = self._resume()
            self.begun()
            with contextlib.ExitStack() as stack:
                self._log = stack.enter_context(contextlib.closing(self._open_log(position)))
                line = ProgressLine(self.total_steps, self.step, is_shown=hosts.is_first())
                self._line = stack.enter_context(line)
                self.stop.is_saving = True
                if self.step > 0:
                    self._look()
                while self.step < self.total_steps:
                    self._step()
                self.checkpoints.wait()
        finally:
            self.stop.is_saving = False
            self.checkpoints.close()
        return self.told

    def _resume(self) -> int:
        """Restores the newest checkpoint; gives the position of the log."""
        record = self.checkpoints.newest()
        if record is None:
            return 0
        saved = record.saved
        check_bound(saved.options, self.bound, self.checkpoints.path(saved.step))
        self.batches.restore(saved.data)
        abstract = self.trainer.abstract
        self.trainer.state = None  # so that one state at a time is in memory
        self.trainer.state = self.checkpoints.restore(record, abstract)
        self.step = saved.step
        self._window.restore(saved.log["window"])
        self._looked = dict(saved.log["looked"])
        self.note(f"resuming from checkpoint-{saved.step}, of {self.total_steps} steps")
        if saved.total_steps != self.total_steps and self.step < self.total_steps:
            was = saved.total_steps
            self.note(f"it was to have {was} steps: the learning rate follows the new schedule")
        return saved.log["position"]

    def _open_log(self, position: int) -> MetricsLog:
        report_to = self.run.report_to if hosts.is_first() else "none"
        folder = self.checkpoints.folder
        return MetricsLog(folder, report_to, position=position, note=self.note)

    def _step(self) -> None:
        before, batch = self.batches.state(), next(self.batches)
        if hosts.is_any(self.stop.asked):
            self._end_early(before)  # that batch comes again
        hosts.begin_step()
        measures = self.trainer.step(batch)
        self._settle()
        self.step += 1
        self._pending = _Pending(
            self.step, self.batches.epoch, self.batches.num_tokens, before, measures
        )
        self._line.step(self.step)
        self._look()
        if self._is_due(self.run.save_steps):
            self._settle()
            self._save(self.batches.state())
        self.checkpoints.check()

    def _end_early(self, data: dict[str, Any]) -> None:
        self._settle()
        self._save(data)
        self.checkpoints.wait()
        raise interrupted()

    def _look(self) -> None:
        """Evaluates and samples the current step where that is due and was not done."""
        evaluates = self._is_due(self.run.eval_steps) and self._looked["evaluated"] != self.step
        if self.evaluation is not None and evaluates:
            self._evaluate(self.evaluation())
        samples = self._is_due(self.run.sample_steps) and self._looked["sampled"] != self.step
        if self.sample is not None and samples:
            self._sample(self.sample)

    def _is_due(self, every: int | None) -> bool:
        is_last = self.step == self.total_steps
        return is_last or (every is not None and self.step % every == 0)

    def _settle(self) -> None:
        """Waits for the step under way, and logs it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        found = gathered.fetch(pending.measures, is_dpo=self.is_dpo)
        if not gathered.is_finite(found):
            self._refuse(pending, found)
        self._window.add(found)
        self._speed.add(pending.num_tokens)
        if not self._is_compiled:
            self._speed.take()  # most of it was compiling
            self._is_compiled = True
        if pending.step % self.run.logging_steps == 0 or pending.step == self.total_steps:
            epoch = round(pending.epoch, 6)
            line = {"step": pending.step, "epoch": epoch, **self._window.take()}
            self._write({**line, **self._speed.take()})

    def _refuse(self, pending: _Pending, found: gathered.Found) -> None:
        """Ends a run whose weights are lost; no checkpoint has them."""
        self.checkpoints.wait()
        loss, norm = found["loss"], found["grad_norm"]
        examples = self.batches.describe(pending.before)
        last = self.checkpoints.last_step
        kept = "there is no checkpoint" if last is None else f"checkpoint-{last} is sound"
        raise MixtralError(
            f"step {pending.step}, of {examples}: the loss is {loss}, "
            f"the norm of its gradient {norm}; {kept}",
            fix="look at these examples, or begin another --output-dir with a lower "
            "--learning-rate",
            code=BAD_DATA,
        )

    def _write(self, line: dict[str, Any]) -> None:
        self.told |= line
        self._log.write(line)
        self._line.tell(line)

    def _evaluate(self, batches: Iterable[Any]) -> None:
        self._settle()
        with self._speed.paused():
            found = []
            for batch in batches:
                if hosts.is_any(self.stop.asked):
                    self._end_early(self.batches.state())  # to be evaluated when it resumes
                hosts.begin_step()
                measures = self.trainer.evaluate(batch)
                found.append(gathered.fetch(measures, is_dpo=self.is_dpo))
            self._write({"step": self.step, **gathered.evaluated(found)})
        self._looked["evaluated"] = self.step

    def _sample(self, sample: Callable[[], list[dict[str, str]]]) -> None:
        self._settle()
        if hosts.is_any(self.stop.asked):
            self._end_early(self.batches.state())
        with self._speed.paused():
            self._write({"step": self.step, "samples": sample()})
        self._looked["sampled"] = self.step

    def _save(self, data: dict[str, Any]) -> None:
        """Saves the current step, whose loss was seen; nothing where that is saved already."""
        if self.step in (0, self.checkpoints.last_step):
            return
        with self._speed.paused():
            log = {
                "position": self._log.position(),
                "window": self._window.state(),
                "looked": dict(self._looked),
            }
            saved = Saved(
                step=self.step,
                total_steps=self.total_steps,
                data=data,
                log=log,
                options=self.bound,
            )
            self.checkpoints.save(self.trainer.state, saved)
