"""Tables and loads as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mixtral_jax.evaluate.routing_report import class_tokens, names_of
from mixtral_jax.evaluate.study import Study
from mixtral_jax.evaluate.table import Row
from mixtral_jax.evaluate.token_classes import CLASSES
from mixtral_jax.plots import figure_file

_MOST_NUMBERS = 16 * 32  # cells of heat maps, all together, that have room for their share
_PANELS = 4  # heat maps side by side


def draw_table(rows: Sequence[Row], title: str, path: Path) -> None:
    """Perplexity, and the divergence of each row from the first, over bits per expert weight.

    One point per row. The divergence is drawn to a logarithmic scale; a row without any (the first,
    or one of the same numbers) has a perplexity only.

    Raises:
        MixtralError: as ``check_plot``.
    """
    checkpoints = {row.entry.checkpoint for row in rows}
    names = [
        row.entry.scheme if len(checkpoints) == 1 and row.entry.scheme else row.entry.name
        for row in rows
    ]
    bits = [row.experts.bits for row in rows]
    perplexities = [row.found.perplexity for row in rows]
    apart = [
        i for i, row in enumerate(rows) if row.divergence is not None and row.divergence.kl > 0
    ]
    with figure_file(path, size=(12, 3.0 + 0.22 * len(rows))) as figure:
        left, right = figure.subplots(1, 2)
        left.axhline(perplexities[0], color="gray", linestyle="--", linewidth=1)
        _label_points(left, bits, perplexities, names, color="tab:blue")
        left.set_title("perplexity")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
        divergences = [getattr(rows[i].divergence, "kl", 0.0) for i in apart]
        named = [names[i] for i in apart]
        _label_points(right, [bits[i] for i in apart], divergences, named, color="tab:orange")
        apart_from = f"mean KL divergence from {rows[0].entry.name}, nats"
        right.set_title(apart_from, parse_math=False)
        for axes in (left, right):
            axes.set(xlabel="bits per weight of the experts")
            axes.grid(alpha=0.3)
        figure.suptitle(title, fontsize=10, parse_math=False)


def _label_points(
    axes: Any, x: Sequence[float], y: Sequence[float], names: Sequence[str], *, color: str
) -> None:
    """Points on logarithmic axes, each with a line to its name in a column on the right."""
    axes.set(xscale="log", yscale="log")
    axes.scatter(x, y, color=color, zorder=3)
    ticks = [each for each in (1, 2, 3, 4, 6, 8, 16, 32) if min(x, default=1) / 2 < each]
    axes.set_xticks(ticks, map(str, ticks), minor=False)
    axes.set_xticks([], minor=True)
    axes.margins(0.08)
    order = sorted(range(len(x)), key=lambda i: (y[i], -x[i]))
    for place, i in enumerate(order):
        axes.annotate(
            f"{names[i]}  {y[i]:.4g}",
            (x[i], y[i]),
            xytext=(1.04, (place + 0.5) / len(order)),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            parse_math=False,  # a name may hold $ or ^
            arrowprops={
                "arrowstyle": "-", "color": "gray", "linewidth": 0.5, "alpha": 0.6,
                "relpos": (0, 0.5), "shrinkA": 2,
            },
        )  # fmt: skip


def draw_routing(study: Study, title: str, path: Path) -> None:
    """Heat maps of the share of each layer's assignments that each expert got.

    One of each text, then one of each class of tokens that occurs.

    Raises:
        MixtralError: as ``check_plot``.
    """
    names = names_of([each.dataset for each in study.texts])
    panels = [(name, each.counts.shares) for name, each in zip(names, study.texts, strict=True)]
    for i, count in enumerate(class_tokens(study.total)):
        if count:
            by_class = study.total.by_class[:, i]
            shares = by_class / by_class.sum(axis=1, keepdims=True)
            panels.append((f"{CLASSES[i]} ({count:,} tokens)", shares))
    layers, experts = panels[0][1].shape
    columns = min(len(panels), _PANELS)
    rows = -(-len(panels) // columns)
    panel = (1.6 + 0.4 * min(experts, 16), 1.2 + 0.25 * min(layers, 40))
    most = max(float(shares.max()) for _, shares in panels)
    with figure_file(path, size=(panel[0] * columns, panel[1] * rows + 0.5)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        image = None
        for axes, (name, shares) in zip(grid, panels, strict=False):
            image = _heat(axes, shares, most)
            if shares.size * len(panels) <= _MOST_NUMBERS:
                _write_shares(axes, shares, most)
            axes.set_title(name, fontsize=9, parse_math=False)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=list(grid), label="share of the layer's assignments")
        figure.suptitle(title, fontsize=10, parse_math=False)


def _heat(axes: Any, shares: Float[np.ndarray, "L E"], most: float) -> Any:
    layers, experts = shares.shape
    image = axes.imshow(shares, aspect="auto", vmin=0.0, vmax=most, cmap="viridis")
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_xticks(range(experts)) if experts <= 16 else None
    axes.set_yticks(range(layers)) if layers <= 40 else None
    return image


def _write_shares(axes: Any, shares: Float[np.ndarray, "L E"], most: float) -> None:
    for layer, row in enumerate(shares):
        for expert, share in enumerate(row):
            color = "white" if share < 0.6 * most else "black"
            axes.text(
                expert, layer, f"{share:.0%}", ha="center", va="center", color=color, fontsize=7
            )
