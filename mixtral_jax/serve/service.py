"""What every route needs: the engine, the tokenizer, the options, and who watches."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable

from starlette.requests import Request

from mixtral_jax.chat_template import encode_rendered
from mixtral_jax.errors import MixtralError
from mixtral_jax.serve.exposition import Metrics
from mixtral_jax.serve.failures import Failure
from mixtral_jax.serve.options import ServeOptions
from mixtral_jax.serve.request import EngineProtocol
from mixtral_jax.serve.tracing import Tracing
from mixtral_jax.tokenizer import Tokenizer


@dataclasses.dataclass(kw_only=True)
class Service:
    """The parts behind the routes.

    Attributes:
        engine: generates.
        tokenizer: of the model; None for a folder without one, and then only ids are served.
        options: of the command line.
        metrics: what /metrics shows.
        tracing: where spans go.
        is_draining: set by SIGTERM: no new requests.
        created: seconds since the epoch, for /v1/models.
    """

    engine: EngineProtocol
    tokenizer: Tokenizer | None
    options: ServeOptions
    metrics: Metrics
    tracing: Tracing
    is_draining: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def check_ready(self) -> None:
        """Refuses while nothing can be generated.

        Raises:
            Failure: loading, draining or failed.
        """
        state = "draining" if self.is_draining else self.engine.state()
        if state != "ready":
            retry = None if state == "failed" else 5.0
            raise Failure("unhealthy", f"the model is {state}", retry_seconds=retry)

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            Failure: there is none.
        """
        if self.tokenizer is None:
            message = "this checkpoint has no tokenizer; fix: send token ids to /v1/completions"
            raise Failure("validation", message)
        return self.tokenizer

    def check_size(self, name: str, texts: Iterable[str]) -> None:
        """Refuses texts that are too long however they are cut, before time goes into cutting them.

        Raises:
            Failure: they have more tokens than a prompt may have.
        """
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        fewest = num_bytes // self.text_tokenizer().longest_piece
        most = self.engine.limits.max_input_tokens
        if fewest > most:
            message = f"{name}: expected at most {most} tokens, got {fewest} or more"
            raise Failure("validation", f"{message}; fix: shorten the prompt", param=name)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as a user writes it, <s> first: <s> and its kin become their ids.

        Raises:
            Failure: there is no tokenizer, or this is no text.
        """
        tokenizer = self.text_tokenizer()
        try:
            if tokenizer.control_pattern.search(text):
                return encode_rendered(tokenizer, text)
            return tokenizer.encode(text)
        except MixtralError as error:
            raise Failure("validation", str(error)) from None


def service_of(request: Request) -> Service:
    """The service of the application that serves a request."""
    return request.app.state.service


def new_id(prefix: str) -> str:
    """An identifier for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"
