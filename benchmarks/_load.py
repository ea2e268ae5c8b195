"""Clients of a server: requests in turn or by a Poisson process, and the times of their answers."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """One answer: seconds on the clock of time.perf_counter, and tokens as the server counts.

    ``first`` is when the first text was here.
    """

    due: float
    first: float
    last: float
    prompt_tokens: int
    tokens: int

    @property
    def time_to_first(self) -> float:
        """Seconds from when the request was due (TTFT)."""
        return self.first - self.due

    @property
    def per_token(self) -> float:
        """Seconds per token after the first (TPOT)."""
        return (self.last - self.first) / max(self.tokens - 1, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a server.

    Attributes:
        url: of the server.
        model: name that it expects.
        prompts: texts, one for each request, all different.
        max_tokens: of each answer.
        clients: closed loop: so many clients, each with one request at a time.
        rate: open loop: requests per second, Poisson arrivals; ``clients`` does not count then.
    """

    url: str
    model: str
    prompts: Sequence[str]
    max_tokens: int
    clients: int = 1
    rate: float | None = None


async def _ask(client: httpx.AsyncClient, load: Load, prompt: str, due: float) -> Timed:
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    first, usage = None, None
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode()[:300]}")
        async for line in answer.aiter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            event: dict[str, Any] = json.loads(data)
            if "error" in event:
                raise RuntimeError(data[:300])
            usage = event.get("usage") or usage
            if first is None and any(choice.get("text") for choice in event["choices"]):
                first = time.perf_counter()
    last = time.perf_counter()
    if usage is None or first is None:
        raise RuntimeError("an answer without text or without usage")
    return Timed(
        due=due,
        first=first,
        last=last,
        prompt_tokens=usage["prompt_tokens"],
        tokens=usage["completion_tokens"],
    )


async def _run(load: Load) -> list[Timed]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=load.url, timeout=3600, limits=limits) as client:
        if load.rate is None:
            waiting = iter(load.prompts)

            async def one_after_another() -> list[Timed]:
                # The iterator is shared: whoever is free takes the next prompt.
                return [await _ask(client, load, p, time.perf_counter()) for p in waiting]

            loops = await asyncio.gather(*(one_after_another() for _ in range(load.clients)))
            return list(itertools.chain.from_iterable(loops))
        gaps = np.random.default_rng(0).exponential(1 / load.rate, len(load.prompts))
        start = time.perf_counter()

        async def at(due: float, prompt: str) -> Timed:
            await asyncio.sleep(due - time.perf_counter())
            return await _ask(client, load, prompt, due)

        dues = start + np.cumsum(gaps) - gaps[0]
        pairs = zip(dues.tolist(), load.prompts, strict=True)
        return list(await asyncio.gather(*(at(due, prompt) for due, prompt in pairs)))


def run(load: Load) -> list[Timed]:
    """Asks everything and waits for all answers.

    Raises:
        RuntimeError: an answer that is none: a benchmark of refusals would be fast.
    """
    return asyncio.run(_run(load))


def summary(answers: Sequence[Timed]) -> dict[str, Any]:
    """Throughput, and percentiles of the time to the first token and of each further one."""
    seconds = max(a.last for a in answers) - min(a.due for a in answers)
    tokens = sum(a.tokens for a in answers)
    found: dict[str, Any] = {
        "requests": len(answers),
        "prompt tokens": round(sum(a.prompt_tokens for a in answers) / len(answers), 1),
        "tokens": round(tokens / len(answers), 1),
        "tok/s": round(tokens / seconds, 2),
    }
    for name, values in (
        ("ttft s", [a.time_to_first for a in answers]),
        ("ms/token", [1000 * a.per_token for a in answers]),
    ):
        for percent in (50, 95, 99):
            found[f"{name} p{percent}"] = round(float(np.percentile(values, percent)), 3)
    return found
