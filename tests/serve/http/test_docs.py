"""What the documentation shows works: its curl lines, and the routes and flags that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mixtral_jax.serve.launcher import REFUSED, WITHOUT_EFFECT

ROOT = Path(__file__).parents[3]
PAGES = ["README.md", "docs/serve.md"]
CURL = re.compile(r"curl (?:-N )?localhost:3000(\S+) -H '([^']+)'\s*(?:\\\n\s*)?-d '(\{.*?\})'")


def lines() -> list[tuple[str, str, str]]:
    return [line for page in PAGES for line in CURL.findall((ROOT / page).read_text("utf-8"))]


@pytest.mark.anyio
async def test_curl_lines_are_answered(client):
    assert len(lines()) >= 3
    for path, header, body in lines():
        name, _, value = header.partition(": ")
        answer = await client.post(path, content=body, headers={name: value})
        assert answer.status_code == 200
        assert json.loads(body).keys() <= {"inputs", "parameters", "model", "stream", "messages"}


def test_flags_without_effect_and_refused_ones_are_listed():
    text = (ROOT / "docs/serve.md").read_text("utf-8")
    assert [flag for flag in (*WITHOUT_EFFECT, *REFUSED) if f"`{flag}`" not in text] == []


@pytest.mark.anyio
async def test_every_route_is_listed(client):
    paths = (await client.get("/openapi.json")).json()["paths"]
    text = (ROOT / "docs/serve.md").read_text("utf-8")
    assert [path for path in paths if f"`{path}`" not in text and f" {path}`" not in text] == []


def test_what_is_refused_by_name_is_listed():
    from mixtral_jax.serve.schema.openai import ChatRequest, CompletionRequest

    text = (ROOT / "docs/serve.md").read_text("utf-8")
    refused = {*ChatRequest.REFUSED, *CompletionRequest.REFUSED, "watermark"}
    assert [name for name in refused if f"`{name}`" not in text] == []
