"""What both kinds of completions share: envelopes, usage and how an answer ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import mixtral_jax
from mixtral_jax.serve.asking import Answer
from mixtral_jax.serve.request import Finished
from mixtral_jax.serve.schema.openai import StreamOptions
from mixtral_jax.serve.service import Service, new_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Envelope:
    """What stands around the choices of an answer, or of each of its chunks."""

    id: str
    object: str
    model: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def around(self, choices: list[dict[str, Any]], usage: Any = ...) -> dict[str, Any]:
        """The JSON value; without ``usage`` there is no such key."""
        value: dict[str, Any] = {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"mixtral_jax-{mixtral_jax.__version__}",
            "choices": choices,
        }
        return value if usage is ... else value | {"usage": usage}


def envelope(service: Service, kind: str, prefix: str, adapter: str | None) -> Envelope:
    """An envelope for an answer of the served model, or of one of its adapters."""
    return Envelope(id=new_id(prefix), object=kind, model=adapter or service.engine.model.name)


def usage_of(answers: Sequence[Answer], num_prompts: int = 1) -> dict[str, Any]:
    """Token counts: each prompt counts once, whatever the number of its samples."""
    samples = max(len(answers) // max(num_prompts, 1), 1)
    first = [answer.end for answer in answers[::samples]]
    prompt = sum(end.prompt_tokens for end in first)
    completion = sum(len(answer.end.token_ids) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in first)},
    }


def finish_reason(end: Finished) -> str:
    """OpenAI's name for how an answer ended."""
    return "length" if end.reason == "length" else "stop"


def wants_usage(options: StreamOptions | None) -> bool:
    """Whether a stream ends with the token counts."""
    return bool(options and options.include_usage)
