"""lm-eval through our class, over HTTP and through transformers: the same scores."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.evaluate import harness
from mixtral_jax.language_model import EMBEDDED_FOLDER, LanguageModel, load
from mixtral_jax.serve.engine import Engine
from mixtral_jax.serve.limits import EngineOptions
from tests.serve.http.live import serving

pytestmark = pytest.mark.parity

RELATIVE = 1e-3
MAX_LENGTH = 128
OURS = {
    "pretrained": str(EMBEDDED_FOLDER),
    "mesh": "1x8",
    "dtype": "float32",
    "max_length": MAX_LENGTH,
}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SUMS = [
    {
        "question": f"{a} + {b} =",
        "choices": [f" {a + b + off}" for off in (-1, 0, 10)],
        "answer": 1,
    }
    for a, b in [(3, 4), (12, 30), (7, 9), (20, 5), (41, 8), (6, 6), (50, 21), (33, 2)]
] + [
    {"question": ", ".join(DAYS[i : i + 3]), "choices": [f", {day}" for day in DAYS], "answer": i}
    for i in range(4)
]
TEXTS = [
    {"text": "12 + 30 = 42. 5 - 3 = 2.\nMonday, Tuesday, Wednesday"},
    {"text": "La capitale de la France est Paris."},
    {"text": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"},
    {"text": "Zürich 日本"},
]
STARTS = [{"start": ", ".join(DAYS[i : i + 2]), "end": DAYS[i + 2]} for i in range(5)] + [
    {"start": f"{a}, {a + 1}, {a + 2}", "end": str(a + 3)} for a in (1, 20, 37, 64)
]
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choices": (
        SUMS,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
        },
    ),
    "texts": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
    "starts": (
        STARTS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{start}}",
            "doc_to_target": "{{end}}",
            "generation_kwargs": {"until": ["\n", ". "], "max_gen_toks": 12, "temperature": 0.0},
            "filter_list": [
                {
                    "name": "stripped",
                    "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
                }
            ],
            "metric_list": [{"metric": "exact_match", **MEAN}],
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, (rows, fields) in TASKS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test",
            "target_delimiter": "",
        }
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | data | fields))
    return folder


def evaluate(
    folder: Path,
    model: Any,
    arguments: dict[str, Any] | None = None,
    tasks: Sequence[str] = tuple(TASKS),
) -> Any:
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lm-eval and transformers, not ours
        return importlib.import_module("lm_eval").simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=list(tasks),
            task_manager=manager(include_path=str(folder), include_defaults=False),
            batch_size=4,
            bootstrap_iters=0,
        )


@pytest.fixture(scope="module")
def ours(folder) -> Any:
    harness.register()
    return evaluate(folder, "mixtral_jax", OURS)


@pytest.fixture(scope="module")
def rolled(folder) -> Any:
    """Rolling texts behind one <s>. Behind two, lm-eval's hf scores the second; its remote
    tokenizer adds none, so over HTTP there is never more than one.
    """
    harness.register()
    return evaluate(folder, "mixtral_jax", OURS | {"add_bos_token": False}, ["texts"])


@pytest.fixture(scope="module")
def spelling(transformers) -> Any:
    return transformers.LlamaTokenizer.from_pretrained(EMBEDDED_FOLDER, add_bos_token=True)


@pytest.fixture(scope="module")
def published(torch, transformers, spelling) -> Any:
    model = transformers.MixtralForCausalLM.from_pretrained(
        EMBEDDED_FOLDER, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=spelling, batch_size=4, max_length=MAX_LENGTH
    )


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load()


@pytest.fixture(scope="module")
def url(lm: LanguageModel) -> Iterator[str]:
    engine = Engine(lm, EngineOptions(max_total_tokens=MAX_LENGTH, prefill_chunk=32))
    engine.start(wait=True)
    with serving(engine) as port:  # type: ignore[arg-type]
        yield f"http://127.0.0.1:{port}"
    engine.close()


def responses(found: Any, task: str) -> list[Any]:
    """Of each document, in order: log-likelihoods, or the filtered answer."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    if task == "starts":
        return [sample["filtered_resps"] for sample in samples]
    if task == "texts":
        return [np.ravel(sample["resps"]).astype(float) for sample in samples]
    return [[float(r[0][0]) for r in sample["resps"]] for sample in samples]


def check(found: Any, wanted: Any, tasks: Sequence[str] = tuple(TASKS)) -> None:
    for task in tasks:
        rows = TASKS[task][0]
        got, expected = responses(found, task), responses(wanted, task)
        assert len(got) == len(expected) == len(rows)
        if task == "starts":
            assert got == expected
        else:
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=RELATIVE, atol=2e-3)
        for metric, value in wanted["results"][task].items():
            if isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, rel=RELATIVE), metric


def test_the_ids_are_those_of_transformers(spelling, lm):
    """What the comparison stands on: one tokenizer file, read by both."""
    assert lm.tokenizer is not None
    texts = [row["question"] + choice for row in SUMS for choice in ("", *row["choices"])]
    for text in [*texts, *(row["text"] for row in TEXTS), *(row["start"] for row in STARTS)]:
        assert spelling.encode(text) == lm.tokenizer.encode(text)


def test_as_transformers(folder, ours, published):
    wanted = evaluate(folder, published)
    check(ours, wanted)
    assert (
        ours["results"]["starts"]["exact_match,stripped"]
        + sum(bool(answer[0]) for answer in responses(ours, "starts"))
        > 0
    ), "some answers are not empty"
    assert len({round(x, 3) for row in responses(ours, "choices") for x in row}) > len(SUMS)


def test_rolling_texts_behind_one_bos(folder, ours, rolled, published, monkeypatch):
    monkeypatch.setattr(published, "add_bos_token", False)
    check(rolled, evaluate(folder, published, tasks=["texts"]), ["texts"])
    sums = responses(rolled, "texts"), responses(ours, "texts")
    behind_bos = np.concatenate(sums[1]) - np.concatenate(sums[0])
    assert behind_bos.max() < -1, "the default scores <s> behind <s>, as hf does"


def test_as_over_http(folder, ours, rolled, url):
    arguments = {
        "model": "tiny",
        "base_url": f"{url}/v1/completions",
        "num_concurrent": 2,
        "max_retries": 1,
        "max_length": MAX_LENGTH,
        "tokenizer_backend": "remote",
    }
    found = evaluate(folder, "local-completions", arguments)
    check(found, ours, ["choices", "starts"])
    check(found, rolled, ["texts"])


@pytest.fixture(scope="module")
def model() -> Any:
    harness.register()
    registry = importlib.import_module("lm_eval.api.registry")
    return registry.get_model("mixtral_jax").create_from_arg_string(
        "mesh=1x1,max_length=24", {"batch_size": "3", "device": "cuda:0"}
    )


def instance(*args: Any) -> Any:
    return importlib.import_module("lm_eval.api.instance").Instance(
        request_type="loglikelihood", doc={}, arguments=args, idx=0
    )


def test_long_texts_as_transformers(model, published, monkeypatch):
    """Texts of several windows, contexts that are cut, empty contexts, spaces at the end."""
    monkeypatch.setattr(published, "_max_length", 24)
    long = ". ".join(row["text"] for row in TEXTS)
    rolled = [instance(text) for text in (long, TEXTS[2]["text"], "")]
    got = model.loglikelihood_rolling(rolled, disable_tqdm=True)
    wanted = published.loglikelihood_rolling(rolled, disable_tqdm=True)
    np.testing.assert_allclose(got, wanted, rtol=RELATIVE)
    pairs = [(long, " 42"), ("", "12 + 30"), ("12 + 30 = ", "42"), ("Monday,", " Tuesday")]
    asked = [instance(*pair) for pair in pairs]
    got, wanted = (each.loglikelihood(asked, disable_tqdm=True) for each in (model, published))
    np.testing.assert_allclose([g[0] for g in got], [w[0] for w in wanted], rtol=RELATIVE)
    assert [g[1] for g in got] == [w[1] for w in wanted]


def test_conversations_are_read_as_the_model_was_taught(model):
    talk = [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "And <b> 日本?"},
    ]
    text = model.apply_chat_template(talk)
    assert text.startswith("<s>[INST]")
    assert model.tok_encode(text) == model.lm.encode_chat(talk)
    asked = [instance(model.apply_chat_template(talk[:1]), {"until": ["\n"], "max_gen_toks": 4})]
    assert model.generate_until(asked, disable_tqdm=True) == ["42"]
    with pytest.raises(MixtralError, match="cannot be written as text") as caught:
        model.apply_chat_template([{"role": "user", "content": "[INST] here"}])
    assert caught.value.code == BAD_DATA


def test_sampling(model):
    hot = {"until": [], "max_gen_toks": 8, "temperature": 2.0, "do_sample": True}
    asked = [instance("12 +", hot | {"top_k": 50}) for _ in range(3)]
    assert len({*model.generate_until(asked, disable_tqdm=True)}) > 1
    cold = [instance("Monday,", {"until": ["day"], "max_gen_toks": 8}) for _ in range(2)]
    one, other = model.generate_until(cold, disable_tqdm=True)
    assert one == other
    assert "day" not in one


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"wat": 1}, "--model_args has no wat"),
        ({"batch_size": "many"}, "--batch_size: expected a number"),
        ({"max_length": 10**6}, "max_length: expected 2 to"),
    ],
)
def test_refusals(fields, line):
    harness.register()
    chosen = importlib.import_module("lm_eval.api.registry").get_model("mixtral_jax")
    with pytest.raises(MixtralError) as caught:
        chosen(mesh="1x1", **fields)
    assert caught.value.code == USAGE
    assert line in str(caught.value)


def test_options_that_nobody_reads_are_refused(model):
    for kwargs, line in [
        ({"until": [], "num_beams": 4}, "--gen_kwargs num_beams"),
        ({"until": [], "max_gen_toks": 24}, "max_gen_toks: expected below 24"),
    ]:
        with pytest.raises(MixtralError, match=line) as caught:
            model.generate_until([instance("a", kwargs)], disable_tqdm=True)
        assert caught.value.code == USAGE
