"""How fast a run is, and the line about it on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 10.0


class Machine(NamedTuple):
    """What a token costs and what the devices could do.

    Attributes:
        flops_per_token: of the model in training, forward and backward, by formula.
        peak_flops: of all devices together per second; None where it is not known.
    """

    flops_per_token: float
    peak_flops: float | None


class Speed:
    """Tokens over time since the last line of the log; evaluation and the like do not count."""

    def __init__(self, machine: Machine | None = None):
        self._machine = machine
        self._tokens, self._since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Adds tokens that were read, padding apart, by all processes."""
        self._tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves a block out."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - before

    def take(self) -> dict[str, float]:
        """Seconds, tokens per second and, where the devices' peak is known, the share of it that
        the model's own products make up (MFU, arXiv 2204.02311); begins anew.

        Nothing where nothing was added.
        """
        now = time.perf_counter()
        if not self._tokens:
            self._since = now
            return {}
        seconds = max(now - self._since, 1e-9)
        found = {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self._tokens / seconds, 2),
        }
        if self._machine is not None and self._machine.peak_flops is not None:
            used = self._machine.flops_per_token * self._tokens / seconds
            found["mfu"] = round(used / self._machine.peak_flops, 5)
        self._tokens, self._since = 0, now
        return found


class ProgressLine:
    """One live line on a terminal; where stderr is none, a plain line now and then.

    Args:
        total: steps.
        done: steps that were done before.
        is_shown: only one process shows it.
    """

    def __init__(self, total: int, done: int, *, is_shown: bool = True):
        console = Console(stderr=True)
        self._is_plain = is_shown and not console.is_terminal
        self._total, self._last, self._told = total, 0.0, ""
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (is_shown and console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, told="")

    def __enter__(self) -> ProgressLine:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def step(self, step: int) -> None:
        """Shows that a step is done."""
        self._bar.update(self._task, completed=step)

    def tell(self, line: Mapping[str, Any]) -> None:
        """Shows a line of the log."""
        self._told = told(line) or self._told
        self._bar.update(self._task, completed=line["step"], told=self._told)
        now = time.monotonic()
        is_last = line["step"] == self._total
        is_due = is_last or now - self._last > _SECONDS_BETWEEN_LINES
        if self._is_plain and is_due and told(line):
            self._last = now
            print(f"step {line['step']}/{self._total}  {told(line)}", file=sys.stderr, flush=True)


_TOLD = {
    "loss": "loss {:.4f}",
    "eval_loss": "eval loss {:.4f}",
    "eval_perplexity": "perplexity {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}


def told(line: Mapping[str, Any]) -> str:
    """What of a line fits on one."""
    parts = [form.format(line[k]) for k, form in _TOLD.items() if line.get(k) is not None]
    return "  ".join(parts)
