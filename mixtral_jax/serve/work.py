"""One request inside the engine: what is known of it from submission to its end."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, TypeAlias

import numpy as np

from mixtral_jax.decode.controls import NUM_BEST, NUM_BIASES
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import MixtralError
from mixtral_jax.serve.answer import Answer
from mixtral_jax.serve.grammar import Matcher
from mixtral_jax.serve.request import NUM_SEEDS, Refused, ServeRequest, ServeSampling
from mixtral_jax.serve.scheduler import Admitted, Job
from mixtral_jax.serve.ticket import EngineTicket

Pairs: TypeAlias = list[tuple[int, float]]  # token ids and log-probabilities, best first

_SHARED = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_MOST_BIAS = 100.0
_MOST_PENALTY = 2.0


@dataclasses.dataclass(eq=False)
class Work:
    """A request and how far it has come.

    Attributes:
        request: what was asked.
        ticket: where its events go.
        answer: its text.
        matcher: of its grammar.
        adapter: number of its adapter, 0 for none.
        submitted: on the clock of time.monotonic, as are the others.
        place: its rows, once admitted.
        num_read: tokens of the prompt that are in the scratch row; all but the last are read.
        digests: of its prompt's whole chunks.
        num_cached: tokens that came out of the prefix cache.
        prompt_logprobs: of the tokens after the first, where asked for.
        prompt_best: the likeliest tokens at each of those places, where asked for.
        expert_counts: assignments ``[L, E]`` that it made up to the last call, once it runs.
        began: when reading began.
        first_token: when the first token was there.
    """

    request: ServeRequest
    ticket: EngineTicket
    answer: Answer
    matcher: Matcher | None = None
    adapter: int = 0
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    place: Admitted | None = None
    num_read: int = 0
    digests: list[bytes] = dataclasses.field(default_factory=list)
    num_cached: int = 0
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_best: list[Pairs] = dataclasses.field(default_factory=list)
    expert_counts: np.ndarray | None = None
    began: float = 0.0
    first_token: float = 0.0

    @property
    def job(self) -> Job:
        """What the scheduler knows."""
        return Job(self, len(self.request.prompt_ids), self.request.sampling.max_new_tokens)

    @property
    def num_to_read(self) -> int:
        """Tokens of the prompt that are read before the first step, which reads the last."""
        return len(self.request.prompt_ids) - 1

    def next_digest(self, chunk: int) -> bytes | None:
        """Of the whole chunk that is read next, if that is one."""
        index = self.num_read // chunk
        return self.digests[index] if index < len(self.digests) else None

    @property
    def is_read(self) -> bool:
        """Whether the prompt is read."""
        return self.num_read >= self.num_to_read


def controls(sampling: ServeSampling) -> dict[str, Any]:
    """The fields of a row's Controls, plain enough to be sent."""
    options = {name: getattr(sampling, name) for name in _SHARED}
    return {
        "options": {**options, "ignore_eos": sampling.ignore_eos},
        "seed": sampling.seed,
        "sample_id": sampling.sample_id,
        "typical_p": sampling.typical_p,
        "frequency_penalty": float(sampling.frequency_penalty),
        "presence_penalty": float(sampling.presence_penalty),
        "logit_bias": tuple((int(i), float(v)) for i, v in sampling.logit_bias),
        "wants_best": sampling.top_logprobs > 0,
    }


def check_sampling(sampling: ServeSampling, vocab_size: int, *, has_text: bool) -> None:
    """Refuses options that mean nothing.

    Args:
        sampling: of a request.
        vocab_size: of the model.
        has_text: whether there is a tokenizer.

    Raises:
        Refused: ``invalid``, in one line.
    """
    try:
        SamplingOptions(
            **{name: getattr(sampling, name) for name in _SHARED},
            ignore_eos=sampling.ignore_eos,
            stop=sampling.stop,
        )
    except MixtralError as error:
        raise Refused("invalid", str(error).removeprefix("--")) from None
    typical, bias = sampling.typical_p, sampling.logit_bias
    penalties = (sampling.frequency_penalty, sampling.presence_penalty)
    is_integer = isinstance(sampling.seed, int) and not isinstance(sampling.seed, bool)
    for what, is_fine, expected in (
        ("typical_p", typical is None or 0 < typical <= 1, "above 0, up to 1"),
        ("frequency_penalty", abs(penalties[0]) <= _MOST_PENALTY, "from -2 to 2"),
        ("presence_penalty", abs(penalties[1]) <= _MOST_PENALTY, "from -2 to 2"),
        ("logit_bias", len(bias) <= NUM_BIASES, f"at most {NUM_BIASES} tokens"),
        ("logit_bias", len({i for i, _ in bias}) == len(bias), "each token once"),
        ("logit_bias", all(0 <= i < vocab_size for i, _ in bias), f"ids below {vocab_size}"),
        ("logit_bias", all(abs(v) <= _MOST_BIAS for _, v in bias), "values from -100 to 100"),
        ("seed", is_integer and 0 <= sampling.seed < NUM_SEEDS, "from 0 to 2^64 - 1"),
        ("sample_id", 0 <= sampling.sample_id < 2**31, "0 or more"),
        ("top_logprobs", 0 <= sampling.top_logprobs <= NUM_BEST, f"from 0 to {NUM_BEST}"),
        (
            "ignore_eos",
            not (sampling.ignore_eos and sampling.grammar),
            "false with a grammar, whose end it would hide",
        ),
        ("stop", has_text or not sampling.stop, "none: this model has no tokenizer"),
        ("grammar", has_text or sampling.grammar is None, "none: this model has no tokenizer"),
    ):
        if not is_fine:
            got = getattr(sampling, what)
            raise Refused("invalid", f"{what}: expected {expected}, got {str(got)[:60]}")
