"""Writes docs/performance.md from benchmarks/results/*.json: ``python docs/make_performance.py``.

A test compares the page with what this makes, so no number on it can drift from its record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
# Name of a record -> its heading, in the order of the page; a record that is not here is refused.
HEADINGS = {
    "vs_transformers": "Decoding and prompts beside transformers",
    "vs_transformers_prefill": "Longer prompts beside transformers",
    "decode_schemes": "Quantized decoding",
    "moe_layer_float32": "The expert layer alone, float32",
    "moe_layer_bfloat16": "The expert layer alone, bfloat16",
    "products": "Products on a CPU",
    "prefill_32k": "A prompt of 32,768 tokens",
    "speculation": "Speculation",
    "serve": "Serving",
    "finetune": "Fine-tuning beside transformers and peft",
    "finetune_qlora_tiny": "QLoRA with factors on experts",
    "finetune_qlora_tiny_before": "The same with the gradients of kernels/experts.py as of 0e80c41",
    "capacity_factor": "The capacity factor",
    "offload_tiny": "Offloading, embedded model",
    "offload_bench": "Offloading, 0.79 G parameters",
    "quantization": "What quantization costs",
    "kv_quality": "What a cache in 8 bits costs",
    "convert_memory": "Memory of converting",
    "convert_sweep": "Converting several sizes",
    "full_width": "Layers of full width",
    "load_speed": "Loading",
}
INTRODUCTION = """\
# Performance

What benchmarks recorded, with the commands that made it: a table for each record, without its
nested lists, and of a record without rows the numbers alone; the files have all. It is written by
`python docs/make_performance.py` from `benchmarks/results/`; a test compares it with them. What
bounds a number, and what was tried, is in [log.md](log.md).
No number was measured on a GPU or TPU yet.
"""


def page(folder: Path = RESULTS) -> str:
    """The whole page.

    Raises:
        KeyError: a record without a heading, or a heading without a record.
    """
    records = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    if records.keys() != HEADINGS.keys():
        raise KeyError(f"records and headings differ: {sorted(records.keys() ^ HEADINGS.keys())}")
    return INTRODUCTION + "".join(
        "\n" + "\n".join(section(heading, records[name])) + "\n"
        for name, heading in HEADINGS.items()
    )


def section(heading: str, record: dict[str, Any]) -> Iterator[str]:
    """One record: its command, where it ran, and its rows or its figures."""
    yield f"## {heading}"
    yield ""
    if command := record.get("command"):
        yield f"`{command}`"
        yield ""
    versions = ", ".join(f"{name} {v}" for name, v in record.get("versions", {}).items())
    yield f"{record.get('device', 'device not recorded')}; {versions or 'versions not recorded'}"
    yield ""
    rows = record.get("rows")
    if not rows:
        figures = {name: value for name, value in record.items() if type(value) in (int, float)}
        rows = [{"figure": name, "value": value} for name, value in figures.items()]
    columns = [
        name for name in rows[0] if not any(isinstance(row.get(name), dict | list) for row in rows)
    ]
    yield f"| {' | '.join(map(cell, columns))} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(cell(row.get(name, '')) for name in columns)} |"


def cell(value: object) -> str:
    """A value as it stands in a table."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
