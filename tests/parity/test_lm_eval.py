"""lm-eval's ``local-completions`` against a real server: the numbers are those of the model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_jax.language_model import LanguageModel, load
from mixtral_jax.serve.engine import Engine
from mixtral_jax.serve.limits import EngineOptions
from tests.serve.http.live import serving

pytestmark = pytest.mark.parity

QUESTIONS = [
    ("12+30=", ["42", "43", "57"], 0),
    ("7+5=", ["11", "12", "99"], 1),
    ("20-4=", ["15", "61", "16"], 2),
]
TASK = {
    "task": "sums",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "doc_to_choice": "{{choices}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load()


@pytest.fixture(scope="module")
def url(lm: LanguageModel) -> Iterator[str]:
    engine = Engine(lm, EngineOptions(max_total_tokens=128, prefill_chunk=32))
    engine.start(wait=True)
    with serving(engine) as port:  # type: ignore[arg-type]
        yield f"http://127.0.0.1:{port}"
    engine.close()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in QUESTIONS]
    (folder / "sums.jsonl").write_text("\n".join(lines))
    fields = TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}}}
    (folder / "sums.yaml").write_text(json.dumps(fields))  # JSON is YAML
    return folder


def score(lm: LanguageModel, question: str, choice: str) -> float:
    """Log-probability of the tokens of an answer, as the harness cuts them."""
    assert lm.tokenizer is not None
    before, whole = lm.tokenizer.encode(question), lm.tokenizer.encode(question + choice)
    logits = lm.logits([whole])[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logprobs[i - 1, whole[i]] for i in range(len(before), len(whole)))


@pytest.mark.parametrize("tokenized", [False, True])
def test_a_local_task(url, lm, tasks, tokenized):
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    arguments: dict[str, Any] = {
        "model": "tiny",
        "base_url": f"{url}/v1/completions",
        "num_concurrent": 2,
        "max_retries": 1,
        "tokenized_requests": tokenized,
        "tokenizer_backend": "remote",
    }
    found: Any = importlib.import_module("lm_eval").simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["sums"],
        task_manager=manager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    right = 0
    for sample in found["samples"]["sums"]:
        question, choices, answer = QUESTIONS[sample["doc_id"]]
        got = [float(response[0][0]) for response in sample["resps"]]
        expected = [score(lm, question, choice) for choice in choices]
        np.testing.assert_allclose(got, expected, atol=2e-3)
        right += int(np.argmax(expected)) == answer
    assert found["results"]["sums"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
