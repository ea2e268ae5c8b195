"""Tables and loads as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.evaluate.routing import ExpertLoad
from mixtral_jax.evaluate.table import Row
from mixtral_jax.plots import figure_file

_MOST_NUMBERS = 16 * 40  # cells of a heat map that have room for their share


def draw_table(rows: Sequence[Row], title: str, path: Path) -> None:
    """Perplexity over weight bytes, and the divergence of each row from the first.

    Raises:
        MixtralError: as ``check_plot``.
    """
    names = [row.entry.name for row in rows]
    with figure_file(path, size=(11, 2.6 + 0.3 * len(rows))) as figure:
        over_bytes, kl = figure.subplots(1, 2)
        sizes = [row.weight_bytes / 1e6 for row in rows]
        values = [row.found.perplexity for row in rows]
        over_bytes.axhline(values[0], color="gray", linestyle="--", linewidth=1)
        for name, size, value in zip(names, sizes, values, strict=True):
            over_bytes.scatter(size, value, color="tab:blue")
            over_bytes.annotate(
                name, (size, value), textcoords="offset points", xytext=(4, 4), fontsize=8
            )
        over_bytes.set(xlabel="MB of weights", title="perplexity", xscale="log")
        divergences = [0.0 if row.divergence is None else row.divergence.kl for row in rows]
        kl.barh(range(len(rows)), divergences, color="tab:orange")
        kl.set_yticks(range(len(rows)), names, fontsize=8)
        kl.invert_yaxis()
        kl.set(xlabel="nats", title=f"mean KL divergence from {names[0]}")
        for axes in (over_bytes, kl):
            axes.grid(alpha=0.3)
            axes.margins(0.15)
        figure.suptitle(title, fontsize=10)


def draw_load(load: ExpertLoad, title: str, path: Path) -> None:
    """A heat map: the share of each layer's assignments that each expert got.

    Raises:
        MixtralError: as ``check_plot``.
    """
    shares = load.shares
    layers, experts = shares.shape
    size = (3 + 0.6 * min(experts, 16), 2 + 0.3 * min(layers, 40))
    with figure_file(path, size=size) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, aspect="auto", vmin=0.0, cmap="viridis")
        axes.set(xlabel="expert", ylabel="layer")
        axes.set_xticks(range(experts)) if experts <= 16 else None
        axes.set_yticks(range(layers)) if layers <= 40 else None
        if shares.size <= _MOST_NUMBERS:
            for layer in range(layers):
                for expert in range(experts):
                    share = shares[layer, expert]
                    color = "white" if share < 0.6 * shares.max() else "black"
                    axes.text(
                        expert, layer, f"{share:.0%}", ha="center", va="center", color=color,
                        fontsize=7,
                    )  # fmt: skip
        figure.colorbar(image, ax=axes, label="share of the layer's assignments")
        figure.suptitle(title, fontsize=10)
