"""What people see beside the text: notes, and pictures made of characters. All of it on stderr."""

from __future__ import annotations

import sys

import numpy as np

from mixtral_jax.sharding import hosts

BLOCKS = "▁▂▃▄▅▆▇█"
_WIDEST = 16  # experts for which a share in percent fits beside its bar


def note(line: str) -> None:
    """One line for the person at the terminal, of process 0 only; stdout is for the text."""
    if hosts.is_first():
        print(f"note: {line}", file=sys.stderr, flush=True)


def tell_dropped(whose: str, count: int) -> None:
    """A note about expert assignments that were left out (``--overflow drop``), if any were."""
    if count:
        note(f"{whose}: dropped {count} expert assignments")


def expert_load(counts: np.ndarray) -> str:
    """Bars of each layer's load.

    Args:
        counts: ints ``[L, E]``, how many assignments each expert of each layer got.

    Returns:
        Lines, one per layer: a bar and the share of the layer's assignments for every expert. The
        full height is the largest share of any expert.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    largest = max(float(shares.max()), 1e-9)
    experts = range(counts.shape[1])
    is_narrow = len(experts) <= _WIDEST
    lines = [f"expert   {''.join(f'{e:<7}' for e in experts)}".rstrip()] if is_narrow else []
    for layer, row in enumerate(shares):
        bars = [BLOCKS[min(int(share / largest * len(BLOCKS)), len(BLOCKS) - 1)] for share in row]
        if is_narrow:
            cells = (f"{bar * 2}{share:>4.0%} " for bar, share in zip(bars, row, strict=True))
            lines.append(f"layer {layer:<2} {''.join(cells)}".rstrip())
        else:
            lines.append(f"layer {layer:<2} {''.join(bars)}  {row.min():.1%} to {row.max():.1%}")
    return "\n".join(lines) + "\n"
