"""TGI's response headers, on the routes of both families."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.requests import Request

from mixtral_jax.serve.asking import Answer, Asking
from mixtral_jax.serve.service import Service


def stream_headers(service: Service, *, characters: int, prompt_tokens: int) -> dict[str, str]:
    """What is known before an answer is."""
    return {
        "x-compute-type": f"jax+{service.engine.model.mesh}",
        "x-compute-characters": str(characters),
        "x-prompt-tokens": str(prompt_tokens),
    }


def answer_headers(
    request: Request,
    service: Service,
    asking: Asking,
    answers: Sequence[Answer],
    *,
    characters: int,
    prompt_tokens: int,
) -> dict[str, str]:
    """What is known of answers. Times are in milliseconds, x-compute-time in seconds.

    Args:
        request: that was answered.
        service: that did.
        asking: where it ran.
        answers: those that are told; of several the slowest gives the times.
        characters: of the prompts.
        prompt_tokens: of the prompts.
    """
    received = request.state.received_at
    total = time.perf_counter() - received
    ends = [answer.end for answer in answers]
    inferences = [end.prefill_seconds + end.decode_seconds for end in ends]
    counts = [len(end.token_ids) for end in ends]
    times = {
        "x-total-time": total,
        "x-validation-time": asking.submitted_at - received,
        "x-queue-time": max(end.queue_seconds for end in ends),
        "x-inference-time": max(inferences),
        "x-time-per-token": max(
            seconds / max(count, 1) for seconds, count in zip(inferences, counts, strict=True)
        ),
    }
    return {
        **stream_headers(service, characters=characters, prompt_tokens=prompt_tokens),
        "x-compute-time": f"{total:.6f}",
        "x-generated-tokens": str(sum(counts)),
        **{name: str(round(seconds * 1000)) for name, seconds in times.items()},
    }
