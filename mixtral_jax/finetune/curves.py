"""The curves of a run as one picture, drawn from its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtral_jax.finetune.metrics import read_lines
from mixtral_jax.plots import figure_file

_PANELS = (
    # title, scale, names in the log with their labels
    ("loss", "linear", {"loss": "training", "eval_loss": "evaluation"}),
    ("learning rate", "linear", {"learning_rate": None}),
    ("norm of the gradient", "log", {"grad_norm": None}),
    ("tokens per second", "linear", {"tokens_per_second": None}),
)


def draw_curves(log: Path, path: Path) -> None:
    """Draws loss, learning rate, norm of the gradient, speed and the routers' mean entropy.

    Args:
        log: metrics.jsonl.
        path: ends in .svg or .png.

    Raises:
        MixtralError: as ``check_plot``.
    """
    lines = list(read_lines(log))
    with figure_file(path, size=(8, 9)) as figure:
        panels = figure.subplots(len(_PANELS) + 1, 1, sharex=True)
        for panel, (title, scale, names) in zip(panels, _PANELS, strict=False):
            for name, label in names.items():
                steps, values = curve(lines, name)
                panel.plot(steps, values, label=label, marker="." if len(steps) < 40 else None)
            panel.set_title(title, loc="left", fontsize="medium")
            panel.set_yscale(scale)
            if len(names) > 1:
                panel.legend()
        steps, layers = curve(lines, "router_entropy")
        panels[-1].plot(steps, layers, linewidth=1)
        panels[-1].set_title("router entropy by layer, in nats", loc="left", fontsize="medium")
        panels[-1].set_xlabel("step")


def curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[Any]]:
    """Steps and values of the lines that have a name."""
    found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]
