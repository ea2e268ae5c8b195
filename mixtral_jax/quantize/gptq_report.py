"""What calibration saw of each layer, and what quantizing did to its outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class OutputError:
    """Sums over the calibration inputs of one or more matrices.

    Attributes:
        gptq: squared error of the outputs.
        nearest: the same if values are rounded to the nearest on the same kind of grid.
        outputs: squares of the outputs.
    """

    gptq: float = 0.0
    nearest: float = 0.0
    outputs: float = 0.0

    @property
    def relative(self) -> float:
        """Norm of the error over that of the outputs; 0 where that is zero."""
        return math.sqrt(self.gptq / self.outputs) if self.outputs else 0.0

    @property
    def relative_nearest(self) -> float:
        """The same of rounding to nearest."""
        return math.sqrt(self.nearest / self.outputs) if self.outputs else 0.0

    def __add__(self, other: OutputError) -> OutputError:
        return OutputError(
            self.gptq + other.gptq, self.nearest + other.nearest, self.outputs + other.outputs
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer.

    Attributes:
        layer: which.
        tokens: of the calibration text that the router sent to each expert.
        few_tokens: experts that had fewer than ``threshold``, so that all tokens were used.
        threshold: inputs of an expert's widest matrix.
        outputs: by weight.
    """

    layer: int
    tokens: tuple[int, ...]
    few_tokens: tuple[int, ...]
    threshold: int
    outputs: Mapping[str, OutputError]

    @property
    def total(self) -> OutputError:
        """Of all weights."""
        return sum(self.outputs.values(), OutputError())


def as_dict(report: LayerReport) -> dict[str, Any]:
    """For JSON."""
    outputs = {
        leaf: {"relative": error.relative, "rounded_to_nearest": error.relative_nearest}
        for leaf, error in report.outputs.items()
    }
    return {
        "layer": report.layer,
        "tokens": report.tokens,
        "few_tokens": report.few_tokens,
        "threshold": report.threshold,
        "output_errors": outputs,
    }


def told(report: LayerReport) -> str:
    """One line about a layer that is finished."""
    total, tokens = report.total, report.tokens
    line = f"layer {report.layer}: output error {total.relative:.4f} "
    line += f"(rounded to nearest {total.relative_nearest:.4f}), "
    line += f"tokens per expert {min(tokens)} to {max(tokens)}"
    if report.few_tokens:
        names = ", ".join(f"{e} ({tokens[e]})" for e in report.few_tokens)
        line += f"; fewer than {report.threshold} went to expert {names}: all tokens were used"
    return line


def lines(reports: list[LayerReport]) -> Iterator[str]:
    """A table: each weight, its output error and that of round to nearest; then the experts."""
    width = max((len(leaf) for report in reports for leaf in report.outputs), default=0)
    yield f"{'weight':<{width}}  output error  rounded to nearest"
    for report in reports:
        for leaf, error in report.outputs.items():
            numbers = f"{error.relative:>12.5f}  {error.relative_nearest:>18.5f}"
            yield f"{leaf:<{width}}  {numbers}"
    yield ""
    yield "layer  tokens to each expert (* too few for a Hessian of its own)"
    for report in reports:
        marks = ["*" if e in report.few_tokens else "" for e in range(len(report.tokens))]
        counts = [f"{n:,}{mark}" for n, mark in zip(report.tokens, marks, strict=True)]
        yield f"{report.layer:>5}  {'  '.join(counts)}"
