"""Texts to token ids and back, for clients that count and for evaluation harnesses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import WrapValidator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mixtral_jax.serve.failures import Failure
from mixtral_jax.serve.routes.chat import chat_completions, chat_ids
from mixtral_jax.serve.routes.completions import completions
from mixtral_jax.serve.routes.route import Json, StrictRoute, answers, check_names
from mixtral_jax.serve.routes.tgi import compat_generate, truncated
from mixtral_jax.serve.schema.openai import ChatRequest, CompletionRequest
from mixtral_jax.serve.schema.tgi import (
    ChatTokenizeResponse,
    CompatGenerateRequest,
    DetokenizeRequest,
    SimpleToken,
    TokenIds,
    TokenizeRequest,
)
from mixtral_jax.serve.service import Service, service_of
from mixtral_jax.serve.tool_calls import choice_of
from mixtral_jax.tokenizer import IncrementalDetokenizer, Tokenizer

router = APIRouter(route_class=StrictRoute, tags=["Tokens"])


@router.post("/tokenize", responses=answers("tgi", list[SimpleToken] | TokenIds, generates=False))
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Token ids of a text: TGI's answer to ``inputs``, a harness's to ``prompt``."""
    check_names(request, body)
    if (body.inputs is None) == (body.prompt is None):
        raise Failure("validation", "body: expected one of inputs and prompt")
    # In a thread: a text may be as long as a body, and others are being answered.
    return await run_in_threadpool(_tokens_of, service_of(request), body)


def _tokens_of(service: Service, body: TokenizeRequest) -> Json:
    if body.inputs is not None:
        most = body.parameters.truncate if body.parameters else None
        if most is None:  # each token is told in 50 bytes; those of ``prompt`` are numbers
            service.check_size("inputs", [body.inputs])
        ids = truncated(service.encode(body.inputs), most)
        return Json(simple_tokens(service.text_tokenizer(), ids))
    text = body.prompt or ""
    ids = service.encode(text)
    if not body.add_special_tokens and not text.startswith("<s>"):
        ids = ids[1:]
    most = service.engine.limits.max_total_tokens
    return Json({"tokens": ids, "count": len(ids), "max_model_len": most})


@router.post("/detokenize", responses=answers("tgi", dict[str, str], generates=False))
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of token ids; control pieces are left out."""
    tokenizer = service_of(request).text_tokenizer()
    check_names(request, body)
    most = tokenizer.vocab_size
    if any(token_id >= most for token_id in body.tokens):
        raise Failure("validation", f"tokens: expected ids below {most}, got {max(body.tokens)}")
    return Json({"prompt": await run_in_threadpool(tokenizer.decode, body.tokens)})


@router.get("/tokenizer_info", responses={200: {"description": "Special tokens"}})
async def tokenizer_info(request: Request) -> Response:
    """What an evaluation harness asks first."""
    service = service_of(request)
    tokenizer = service.text_tokenizer()
    return Json(
        {
            "tokenizer_class": "SentencePiece",
            "tokenizer_version": tokenizer.version,
            "vocab_size": tokenizer.vocab_size,
            "bos_token": tokenizer.pieces[tokenizer.bos_id],
            "bos_token_id": tokenizer.bos_id,
            "eos_token": tokenizer.pieces[tokenizer.eos_id],
            "eos_token_id": tokenizer.eos_id,
            "pad_token": None,
            "model_max_length": service.engine.limits.max_total_tokens,
            # Conversations are encoded natively: a template's text would give other ids.
            "chat_template": None,
        }
    )


@router.post("/chat_tokenize", responses=answers("tgi", ChatTokenizeResponse, generates=False))
async def chat_tokenize(request: Request, body: ChatRequest) -> Response:
    """Token ids of a conversation, and the prompt as text for people to read."""
    check_names(request, body)
    return await run_in_threadpool(_chat_tokens_of, service_of(request), body)


def _chat_tokens_of(service: Service, body: ChatRequest) -> Json:
    tokenizer = service.text_tokenizer()
    choice = choice_of(body, is_v3=service.engine.model.is_v3)
    ids = chat_ids(service, body.messages, choice.tools)
    tokens = simple_tokens(tokenizer, ids)
    text = "".join(tokenizer.pieces[i] if tokenizer.is_control(i) else "" for i in ids[:1])
    text += _readable(tokenizer, ids[1:])
    return Json({"tokenize_response": tokens, "templated_text": text})


def _chosen(body: Any, whole: Callable[[Any], Any]) -> Any:
    """The one form that a body's fields name: errors are about that form and no other."""
    if not isinstance(body, dict):
        return whole(body)
    if "messages" in body:
        return ChatRequest.model_validate(body)
    is_completion = "prompt" in body and "inputs" not in body
    return (CompletionRequest if is_completion else CompatGenerateRequest).model_validate(body)


_Invocation = Annotated[
    CompatGenerateRequest | ChatRequest | CompletionRequest, WrapValidator(_chosen)
]


@router.post("/invocations", responses=answers("tgi", dict[str, Any] | list[Any], streams=True))
async def invocations(request: Request, body: _Invocation) -> Response:
    """SageMaker's one route: POST /, /v1/chat/completions or /v1/completions by its fields."""
    if isinstance(body, ChatRequest):
        return await chat_completions(request, body)
    if isinstance(body, CompletionRequest):
        return await completions(request, body)
    return await compat_generate(request, body)


def simple_tokens(tokenizer: Tokenizer, ids: list[int]) -> list[dict[str, Any]]:
    """Tokens and where their characters lie in the text of them all.

    A control piece has no characters there, nor has a byte that does not end a character: the
    last byte of a character shows it.
    """
    detokenizer, at, found = IncrementalDetokenizer(tokenizer), 0, []
    for token_id in ids:
        added = detokenizer.push(token_id)
        start, at = at, at + len(added)
        if tokenizer.is_control(token_id):
            text = tokenizer.pieces[token_id]
        else:
            is_byte = tokenizer.byte_of(token_id) is not None
            text = added if is_byte else tokenizer.text_of(token_id)
        found.append({"id": token_id, "text": text, "start": start, "stop": at})
    return found


def _readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Token ids as text with their control pieces."""
    text, run = "", []
    for token_id in [*ids, None]:
        if token_id is not None and not tokenizer.is_control(token_id):
            run.append(token_id)
            continue
        text += (" " if run else "") + tokenizer.decode(run)
        text, run = text + (tokenizer.pieces[token_id] if token_id is not None else ""), []
    return text
