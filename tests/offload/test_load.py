"""``--offload experts`` from outside: what loads, writes, and is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax import cli, sample
from mixtral_jax.convert.load import HOST
from mixtral_jax.errors import BAD_CONFIG, OK, USAGE, MixtralError
from mixtral_jax.evaluate.__main__ import main as evaluate
from mixtral_jax.evaluate.options import RoutingOptions
from mixtral_jax.load_options import LoadOptions
from mixtral_jax.offload.executor import OffloadExecutor
from mixtral_jax.offload.parts import num_bytes

BUDGET = "9MB"  # the embedded model is 15.9 MB; 13 of its 32 experts have room
PROMPTS = ["What is the capital of France?", "Zwei und zwei sind", "A"]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def resident():
    return mj.load("tiny", mesh="1x1")


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def moved() -> Counter[str | None]:
    """Bytes given to devices while the model loaded, by kind of memory."""
    return Counter()


@pytest.fixture(scope="module")
def lm(notes, moved):
    put = jax.device_put

    def counting(tree, where=None, **fields):
        moved[getattr(where, "memory_kind", None)] += num_bytes(tree)
        return put(tree, where, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_put", counting)
        return mj.load("tiny", offload="experts", device_memory=BUDGET, note=notes.append)


def executor_of(lm: mj.LanguageModel) -> OffloadExecutor:
    assert isinstance(lm.executor, OffloadExecutor)
    return lm.executor


def same(one, other) -> bool:
    return (one.token_ids, one.generated_text, one.finish_reason) == (
        other.token_ids,
        other.generated_text,
        other.finish_reason,
    ) and np.allclose(one.logprobs, other.logprobs, atol=TOLERANCE)


def test_reading_puts_no_expert_on_the_device(lm, moved):
    parts = executor_of(lm).parts
    experts = num_bytes(parts.experts)
    assert moved[HOST] == experts > 12e6
    others = moved.total() - moved[HOST]
    assert others < 3 * parts.device_bytes < experts
    assert {w.sharding.memory_kind for w in jax.tree.leaves(parts.experts)} == {HOST}
    assert HOST not in {w.sharding.memory_kind for w in jax.tree.leaves(lm.model)}


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 10},
        {"max_new_tokens": 10, "temperature": 0.8, "top_p": 0.9, "seed": 3},
        {"max_new_tokens": 24, "stop": ("a", "the")},
    ],
    ids=["greedy", "sampled", "stop"],
)
def test_texts_are_those_of_the_resident_model(resident, lm, notes, fields):
    before = executor_of(lm).report()
    found, expected = (each.generate(PROMPTS, **fields) for each in (lm, resident))
    assert all(map(same, found, expected))
    report = executor_of(lm).report()
    assert report.peak <= report.budget == 9_000_000
    assert 0 < report.counts.hit_rate < 1
    done = report.since(before)
    assert 0 < done.counts.visits < report.counts.visits or not before.counts.visits
    assert notes[-1] == done.line(), "of this generation"
    assert f"offload: {done.counts.hit_rate:.1%} of {done.counts.visits:,} expert" in notes[-1]


@pytest.mark.slow
def test_chat_stream_and_logits(resident, lm):
    messages = [{"role": "user", "content": PROMPTS[0]}]
    assert same(lm.chat(messages, max_new_tokens=8), resident.chat(messages, max_new_tokens=8))
    pieces = [list(each.stream(PROMPTS[1], max_new_tokens=8)) for each in (lm, resident)]
    assert pieces[0] == pieces[1]
    ids = [[1, 310, 402, 9], [1, 5, 6, 7]]
    np.testing.assert_allclose(lm.logits(ids), resident.logits(ids), atol=TOLERANCE)

    def in_turns(model: mj.LanguageModel) -> list:
        streams = (model.stream(prompt, max_new_tokens=8) for prompt in PROMPTS[:2])
        return [(pieces, model.logits(ids).shape) for pieces in itertools.zip_longest(*streams)]

    assert in_turns(lm) == in_turns(resident)


@pytest.mark.slow
def test_codes_stay_packed_in_the_cache_and_with_the_experts(resident):
    """Quantized while it loads, with keys and values in int8; the resident model the same."""
    fields: dict[str, Any] = {"quantize": "int8", "kv_dtype": "int8"}
    whole = mj.load("tiny", mesh="1x1", **fields)
    lm = mj.load("tiny", offload="experts", device_memory="6MB", **fields)
    found, expected = (each.generate(PROMPTS, max_new_tokens=8) for each in (lm, whole))
    assert all(map(same, found, expected))
    assert num_bytes(executor_of(lm).parts.experts) < 0.3 * 13e6
    assert not all(map(same, found, resident.generate(PROMPTS, max_new_tokens=8)))


@contextlib.contextmanager
def refused(code: int, match: str) -> Iterator[None]:
    with pytest.raises(MixtralError, match=match) as caught:
        yield
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "code", "match"),
    [
        ({"mesh": "1x8"}, BAD_CONFIG, "--mesh: expected 1x1"),
        ({"dispatch": "gathered"}, USAGE, "--dispatch is for several devices"),
        ({"overflow": "drop"}, USAGE, "--overflow is for several devices"),
        ({"attention": "tensor"}, USAGE, "--attention is for several devices"),
        ({"device_memory": "lots"}, USAGE, "a size like 20GB"),
        ({"device_memory": None}, USAGE, "does not say how much memory it has"),
        ({"offload": None}, USAGE, "--device-memory needs --offload"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(fields, code, match):
    with refused(code, match):
        mj.load("tiny", **({"offload": "experts", "device_memory": BUDGET} | fields))


def test_what_needs_the_experts_on_the_device_refuses(lm, tmp_path):
    with refused(USAGE, "save: the experts are offloaded"):
        lm.save(tmp_path / "saved")
    text = tmp_path / "text.txt"
    text.write_text("Hello. " * 200)
    load = LoadOptions(offload="experts", device_memory=BUDGET)
    with refused(USAGE, "evaluate does not run with --offload"):
        evaluate(RoutingOptions(text=(text,), load=load))
    with pytest.raises((TypeError, AttributeError)):  # nobody uses experts that are not there
        lm.model(np.ones((1, 4), np.int32))


def run(*argv: str) -> int:
    fixed = ("tiny", "--offload", "experts", "--prompt", PROMPTS[0], "--max-new-tokens", "8")
    return cli.run(sample.main, sample.Options, "sample", [*fixed, *argv])


def test_the_least_that_is_told_would_do(capsys, resident):
    assert run("--device-memory", "3MB", "--json") == BAD_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert "a short text: expected at least" in line  # before anything was read
    (least,) = re.findall(r"fix: --device-memory (\d+MB)", line)
    assert run("--device-memory", least, "--json") == OK
    shown = capsys.readouterr()
    (found,) = [json.loads(line) for line in shown.out.splitlines()]
    assert found["token_ids"] == resident.generate(PROMPTS[:1], max_new_tokens=8)[0].token_ids
    assert " of 32 experts on the device" in shown.err


def test_speculation_is_refused_before_anything_is_read(capsys):
    assert run("--device-memory", BUDGET, "--speculate", "4") == USAGE
    assert "drafts are not supported" in capsys.readouterr().err
