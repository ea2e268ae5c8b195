"""``python -m mixtral_jax.serve`` with no arguments, and the published clients against it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import openai
import pytest

from tests.environ import without_devices
from tests.serve.http.test_docs import lines

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ASKED: Any = [{"role": "user", "content": "What is 12 + 30?"}]
READY_SECONDS = 240  # 60 are promised for two idle cores; a test is no place to measure


def wait_until_ready(url: str, server: subprocess.Popen) -> None:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        assert server.poll() is None
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("the server was not ready")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[subprocess.Popen, str, Path]]:
    """The process, its address, and its log."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "mixtral_jax.serve", "--port", "0", "--json-output"],
            cwd=ROOT,
            env=without_devices(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    try:
        while not (found := re.search(r'"url": "([^"]+)"', log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        wait_until_ready(found[1], process)
        yield process, found[1], log
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def gpt(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def hub(server) -> Iterator[huggingface_hub.InferenceClient]:
    with huggingface_hub.InferenceClient(model=server[1]) as client:
        yield client


def test_openai_chat(gpt):
    answer = gpt.chat.completions.create(
        model="tiny", messages=ASKED, temperature=0, n=2, logprobs=True, top_logprobs=3
    )
    assert [choice.message.content for choice in answer.choices] == ["42", "42"]
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content[:-1]).strip() == "42"
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)
    assert answer.usage.completion_tokens == 2 * len(content)


def test_openai_chat_stream_and_stop(gpt):
    stream = gpt.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Count from 3 to 9."}],
        temperature=0,
        stop=["7"],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.startswith("3")
    assert "6" in text
    assert "7" not in text
    assert chunks[-1].usage.prompt_tokens > 5


def test_openai_completions_and_a_schema(gpt):
    answer = gpt.completions.create(
        model="tiny", prompt="12+30=", temperature=0, max_tokens=4, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text.startswith("12+30=")
    assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs)
    assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    answer = gpt.chat.completions.create(
        model="tiny",
        messages=ASKED,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    if answer.choices[0].finish_reason != "length":
        assert json.loads(answer.choices[0].message.content)["a"] in (1, 2)


def test_hub_text_generation_and_chat(hub):
    plain = hub.text_generation("12+30=", max_new_tokens=8)
    details = hub.text_generation("12+30=", max_new_tokens=8, details=True)
    streamed = list(hub.text_generation("12+30=", max_new_tokens=8, details=True, stream=True))
    assert details.generated_text == plain == streamed[-1].generated_text
    assert [token.id for token in details.details.tokens] == [e.token.id for e in streamed]
    answer = hub.chat_completion(ASKED, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == "42"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_lines_of_the_documentation(server):
    for path, header, body in lines():
        done = subprocess.run(
            ["curl", "-sS", "-N", "-f", f"{server[1]}{path}", "-H", header, "-d", body],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        if json.loads(body).get("stream"):
            assert done.stdout.rstrip().endswith("data: [DONE]")
        else:
            assert json.loads(done.stdout)["generated_text"]


def test_what_was_logged_and_the_end(server):
    """Runs last: nothing was compiled for any of the above, and SIGTERM ends it well."""
    process, url, log = server
    metrics = httpx.get(f"{url}/metrics").text
    assert re.search(r"^mixtral_compilations_since_ready(_total)? 0(\.0)?$", metrics, re.MULTILINE)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.stdout.read() == ""
    said = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    messages = [line["message"] for line in said]
    assert messages.index("listening") < messages.index("ready") < messages.index("ended")
