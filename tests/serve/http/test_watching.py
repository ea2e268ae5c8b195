"""What the server tells about itself: metrics, logs and traces."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from mixtral_jax.serve import logs
from mixtral_jax.serve.app import create_app
from mixtral_jax.serve.options import ServeOptions, WatchFlags
from mixtral_jax.serve.tracing import Tracing
from tests.serve.http.conftest import client_of
from tests.serve.http.live import connect, post_bytes, serving, wait_until
from tests.test_tokenizer import V1

pytestmark = pytest.mark.anyio

# docs/source/reference/metrics.md of TGI 3.3, less what only its own batches have.
TGI_NAMES = [
    "tgi_batch_current_size",
    "tgi_batch_inference_count",
    "tgi_batch_inference_duration",
    "tgi_batch_inference_success",
    "tgi_queue_size",
    "tgi_request_count",
    "tgi_request_duration",
    "tgi_request_generated_tokens",
    "tgi_request_inference_duration",
    "tgi_request_input_length",
    "tgi_request_max_new_tokens",
    "tgi_request_mean_time_per_token_duration",
    "tgi_request_queue_duration",
    "tgi_request_skipped_tokens",
    "tgi_request_success",
    "tgi_request_validation_duration",
]


def client_with(engine, tracing=None, **watch) -> httpx.AsyncClient:
    asked = ServeOptions(watch=WatchFlags(**watch))
    app = create_app(engine, engine.tokenizer, asked, tracing=tracing)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


async def figures(client) -> dict[str, float]:
    """Each sample by its name and labels, as in ``name{a=1}{b=2}``."""
    text = (await client.get("/metrics")).text
    assert list(text_string_to_metric_families(text))  # Prometheus's own parser reads it
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            parts = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            assert parts is not None
            name, labels, value = parts.groups()
            pairs = sorted(re.findall(r'(\w+)="(.*?)"', labels or ""))
            found[name + "".join(f"{{{key}={label}}}" for key, label in pairs)] = float(value)
    return found


async def test_metrics_have_tgis_names_and_count(engine):
    engine.say("Hello")
    async with client_of(engine) as client:
        for _ in range(3):
            await client.post("/generate", json={"inputs": "Hi"})
        await client.post("/generate", json={"inputs": "Hi", "parameters": {"top_k": 0}})
        await client.get("/nothing/at/all")
        found = await figures(client)
        text = (await client.get("/metrics")).text
    for name in TGI_NAMES:
        assert any(sample.startswith(name) for sample in found), name
        assert f"# TYPE {name} " in text
    assert found["tgi_request_count"] == 4
    assert found["tgi_request_success"] == 3
    assert found["tgi_request_failure{err=validation}"] == 1
    assert found["tgi_request_generated_tokens_sum"] == 3 * len(V1.encode("Hello"))
    assert found["tgi_request_input_length_sum"] == 3 * len(V1.encode("Hi"))
    assert found["tgi_request_validation_duration_count"] == 3
    assert found["tgi_queue_size"] == 3
    assert found["mixtral_expert_assignments_total{expert=3}{layer=0}"] == 16
    assert found["mixtral_dropped_assignments_total{layer=1}"] == 5
    assert found["mixtral_prefix_cache_bytes"] == 64
    assert found["mixtral_compilations_since_ready_total"] == 0
    assert found["tgi_batch_inference_duration_count{method=decode}"] == 3
    assert found["tgi_batch_inference_duration_bucket{le=1.0}{method=decode}"] == 2
    assert found["tgi_batch_inference_count{method=prefill}"] == 2
    assert found["tgi_batch_inference_success{method=decode}"] == 5
    assert found["mixtral_ready"] == 1
    key = "mixtral_http_responses_total{method=other}{route=other}{status=404}"
    assert found[key] == 1


async def test_a_client_makes_no_series_of_its_own(engine):
    async with client_of(engine) as client:
        await client.get("/one")
        before = len(await figures(client))
        for n in range(20):
            await client.request(f"M{n}", f"/path{n}")
            await client.get(f"/v1/models/name{n}")
        assert len(await figures(client)) <= before + 3


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/chat/completions"])
async def test_a_stream_counts_by_its_end(engine, log, path):
    engine.say("Hello, world", fails_after=1)
    body = {"inputs": "Hi", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
    async with client_of(engine) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200
        found = await figures(client)
        assert found["tgi_request_failure{err=generation}"] == 1
        assert found["tgi_request_success"] == 0
        engine.say("Hello, world")
        await client.post(path, json=body)
        assert (await figures(client))["tgi_request_success"] == 1
    failed, fine = log()
    assert (failed["status"], failed["ended"]) == (200, 424)
    assert "ended" not in fine


def test_a_stream_whose_client_leaves_counts_as_a_disconnect(engine, log):
    engine.say("word " * 100, delay=0.05)
    with serving(engine) as port:
        body = json.dumps({"inputs": "Hi"}).encode()
        with connect(port) as connection:
            connection.sendall(post_bytes("/generate_stream", body))
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
        wait_until(log)
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert "tgi_request_success 0.0" in text
    assert re.search(r"^mixtral_\w*disconnect\w* 1.0$", text, re.MULTILINE)
    assert log()[0]["ended"] == "left"


@pytest.fixture
def log():
    stream = io.StringIO()
    names = (logs.NAME, "uvicorn", "uvicorn.error")
    before = [(logging.getLogger(n).handlers, logging.getLogger(n).propagate) for n in names]
    logs.configure(as_json=True, stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    for name, (handlers, propagate) in zip(names, before, strict=True):
        logging.getLogger(name).handlers = handlers
        logging.getLogger(name).propagate = propagate


@pytest.mark.parametrize("log_prompts", [False, True])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_request_is_one_line_without_its_text_unless_asked(engine, log, log_prompts, path):
    engine.say("the secret answer")
    headers = {"x-request-id": "abc"}
    async with client_with(engine, log_prompts=log_prompts) as client:
        body = {"inputs": "my secret question", "zzz": 1}
        answer = await client.post(path, json=body, headers=headers)
        await client.get("/health")  # probes are not logged
    (line,) = log()
    assert answer.headers["x-request-id"] == line["request_id"] == "abc"
    assert (line["path"], line["status"], line["message"]) == (path, 200, "request")
    assert line["prompt_tokens"] == len(V1.encode("my secret question"))
    assert line["generated_tokens"] == len(V1.encode("the secret answer"))
    assert line["finish_reason"] == "eos_token"
    assert line["ignored"] == ["zzz"]
    assert ("secret" in json.dumps(line)) == log_prompts


async def test_plain_lines_are_one_line_each_whatever_a_client_sends(engine):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.PlainLines())
    logger = logging.getLogger(logs.NAME)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        async with client_of(engine) as client:
            await client.get("/a%0aERROR%20forged%1b[31m", headers={"x-request-id": "a b"})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (line,) = stream.getvalue().splitlines()
    assert "\\n" in line
    assert "\x1b" not in line
    assert "request_id=a b" not in line  # no id of ours has a space in it


async def test_spans_of_an_answer(engine):
    engine.say("Hello")
    exporter = InMemorySpanExporter()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with client_with(engine, Tracing(None, "here", exporter)) as client:
        body = {"inputs": "Hi"}
        await client.post("/generate", json=body, headers={"traceparent": parent})
    spans: dict[str, Any] = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"generate", "queue", "prefill", "decode"}
    whole = spans["generate"]
    assert f"{whole.context.trace_id:032x}" == parent.split("-")[1]
    assert f"{whole.parent.span_id:016x}" == parent.split("-")[2]
    assert whole.resource.attributes["service.name"] == "here"
    assert whole.attributes["gen_ai.usage.output_tokens"] == len(V1.encode("Hello"))
    assert spans["queue"].start_time == whole.start_time
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert spans["decode"].end_time == whole.end_time
    seconds = (spans["decode"].end_time - spans["decode"].start_time) / 1e9
    assert seconds == pytest.approx(0.003, abs=1e-6)
    assert "secret" not in str(dict(whole.attributes))


@pytest.mark.parametrize(("port", "warned"), [(4317, True), (4318, False)])
async def test_a_port_of_grpc_is_warned_of(caplog, port, warned):
    Tracing(f"http://localhost:{port}", "here").close()
    assert ("port 4317 takes gRPC" in caplog.text) == warned


async def test_a_bad_traceparent_is_no_fault(engine):
    exporter = InMemorySpanExporter()
    async with client_with(engine, Tracing(None, "here", exporter)) as client:
        headers = {"traceparent": "nonsense"}
        answer = await client.post("/generate", json={"inputs": "Hi"}, headers=headers)
    assert answer.status_code == 200
    assert len(exporter.get_finished_spans()) == 4
