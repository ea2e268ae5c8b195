r"""What does each scheme of quantization cost in quality, and what does it weigh, on the embedded
model?

One table made by ``python -m mixtral_jax.evaluate perplexity`` on the files of
``python -m examples.tiny.data``: text that no scheme was fitted to, held-out questions, and text of
both kinds that GPTQ is fitted to. rtn4, rtn3 and rtn2 are rounded to nearest on the grid of GPTQ.

    python benchmarks/quantization.py --plot docs/quantization.svg --json \
      > benchmarks/results/quantization.json
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import report, run_script

from mixtral_jax.errors import INTERNAL, MixtralError
from mixtral_jax.quantize import spelling

ROOT = Path(__file__).parents[1]
SCHEMES = (
    "float32", "bfloat16", "int8", "fp8", "int4:group-size=32", "int4", "int4:group-size=128",
    "nf4", "nf4:double-quant", "fp4", "gptq4", "rtn4", "gptq3", "rtn3", "gptq2", "rtn2", "qmoe",
)  # fmt: skip
QUICK = ("float32", "bfloat16", "int8", "gptq3", "rtn3")
INT8, GPTQ4 = 0.005, 0.05  # what perplexity may differ by from that in 16 bits
CONTEXT = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Perplexity, divergence, routing, exact answers and size by scheme, on the embedded model."""

    schemes: str | None = None
    """As evaluate takes them; unless given all, qmoe too where this version has it."""
    plot: Path | None = None
    """Draw perplexity and divergence over bits per weight as FILE.svg or FILE.png."""
    quick: bool = False
    """A few schemes on little text: does it still run?"""
    json: bool = False
    """Print one JSON line and no table."""


def measure(options: Options) -> list[dict[str, Any]]:
    """The rows of evaluate as they are."""
    chosen = QUICK if options.quick else SCHEMES
    known = ("float32", "bfloat16", *spelling.names())
    schemes = options.schemes or ",".join(s for s in chosen if s.split(":")[0] in known)
    sizes = ["--per-family", "1", "--lines", "60", "--conversations", "40"] if options.quick else []
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "data"
        _python("examples.tiny.data", files, *sizes)
        command = ["mixtral_jax.evaluate", "perplexity", "tiny", "--json"]
        command += ["--text", files / "text.txt", "--context", CONTEXT, "--schemes", schemes]
        command += ["--data", files / "questions.jsonl", "--chat"]
        quantized = [s for s in schemes.split(",") if s.split(":")[0] in spelling.names()]
        if any(spelling.is_calibrated(scheme, has_text=False) for scheme in quantized):
            command += ["--calibration", files / "calibration.jsonl"]
            command += ["--calibration-samples", "400", "--calibration-length", CONTEXT]
        if options.plot is not None:
            command += ["--plot", options.plot.resolve()]
        return [json.loads(line) for line in _python(*command).splitlines()]


def _python(module: str, *arguments: object) -> str:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MixtralError(f"{module} ended with exit code {done.returncode}", code=INTERNAL)
    return done.stdout


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people."""
    layers = (row["made"] or {}).get("layers", [])
    errors = [
        f"{layer['output_error']:.3f} ({layer['rounded_to_nearest']:.3f})" for layer in layers
    ]
    kl = row["kl"]
    return {
        "scheme": row["scheme"],
        "bits": f"{row['experts']['bits']:.3f}",
        "bytes": f"{row['weight_bytes']:,}",
        "perplexity": f"{row['perplexity']:.4f}",
        "KL": "" if kl is None else f"{kl:.2e}",
        "top-1": "" if kl is None else f"{row['top1_agreement']:.2%}",
        "routing": "" if kl is None else f"{row['routing_agreement']:.2%}",
        "right": f"{row['exact']['right']}/{row['exact']['asked']}",
        "output error (to nearest)": ", ".join(errors),
    }


def misses(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What is not as it should be, where the rows that tell are there."""
    found = {row["scheme"]: row for row in rows}
    for scheme, most in (("int8", INT8), ("gptq4", GPTQ4)):
        if {scheme, "bfloat16"} <= found.keys():
            change = found[scheme]["perplexity"] / found["bfloat16"]["perplexity"] - 1
            if abs(change) > most:
                yield f"{scheme}: perplexity {change:+.2%} of that in bfloat16, at most {most:.1%}"
    for scheme, row in found.items():
        if not scheme.startswith("gptq"):
            continue
        for layer in row["made"]["layers"]:
            if layer["output_error"] >= layer["rounded_to_nearest"]:
                yield f"{scheme}: layer {layer['layer']} is no nearer than rounded to nearest"
        nearest = found.get(scheme.replace("gptq", "rtn").replace(":act-order", ""))
        for name in ("perplexity", "kl"):
            if nearest is not None and row[name] >= nearest[name]:
                yield f"{scheme}: {name} {row[name]:.4g}, rounded to nearest {nearest[name]:.4g}"


def main(options: Options) -> int:
    """Runs and prints; 1 where a scheme costs more than it may (but for --quick)."""
    rows = measure(options)
    shown = rows if options.json else [brief(row) for row in rows]
    report(shown, is_json=options.json, quick=options.quick)
    missed = list(misses(rows))
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return int(bool(missed) and not options.quick)  # little text tells little


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
