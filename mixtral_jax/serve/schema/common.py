"""What the models of both APIs share: strict types, bounded numbers, and refusals by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from mixtral_jax.serve.failures import Failure
from mixtral_jax.serve.request import MOST_TOP_LOGPROBS, NUM_SEEDS

MOST_TOKENS = 2**31 - 1
MOST_SAMPLES = 128  # n and best_of; --max-best-of decides below it
MOST_IGNORED = 20  # unknown names that are looked at and told
_Item = TypeVar("_Item")

Count = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
Seed = Annotated[int, Field(ge=0, lt=NUM_SEEDS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Repetition = Annotated[float, Field(gt=0, le=100)]
Fraction = Annotated[float, Field(gt=0, le=1)]
MinP = Annotated[float, Field(ge=0, le=1)]
TopLogprobs = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
# Its first bad item is enough: an error for each of 100,000 takes seconds and gigabytes.
Items = Annotated[list[_Item], Field(fail_fast=True)]


class Strict(BaseModel):
    """A part of a request: "5" and true are no numbers, NaN is none, and names are checked.

    A name that nobody knows is kept apart (``unknown_names``): clients send fields of other
    servers, and those that would change an answer are in ``REFUSED``.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    # Known to the API and not offered here, unless null or false: why.
    REFUSED: ClassVar[Mapping[str, str]] = {}
    # Known to the API and without an influence on the answer.
    WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset()

    def check_names(self, where: str = "") -> list[str]:
        """The first names that are unknown and therefore not used.

        Raises:
            Failure: one that is not offered, or that looks like a known one misspelled.
        """
        unknown = []
        for name, value in (self.model_extra or {}).items():
            if name in self.REFUSED:
                if value not in (None, False, [], {}):
                    message = f"{where}{name}: {self.REFUSED[name]}"
                    raise Failure("validation", message, param=name)
            elif name not in self.WITHOUT_EFFECT and len(unknown) < MOST_IGNORED:
                self._refuse_misspelled(where, name)
                unknown.append(where + name)
        for name, part in self._parts():
            unknown += part.check_names(f"{where}{name}.")
        return unknown[:MOST_IGNORED]

    def _parts(self) -> Iterator[tuple[str, Strict]]:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Strict):
                yield name, value

    def _refuse_misspelled(self, where: str, name: str) -> None:
        known = [field for field in type(self).model_fields if len(field) > 3]
        meant = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.85)
        if meant:
            message = f"{where}{name[:64]}: expected a known parameter; fix: {meant[0]}"
            raise Failure("validation", message, param=name[:64])


def one_line(errors: list[Any]) -> tuple[str, str | None]:
    """What pydantic found wrong first, as one line and as the name of the parameter."""
    error = errors[0]
    path = [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
    where = ".".join(path) or "body"
    shown = "" if error["type"] == "missing" else f", got {_shown(error.get('input'))}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}: {error['msg']}{shown}{more}", path[0] if path else None


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value[:40] if isinstance(value, str) else value)[:60]
