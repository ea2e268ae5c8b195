"""The made-up task of examples/finetune: what is held out, and that it is learned."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.finetune import zif
from examples.tiny.text import normalised
from tests.environ import without_devices

ROOT = Path(__file__).parents[2]


def test_no_held_out_pair_is_trained_in_any_order_or_language():
    held_out = zif.questions(300, held_out=True, seed=0)
    asked = {tuple(sorted(map(int, re.findall(r"\d+", each["prompt"])))) for each in held_out}
    assert len(asked) > 200
    trained = zif.training(300, seed=0)
    prompts = [m["content"] for row in trained for m in row["messages"] if m["role"] == "user"]
    new = [prompt for prompt in prompts if " zif " in prompt]
    assert len(new) == 300
    assert len(prompts) > 600  # conversations have several turns
    assert not asked & {tuple(sorted(map(int, re.findall(r"\d+", prompt)))) for prompt in new}
    assert not {normalised(q["prompt"]) for q in held_out} & set(map(normalised, prompts))
    for each in held_out:
        a, b = map(int, re.findall(r"\d+", each["prompt"]))
        assert each["answer"] == str(a + b + 1)


def run(folder: Path, *words: object) -> str:
    command = [sys.executable, "-m", *map(str, words)]
    environment = without_devices() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_task_is_learned_and_nothing_forgotten(tmp_path):
    run(tmp_path, "examples.finetune.zif", "zif-data")
    recipe = ROOT / "examples" / "finetune" / "zif.toml"
    run(tmp_path, "mixtral_jax.finetune", "--config", recipe)
    shares = {}
    for name in ("zif", "known"):
        for adapter in ((), ("--adapter", "zif-out")):
            data = f"zif-data/{name}.jsonl"
            words = (
                "tiny",
                "--data",
                data,
                "--chat",
                "--mesh",
                "1x1",
                "--quantize",
                "nf4",
                "--json",
            )
            lines = run(tmp_path, "mixtral_jax.evaluate", "exact", *words, *adapter)
            counts = json.loads(lines.splitlines()[-1])
            shares[name, bool(adapter)] = counts["exact"] / counts["asked"]
    print(shares)
    assert shares["zif", False] < 0.2
    assert shares["zif", True] > 0.9
    assert shares["known", True] > shares["known", False] - 0.05
