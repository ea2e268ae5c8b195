"""From what a client asks to what the engine is asked."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Sequence
from typing import Any, NoReturn

from starlette.requests import Request

from mixtral_jax.serve.failures import Failure
from mixtral_jax.serve.request import NUM_SEEDS, Grammar, ServeRequest, ServeSampling
from mixtral_jax.serve.schema.openai import ChatRequest, CompletionRequest, SchemaFormat
from mixtral_jax.serve.schema.tgi import (
    GenerateParameters,
    JsonSchemaGrammar,
    RegexGrammar,
)
from mixtral_jax.serve.service import Service
from mixtral_jax.serve.strict_json import BadJSONError, parse

DEFAULT_NEW_TOKENS = 1024  # or what the limits leave
_SCHEMA_DEPTH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks: for the prefix cache, logs and traces.

    Attributes:
        request_id: the client's, or ours.
        cache_key: digest of the API key.
        traceparent: the client's span, as the W3C's header has it.
        received_at: when the request was, on the clock of ``time.perf_counter``.
        log: fields for the request's line in the log, filled in as they become known.
    """

    request_id: str = ""
    cache_key: str = ""
    traceparent: str | None = None
    received_at: float = 0.0
    log: dict[str, Any] = dataclasses.field(default_factory=dict)


def caller_of(request: Request) -> Caller:
    """The caller, as the middleware found it."""
    return Caller(
        request_id=request.state.request_id,
        cache_key=request.state.cache_key,
        traceparent=request.headers.get("traceparent"),
        received_at=request.state.received_at,
        log=request.state.log,
    )


def new_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbelow(NUM_SEEDS)


def tgi_sampling(
    service: Service, parameters: GenerateParameters, *, num_prompt: int, is_stream: bool
) -> ServeSampling:
    """Options of /generate. Sampling is on where do_sample or an option of it is given.

    Raises:
        Failure: options that do not go together, or lie beyond the server's limits.
    """
    limits = service.options.request
    best_of = parameters.best_of or 1
    options = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.typical_p)
    is_sampled = parameters.do_sample or any(
        option is not None for option in (*options, parameters.min_p)
    )
    if parameters.watermark:
        _refuse("watermark", "not offered here; fix: drop it")
    if best_of > limits.max_best_of:
        _refuse("best_of", f"expected at most {limits.max_best_of}, got {best_of}")
    if best_of > 1 and not is_sampled:
        _refuse("best_of", "greedy answers are all alike; fix: do_sample")
    if best_of > 1 and is_stream:
        _refuse("best_of", "a stream has one answer; fix: /generate, or best_of 1")
    top_n = parameters.top_n_tokens or 0
    if top_n > limits.max_top_n_tokens:
        _refuse("top_n_tokens", f"expected at most {limits.max_top_n_tokens}, got {top_n}")
    temperature = parameters.temperature
    return ServeSampling(
        max_new_tokens=_new_tokens(
            service, "max_new_tokens", parameters.max_new_tokens, num_prompt
        ),
        temperature=(1.0 if temperature is None else temperature) if is_sampled else 0.0,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        min_p=parameters.min_p,
        typical_p=parameters.typical_p,
        repetition_penalty=parameters.repetition_penalty or 1.0,
        frequency_penalty=parameters.frequency_penalty or 0.0,
        presence_penalty=parameters.presence_penalty or 0.0,
        seed=new_seed() if parameters.seed is None else parameters.seed,
        stop=_stop(service, parameters.stop),
        top_logprobs=top_n,
        prompt_logprobs=parameters.decoder_input_details,
        # TGI leaves the stop string in the text.
        include_stop=True,
        grammar=_tgi_grammar(service, parameters),
    )


def openai_sampling(
    service: Service,
    request: ChatRequest | CompletionRequest,
    *,
    max_tokens: int | None,
    num_prompt: int,
    top_logprobs: int = 0,
    prompt_logprobs: bool = False,
    grammar: Grammar | None = None,
) -> ServeSampling:
    """Options of /v1. The temperature is 1 unless given.

    Raises:
        Failure: options beyond the server's limits.
    """
    limits = service.options.request
    samples = max(request.n or 1, getattr(request, "best_of", None) or 1)
    if samples > limits.max_best_of:
        _refuse("n", f"expected at most {limits.max_best_of}, got {samples}")
    if top_logprobs > limits.max_top_n_tokens:
        _refuse("top_logprobs", f"expected at most {limits.max_top_n_tokens}, got {top_logprobs}")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return ServeSampling(
        max_new_tokens=_new_tokens(service, "max_tokens", max_tokens, num_prompt),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        typical_p=request.typical_p,
        repetition_penalty=request.repetition_penalty or 1.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=_biases(service, request.logit_bias or {}),
        seed=new_seed() if request.seed is None else request.seed,
        stop=_stop(service, stop),
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=_forced(service, grammar) or response_grammar(service, request),
    )


def samples_of(
    prompt_ids: Sequence[int],
    sampling: ServeSampling,
    count: int,
    caller: Caller,
    *,
    adapter_id: str | None = None,
    is_answer: bool = False,
) -> list[ServeRequest]:
    """One request for each sample of a prompt."""
    return [
        ServeRequest(
            prompt_ids=tuple(prompt_ids),
            sampling=dataclasses.replace(sampling, sample_id=sample_id),
            adapter_id=adapter_id,
            cache_key=caller.cache_key,
            request_id=caller.request_id,
            is_answer=is_answer,
        )
        for sample_id in range(count)
    ]


def adapter_of(service: Service, model: str | None) -> str | None:
    """The adapter that a model name stands for; any other name is that of the base model."""
    return model if model in service.engine.model.adapters else None


def response_grammar(service: Service, request: ChatRequest | CompletionRequest) -> Grammar | None:
    """The grammar of a response format, or None for any text.

    Raises:
        Failure: grammars are switched off, or the schema is missing.
    """
    asked = request.response_format
    if asked is None or asked.type == "text":
        return None
    _check_grammars(service, "response_format")
    if isinstance(asked, RegexGrammar):
        return Grammar(kind="regex", text=asked.value)
    if isinstance(asked, SchemaFormat):
        named = asked.json_schema or asked.value
        if named is None:
            _refuse("response_format.json_schema", "expected a schema, got none")
        return schema_grammar(named.schema_)
    return Grammar(kind="json") if asked.value is None else schema_grammar(asked.value)


def schema_grammar(schema: object) -> Grammar:
    """The grammar of a JSON schema, which TGI also takes as a text.

    Raises:
        Failure: the text is no JSON.
    """
    if isinstance(schema, str):
        try:
            schema = parse(schema.encode("utf-8"), max_depth=_SCHEMA_DEPTH)
        except BadJSONError as error:
            _refuse("grammar", str(error).replace("body", "its JSON schema", 1))
        if not isinstance(schema, dict):
            _refuse("grammar", f"expected a JSON schema, got {type(schema).__name__}")
    return Grammar(kind="json_schema", text=json.dumps(schema, ensure_ascii=False))


def _tgi_grammar(service: Service, parameters: GenerateParameters) -> Grammar | None:
    asked = parameters.grammar
    if asked is None:
        return None
    _check_grammars(service, "grammar")
    if isinstance(asked, RegexGrammar):
        return Grammar(kind="regex", text=asked.value)
    return schema_grammar(
        asked.value.schema_ if isinstance(asked, JsonSchemaGrammar) else asked.value
    )


def _forced(service: Service, grammar: Grammar | None) -> Grammar | None:
    if grammar is not None:
        _check_grammars(service, "tool_choice")
    return grammar


def _check_grammars(service: Service, name: str) -> None:
    if service.options.request.disable_grammar_support:
        _refuse(name, "grammars are switched off on this server (--disable-grammar-support)")


def _new_tokens(service: Service, name: str, asked: int | None, num_prompt: int) -> int:
    limits = service.engine.limits
    if num_prompt > limits.max_input_tokens:
        message = f"expected at most {limits.max_input_tokens} tokens, got {num_prompt}"
        _refuse("inputs", f"{message}; fix: shorten the prompt, or truncate")
    room = limits.max_total_tokens - num_prompt
    if asked is None:
        if room < 1:
            message = f"expected fewer than {limits.max_total_tokens} tokens, got {num_prompt}"
            _refuse("inputs", f"{message}; fix: shorten the prompt")
        return min(DEFAULT_NEW_TOKENS, room)
    if asked > room:
        message = f"expected at most {limits.max_total_tokens} tokens of prompt and answer"
        _refuse(name, f"{message}, got {num_prompt} + {asked}; fix: {name} {max(room, 0)}")
    return max(asked, 1)


def _stop(service: Service, stop: Sequence[str]) -> tuple[str, ...]:
    limits = service.options.request
    if len(stop) > limits.max_stop_sequences:
        _refuse("stop", f"expected at most {limits.max_stop_sequences} texts, got {len(stop)}")
    for text in stop:
        size = len(text.encode("utf-8"))
        if not 0 < size <= limits.max_stop_bytes:
            _refuse("stop", f"expected texts of 1 to {limits.max_stop_bytes} bytes, got {size}")
    return tuple(stop)


def _biases(service: Service, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    size = service.engine.model.vocab_size
    found = tuple((int(token_id), float(bias)) for token_id, bias in biases.items())
    for token_id, _ in found:
        if token_id >= size:
            _refuse("logit_bias", f"expected token ids below {size}, got {token_id}")
    if len({token_id for token_id, _ in found}) < len(found):
        _refuse("logit_bias", "expected each token id once")
    return found


def _refuse(param: str, message: str) -> NoReturn:
    raise Failure("validation", f"{param}: {message}", param=param)
