"""Keeps what the embedded model was made by: ``python -m examples.tiny.record STORED RUN...``.

Writes curve.json, the logs of the runs one behind the other, and score.json, the exact answers of
the last run's weights as they were trained and of the folder STORED in two dtypes, and how many
answer tokens STORED gets right at which positions of long conversations.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import tyro

from examples.tiny.positions import CONVERSATIONS, by_position, long_conversations
from examples.tiny.score import MISSED, score
from examples.tiny.score import Options as ScoreOptions
from examples.tiny.text import held_out
from mixtral_jax import cli
from mixtral_jax.errors import INPUT_NOT_FOUND, OK, USAGE, MixtralError
from mixtral_jax.finetune.metrics import NAME, read_lines
from mixtral_jax.finetune.output_folder import MARK
from mixtral_jax.language_model import load

RESULTS = Path(__file__).parent / "results"
# The versions of these may change the result.
PACKAGES = ("jax", "optax", "numpy", "sentencepiece", "num2words")
_PATHS = {"model", "dataset", "eval_dataset", "output_dir", "config", "json", "debug", "processes"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes curve.json and score.json."""

    stored: tyro.conf.Positional[Path]
    """The folder that is to be the embedded model."""
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Output folders of finetune, in the order in which they were trained."""
    results: Path = RESULTS
    """Where both go."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        if not self.runs:
            raise MixtralError("no run is named", fix="name its --output-dir", code=USAGE)


def curve_of(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """A point for each line of the logs; steps and seconds are those of all runs so far."""
    points: list[dict[str, Any]] = []
    before, seconds = 0, 0.0
    for run in runs:
        if not (run / NAME).is_file():
            fix = "name an --output-dir of finetune"
            raise MixtralError(f"{run} has no {NAME}", fix=fix, code=INPUT_NOT_FOUND)
        for line in read_lines(run / NAME):
            if "loss" not in line:
                continue
            seconds += line.get("seconds", 0.0)
            point = {"step": before + line["step"], "seconds": round(seconds, 1)}
            for name, source in (("loss", "loss"), ("token_accuracy", "mean_token_accuracy")):
                point[name] = round(line[source], 5)
            least = min(min(layer) for layer in line["expert_load"])
            points.append({**point, "least_expert_load": round(least, 4)})
        before = points[-1]["step"] if points else 0
    return points


def made_by(runs: Sequence[Path]) -> dict[str, Any]:
    """Options of the runs, without names of files; versions; devices."""
    told = (json.loads((run / MARK).read_text(encoding="utf-8")) for run in runs)
    return {
        "runs": [{k: v for k, v in options.items() if k not in _PATHS} for options in told],
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
    }


def main(options: Options) -> int:
    """Writes both; exit code 1 if a target is missed."""
    curve, by = curve_of(options.runs), made_by(options.runs)
    asked = held_out(ScoreOptions.per_family, seed=ScoreOptions.seed)
    scores = {}
    for name, folder, dtype in (
        ("trained, float32", options.runs[-1] / "model", "float32"),
        ("stored, float32", options.stored, "float32"),
        ("stored, bfloat16", options.stored, "bfloat16"),
    ):
        scores[name] = score(load(folder, mesh="1x1", dtype=dtype), asked).record()
        print(f"{name}: {scores[name]['overall']:.2%} of {scores[name]['asked']:,}")
    long = by_position(
        load(options.stored, mesh="1x1", dtype="float32"), long_conversations(CONVERSATIONS)
    )
    for each in long:
        print(
            f"positions {each['from']} to {each['to']}: {each['right']:.2%} of {each['tokens']:,}"
        )
    digest = hashlib.sha256((options.stored / "model.safetensors").read_bytes()).hexdigest()
    options.results.mkdir(parents=True, exist_ok=True)
    for name, found in (
        ("curve.json", {"curve": curve}),
        ("score.json", {"sha256": digest, "scores": scores, "by_position": long}),
    ):
        text = json.dumps({**found, "made_by": by}, indent=1) + "\n"
        (options.results / name).write_text(text, encoding="utf-8")
    return OK if all(found["is_enough"] for found in scores.values()) else MISSED


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m examples.tiny.record"))
