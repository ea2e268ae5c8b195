"""Requests and answers of Text Generation Inference's own routes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, Field

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


class JsonGrammar(Strict):
    """An answer that obeys a JSON schema."""

    type: Literal["json", "json_object"]
    value: dict[str, Any] | str = Field(description="a JSON schema, or its text")


class NamedSchema(Strict):
    """A JSON schema and a name for it."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class JsonSchemaGrammar(Strict):
    """An answer that obeys a named JSON schema."""

    type: Literal["json_schema"]
    value: NamedSchema


class RegexGrammar(Strict):
    """An answer that a regular expression matches."""

    type: Literal["regex"]
    value: str


TgiGrammar = Annotated[JsonGrammar | JsonSchemaGrammar | RegexGrammar, Field(discriminator="type")]


class GenerateParameters(Strict):
    """Options of /generate."""

    REFUSED: ClassVar = {
        "ignore_eos_token": "not offered here; fix: drop it",
        "max_tokens": "OpenAI's name, not known here; fix: max_new_tokens",
    }

    adapter_id: str | None = None
    best_of: Samples | None = None
    decoder_input_details: bool = False
    details: bool = False
    do_sample: bool = False
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    grammar: TgiGrammar | None = None
    max_new_tokens: Count | None = Field(
        default=None, description="1024, or what the limits leave, if not given"
    )
    min_p: MinP | None = None
    repetition_penalty: Repetition | None = None
    return_full_text: bool | None = None
    seed: Seed | None = None
    stop: Items[str] = Field(default=[], validation_alias=AliasChoices("stop", "stop_sequences"))
    temperature: Annotated[float, Field(gt=0, le=1e4)] | None = None
    top_k: Count | None = None
    top_n_tokens: TopLogprobs | None = None
    top_p: Fraction | None = None
    truncate: Count | None = None
    typical_p: Fraction | None = None
    watermark: bool = False


class GenerateRequest(Strict):
    """Body of /generate and /generate_stream."""

    REFUSED: ClassVar = {
        "max_tokens": "not known here; fix: max_new_tokens inside parameters",
        "max_new_tokens": "belongs inside parameters; fix: put it there",
    }

    inputs: str
    parameters: GenerateParameters = GenerateParameters()


class CompatGenerateRequest(GenerateRequest):
    """Body of POST /."""

    stream: bool = False


class TokenizeRequest(Strict):
    """Body of /tokenize: TGI's ``inputs``, or ``prompt`` as evaluation harnesses send it."""

    inputs: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    parameters: GenerateParameters | None = None


class DetokenizeRequest(Strict):
    """Body of /detokenize."""

    tokens: Items[TokenId]


# Answers, for the OpenAPI document.


class Token(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(BaseModel):
    """A token of the prompt."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(BaseModel):
    """An answer with its tokens."""

    generated_text: str
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class Details(BaseModel):
    """What is known of an answer."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None
    best_of_sequences: list[BestOfSequence] | None = None


class GenerateResponse(BaseModel):
    """Answer of /generate."""

    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    """Details of a streamed answer."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    input_length: int
    seed: int | None


class StreamResponse(BaseModel):
    """One event of /generate_stream."""

    index: int
    token: Token
    top_tokens: list[Token] | None = None
    generated_text: str | None
    details: StreamDetails | None


class TgiError(BaseModel):
    """Answer to a request that failed."""

    error: str
    error_type: str


class SimpleToken(BaseModel):
    """A token of a text and where its characters lie."""

    id: int
    text: str
    start: int
    stop: int


class TokenIds(BaseModel):
    """Answer of /tokenize to a ``prompt``."""

    tokens: list[int]
    count: int
    max_model_len: int


class ChatTokenizeResponse(BaseModel):
    """Answer of /chat_tokenize."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class Info(BaseModel):
    """Answer of /info."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int
    max_client_batch_size: int
    waiting_served_ratio: float
    validation_workers: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    quantize: str | None
    mesh: str
    adapters: list[str]
