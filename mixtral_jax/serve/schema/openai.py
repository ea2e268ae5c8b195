"""Requests and answers of the routes under /v1, in OpenAI's form with TGI's additions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from mixtral_jax.serve.request import MOST_BIASES
from mixtral_jax.serve.schema.common import (
    Count,
    Fraction,
    Items,
    MinP,
    Penalty,
    Repetition,
    Samples,
    Seed,
    Strict,
    TokenId,
    TopLogprobs,
)
from mixtral_jax.serve.schema.tgi import NamedSchema, RegexGrammar

Bias = Annotated[float, Field(ge=-100, le=100)]
BiasedId = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
_NOT_OFFERED = "not offered here; fix: drop it"
_OF_TGI = {"max_new_tokens": "TGI's name, not known here; fix: max_tokens"}


def _few(value: Any) -> Any:
    """Refuses many biases before each of them is looked at (max_length is checked after that)."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise ValueError(f"expected at most {MOST_BIASES} biases")
    return value


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Strict):
    """Any JSON object, or with ``value`` (TGI) one that obeys a schema."""

    type: Literal["json", "json_object"]
    value: dict[str, Any] | str | None = None


class SchemaFormat(Strict):
    """JSON that obeys a schema: ``json_schema`` is OpenAI's name, ``value`` TGI's."""

    WITHOUT_EFFECT: ClassVar = frozenset({"strict", "description"})

    type: Literal["json_schema"]
    json_schema: NamedSchema | None = None
    value: NamedSchema | None = None


ResponseFormat = Annotated[
    TextFormat | JsonFormat | SchemaFormat | RegexGrammar, Field(discriminator="type")
]


class StreamOptions(Strict):
    """Options of a stream."""

    WITHOUT_EFFECT: ClassVar = frozenset({"include_obfuscation"})

    include_usage: bool | None = None


class FunctionName(Strict):
    """A function by name."""

    name: str


class ToolChoice(Strict):
    """A function that has to be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class _Shared(Strict):
    """What both kinds of completions take."""

    WITHOUT_EFFECT: ClassVar = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prediction",
            "verbosity",
            "parallel_tool_calls",
        }
    )

    model: str | None = Field(default=None, description="any name; that of an adapter chooses it")
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: Annotated[
        Annotated[dict[BiasedId, Bias], Field(max_length=MOST_BIASES)] | None,
        BeforeValidator(_few),
    ] = None
    n: Samples | None = None
    seed: Seed | None = None
    stop: str | Items[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=1e4)] | None = None
    top_p: Fraction | None = None
    top_k: Count | None = None
    min_p: MinP | None = None
    typical_p: Fraction | None = None
    response_format: ResponseFormat | None = None


class ChatRequest(_Shared):
    """Body of /v1/chat/completions."""

    REFUSED: ClassVar = {
        "tool_prompt": "the model's own format says how tools are told; fix: drop it",
        "guideline": _NOT_OFFERED,
        "functions": "deprecated; fix: use tools",
        "function_call": "deprecated; fix: use tool_choice",
        "audio": _NOT_OFFERED,
        "reasoning_effort": "Mixtral has no reasoning part; fix: drop it",
        "web_search_options": _NOT_OFFERED,
        **_OF_TGI,
    }
    WITHOUT_EFFECT: ClassVar = _Shared.WITHOUT_EFFECT | {"modalities"}

    messages: Items[dict[str, Any]] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None


class CompletionRequest(_Shared):
    """Body of /v1/completions."""

    REFUSED: ClassVar = {"suffix": "the model does not fill gaps; fix: drop it", **_OF_TGI}

    prompt: str | Items[str] | Items[TokenId] | Items[Items[TokenId]]
    best_of: Samples | None = None
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


# Answers, for the OpenAPI document.


class TopToken(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopToken):
    """A generated token and the best ones of its step."""

    top_logprobs: list[TopToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob] | None
    refusal: None = None


class CalledFunction(BaseModel):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class CachedTokens(BaseModel):
    """How much of a prompt came from the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """Answer to a request that failed."""

    error: ErrorBody
