"""The published clients against a real server: what works with TGI and OpenAI works here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import huggingface_hub
import openai
import pytest

from tests.serve.http.fake import FakeEngine, Script
from tests.serve.http.live import serving
from tests.serve.http.test_chat import CALL, MARK, WEATHER
from tests.test_chat import V3
from tests.test_tokenizer import V1

HI: Any = [{"role": "user", "content": "Hi"}]
HELLO = "Hello, wörld 🎉"
KEY = "secret"


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(V1)


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine, keys=(KEY.encode(),)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def gpt(url: str, engine: FakeEngine) -> Iterator[openai.OpenAI]:
    engine.say(HELLO)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def hub(url: str, engine: FakeEngine) -> Iterator[huggingface_hub.InferenceClient]:
    engine.say(HELLO)
    with huggingface_hub.InferenceClient(model=url, token=KEY) as client:
        yield client


def test_openai_chat(gpt):
    answer = gpt.chat.completions.create(model="tgi", messages=HI, stop=["never"], n=2, seed=1)
    assert [choice.message.content for choice in answer.choices] == [HELLO, HELLO]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_chat_stream_with_usage(gpt):
    stream = gpt.chat.completions.create(
        model="tgi", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == HELLO
    assert chunks[-1].usage.completion_tokens == len(V1.encode(HELLO))


def test_openai_logprobs(gpt):
    answer = gpt.chat.completions.create(
        model="tgi", messages=HI, logprobs=True, top_logprobs=2, temperature=0
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert len(content[0].top_logprobs) == 2


def test_openai_completions(gpt):
    answer = gpt.completions.create(model="tgi", prompt=["Hi", "Ho"], logprobs=1, max_tokens=50)
    assert [choice.text for choice in answer.choices] == [f" {HELLO}"] * 2
    stream = gpt.completions.create(model="tgi", prompt="Hi", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == f" {HELLO}"


def test_openai_models(gpt):
    assert [model.id for model in gpt.models.list()] == ["fake"]
    assert gpt.models.retrieve("fake").object == "model"


def test_openai_tools():
    engine = FakeEngine(V3)
    ids = [MARK, *V3.encode(CALL, bos=False), V3.eos_id]
    engine.script = lambda request: Script(token_ids=ids)
    with serving(engine) as port:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            tools: Any = [WEATHER]
            answer = client.chat.completions.create(model="m", messages=HI, tools=tools)
            message = answer.choices[0].message
            assert message.tool_calls is not None
            call: Any = message.tool_calls[0]
            assert json.loads(call.function.arguments) == {"city": "Paris"}
            # The library's own message goes back as it came, with the result after it.
            result = {"role": "tool", "tool_call_id": call.id, "content": "22"}
            talk: Any = [*HI, message.model_dump(exclude_none=True), result]
            client.chat.completions.create(model="m", messages=talk, tools=tools)
    assert V3.control_ids["[TOOL_RESULTS]"] in engine.tickets[-1].request.prompt_ids


def test_openai_errors_have_their_own_classes(url, engine, gpt):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        gpt.chat.completions.create(model="tgi", messages=HI, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        gpt.models.retrieve("none")
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()
    engine.say(HELLO, fails_after=2, kind="overloaded")
    with pytest.raises(openai.RateLimitError):
        gpt.chat.completions.create(model="tgi", messages=HI)
    with pytest.raises(openai.APIError, match="scripted"):
        list(gpt.chat.completions.create(model="tgi", messages=HI, stream=True))


def test_hub_text_generation(hub):
    assert hub.text_generation("Hi", max_new_tokens=50) == f" {HELLO}"
    details = hub.text_generation(
        "Hi", details=True, best_of=2, do_sample=True, seed=3, decoder_input_details=True
    )
    assert details.generated_text == f" {HELLO}"
    assert details.details.seed == 3
    assert len(details.details.best_of_sequences) == 1
    assert len(details.details.prefill) == len(V1.encode("Hi"))


def test_hub_text_generation_stream(hub):
    # As with TGI: without details the client joins all tokens, the last one is </s>.
    assert "".join(hub.text_generation("Hi", stream=True)) == f" {HELLO}</s>"
    events = list(hub.text_generation("Hi", stream=True, details=True))
    assert events[-1].generated_text == f" {HELLO}"
    assert events[-1].details.input_length == len(V1.encode("Hi"))
    assert events[-1].details.finish_reason == "eos_token"


def test_hub_chat(hub):
    answer = hub.chat_completion(HI, max_tokens=50, logprobs=True)
    assert answer.choices[0].message.content == HELLO
    stream = hub.chat_completion(HI, stream=True, max_tokens=50)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == HELLO


def test_hub_errors_have_their_own_classes(engine, hub):
    with pytest.raises(huggingface_hub.errors.ValidationError, match="top_k"):
        hub.text_generation("Hi", top_k=0)
    engine.say(HELLO, fails_after=1)
    with pytest.raises(huggingface_hub.errors.GenerationError):
        hub.text_generation("Hi")
    engine.say(HELLO, fails_after=0, kind="overloaded")
    with pytest.raises(huggingface_hub.errors.OverloadedError):
        hub.text_generation("Hi")
