"""The OpenAPI document is true: what it allows is answered, what it forbids is refused."""

from __future__ import annotations

import json
import os
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi import checks

from tests.serve.http.conftest import application
from tests.serve.http.fake import FakeEngine, Script
from tests.test_tokenizer import V1

EXAMPLES = int(os.environ.get("MIXTRAL_JAX_CONTRACT_EXAMPLES", "200"))  # per route


SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
CHECKS = ("status_code_conformance", "content_type_conformance", "response_schema_conformance")


def quick(request: Any) -> Script:
    return Script(token_ids=[5, V1.eos_id] * 5000)


def schema() -> Any:
    engine = FakeEngine(V1, quick)
    return schemathesis.openapi.from_asgi("/openapi.json", application(engine, insecure=True))


def body_validator(raw: dict[str, Any], document: dict[str, Any]) -> Any:
    """What a body must be. A body that breaks one branch of a ``oneOf`` may fit another."""
    body = raw["requestBody"]["content"]["application/json"]["schema"]
    return jsonschema.Draft202012Validator({**body, "components": document["components"]})


def check_operation(found: Any, mode: str, document: Any) -> None:
    wanted = getattr(schemathesis.GenerationMode, mode.upper())
    raw, wrong = found.definition.raw, 0
    allowed = body_validator(raw, document.raw_schema) if "requestBody" in raw else None

    @given(case=found.as_strategy(generation_mode=wanted))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=SLOW, database=None)
    def check(case: Any) -> None:
        nonlocal wrong
        answer = case.call()
        assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
        body = answer.content.decode("utf-8")
        if answer.status_code >= 400 and body:
            assert "error" in json.loads(body)
        wanted_checks = [getattr(checks, name) for name in CHECKS]
        if mode == "negative" and allowed is not None and not allowed.is_valid(case.body):
            wrong += 1
            wanted_checks.append(checks.negative_data_rejection)
        case.validate_response(answer, checks=wanted_checks)

    check()
    assert mode == "positive" or wrong > EXAMPLES / 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_of_the_document_or_against_it_is_a_500(mode):
    checked, document = 0, schema()
    for operation in document.get_all_operations():
        found = operation.ok()
        if mode == "negative" and "requestBody" not in found.definition.raw:
            continue  # nothing to do wrong
        check_operation(found, mode, document)
        checked += 1
    assert checked >= (9 if mode == "negative" else 16)
