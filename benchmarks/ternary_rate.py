"""Bits per weight of qmoe, and its error, on Gaussian rows as wide as an expert's.

Three ways to ternary codes: drawn, each value zero with probability 0.885, as the dictionary has
it; Gaussian rows rounded between their smallest value, zero and their largest, as QMoE does; and
Gaussian rows that fill the room of the scheme. "held" pads all rows to the longest.

    python benchmarks/ternary_rate.py --widths 4096 14336
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

import jax
import numpy as np
from _common import report, run_script

from mixtral_jax.qtensor import packed_size
from mixtral_jax.quantize.ternary import round_rows
from mixtral_jax.ternary_code import SPARSITY, coded_lengths, decode_on_device, encode

BITS = 16  # of a codeword


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measures rates, errors and the time of coding and decoding."""

    widths: tuple[int, ...] = (128, 256, 4096, 14336)
    """Inputs of a row."""
    rows: int = 256
    """Rows of each width; an expert of 8x7B has 14336 of 4096 inputs, twice, and 4096 of 14336."""
    quick: bool = False
    """Few rows: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def ways(w: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Codes, and the values that they stand for where they are made of ``w``."""
    draw = np.random.default_rng(1)
    sides = (1 - SPARSITY) / 2
    drawn = draw.choice([0, 1, -1], w.shape, p=(SPARSITY, sides, sides)).astype(np.int8)
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    widest = np.where(w > high / 2, high, np.where(w < low / 2, low, 0))
    ours = round_rows(w, packed_size("qmoe", w.shape[1]))
    return {
        "drawn": (drawn, None),
        "smallest to largest": (np.sign(widest).astype(np.int8), widest),
        "qmoe": (ours.codes, ours.codes * ours.scales[:, None]),
    }


def measured(codes: np.ndarray, values: np.ndarray | None, w: np.ndarray) -> dict[str, Any]:
    """One row of the table."""
    lengths = coded_lengths(codes)
    inputs = codes.shape[1]
    start = time.perf_counter()
    words = encode(codes)
    middle = time.perf_counter()
    jax.block_until_ready(decode_on_device(words, inputs))
    again = time.perf_counter()
    found = np.asarray(jax.block_until_ready(decode_on_device(words, inputs)))
    end = time.perf_counter()
    assert (found == codes).all()
    error = (
        "" if values is None else round(float(np.linalg.norm(w - values) / np.linalg.norm(w)), 4)
    )
    return {
        "coded": round(BITS * float(lengths.mean()) / inputs, 4),
        "held": round(BITS * int(lengths.max()) / inputs, 4),
        "zeros": round(float((codes == 0).mean()), 4),
        "relative error": error,
        "encode ns": round(1e9 * (middle - start) / codes.size, 1),
        "decode ns": round(1e9 * (end - again) / codes.size, 1),
    }


def main(options: Options) -> int:
    """Runs and prints."""
    count = 16 if options.quick else options.rows
    rows: list[dict[str, Any]] = []
    for width in options.widths:
        w = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
        for name, (codes, values) in ways(w).items():
            rows.append({"inputs": width, "codes": name, **measured(codes, values, w)})
    report(rows, is_json=options.json, widths=options.widths, num_rows=count)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
