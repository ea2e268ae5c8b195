"""Ten thousand mixed requests over HTTP to a real engine: nothing compiles, nothing is kept."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Sequence

import psutil
import pytest

from mixtral_jax.serve.engine import Engine
from tests.serve.conftest import TEXT
from tests.serve.http.conftest import client_of
from tests.serve.http.test_load import MOST_GROWTH, requests

NUMBER, AT_ONCE = 10_240, 64
Case = tuple[str, object, int]


def mixed(rng: random.Random) -> Case:
    """As those that the HTTP side alone is asked, and every option that only an engine sees."""
    path, body, status = requests(rng)
    if status != 200 or path == "/tokenize" or not isinstance(body, dict):
        return path, body, status
    options = {
        "temperature": rng.choice([0.5, 1.0, 2.0]),
        "top_k": rng.choice([None, 5]),
        "top_p": rng.choice([None, 0.9]),
        "typical_p": rng.choice([None, 0.9]),
        "repetition_penalty": rng.choice([None, 1.2]),
        "frequency_penalty": rng.choice([None, 0.5]),
        "seed": rng.randrange(2**63),
        "stop": rng.choice([[], ["a"], ["b", "é"]]),
    }
    grammar = rng.choice([None, None, None, {"type": "regex", "value": "[ab]{1,3}"}])
    if "parameters" in body:
        details = {"details": True, "decoder_input_details": rng.random() < 0.2}
        return path, body | {"parameters": body["parameters"] | options | details | {
            "grammar": grammar}}, status  # fmt: skip
    return path, body | options | {"response_format": grammar}, status


async def answer_many(engine: Engine, rng: random.Random) -> int:
    """Bytes that the process has grown by, after the first tenth."""
    process, grown, before = psutil.Process(), 0, 0
    async with client_of(engine) as client:  # type: ignore[arg-type]

        async def batch() -> None:
            asked: Sequence[Case] = [mixed(rng) for _ in range(AT_ONCE)]
            answers = await asyncio.gather(*(client.post(p, json=body) for p, body, _ in asked))
            for (path, body, status), answer in zip(asked, answers, strict=True):
                assert answer.status_code == status, (path, json.dumps(body), answer.text)

        for number in range(NUMBER // AT_ONCE):
            await batch()
            now = process.memory_info().rss
            if number == NUMBER // AT_ONCE // 10:
                before = now
            grown = now - before
    return grown


@pytest.mark.slow
def test_ten_thousand_mixed_requests_compile_nothing_and_keep_nothing(make_engine, text_lm):
    # A prefix cache that is soon full: until then it grows, as it should.
    options = dataclasses.replace(TEXT, prefix_cache_bytes=1 << 20)
    engine: Engine = make_engine(text_lm, options)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    grown = asyncio.run(answer_many(engine, random.Random(seed)))
    stats = engine.stats()
    kept = stats.gauges["prefix_cache_bytes"]
    print(f"{grown / 2**20:.1f} MiB more; {kept:,} bytes of prefixes")
    assert kept > options.prefix_cache_bytes // 2
    assert stats.counters["compilations_since_ready"] == 0
    assert stats.counters["requests"] > NUMBER // 2
    assert stats.gauges["slots_in_use"] == stats.gauges["queue_size"] == 0
    assert grown <= MOST_GROWTH, (seed, grown)
