"""Many clients at once, good and bad: nothing is lost, mixed up, or kept. Minutes long."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import psutil
import pytest

from tests.serve.http.conftest import client_of
from tests.serve.http.fake import FakeEngine, Script
from tests.serve.http.live import connect, post_bytes, read_all, serving, wait_until
from tests.test_tokenizer import V1

pytestmark = pytest.mark.slow
CHAT = [{"role": "user", "content": "Hi"}]
MOST_GROWTH = 20 * 2**20


def disconnect(engine: FakeEngine, path: str, *, is_stream: bool, number: int = 100) -> None:
    body = {"inputs": "Hi", "messages": CHAT, "stream": is_stream}
    with serving(engine) as port:
        connections = [connect(port) for _ in range(number)]
        for connection in connections:
            connection.sendall(post_bytes(path, json.dumps(body).encode()))
        wait_until(lambda: len(engine.running) == number, seconds=30)
        for connection in connections:
            connection.close()
        wait_until(lambda: not engine.running, seconds=2)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", ["/", "/v1/chat/completions"])
def test_a_hundred_clients_leave_and_all_slots_are_free(path, is_stream):
    engine = FakeEngine(V1)
    engine.say("word " * 400, delay=0.1)
    disconnect(engine, path, is_stream=is_stream)


def test_the_check_of_slots_finds_an_engine_that_does_not_cancel():
    engine = FakeEngine(V1)
    engine.say("word " * 400, delay=0.1)
    engine.release = lambda ticket: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="it did not happen"):
        disconnect(engine, "/", is_stream=True, number=3)


def test_two_hundred_slow_clients_leave_room_for_others():
    engine = FakeEngine(V1)
    engine.say("Hello")
    head = post_bytes("/generate", b'{"inputs": "Hi"}')
    with serving(engine, header_timeout=2.0, body_timeout=2.0) as port:
        slow = [connect(port) for _ in range(200)]
        for number, connection in enumerate(slow):
            connection.sendall(head[: 40 if number % 2 else -5])
        answer = httpx.post(f"http://127.0.0.1:{port}/generate", json={"inputs": "Hi"}, timeout=2)
        assert answer.json() == {"generated_text": " Hello"}
        for connection in slow:
            assert read_all(connection).startswith(b"HTTP/1.1 408")
            connection.close()


def requests(rng: random.Random) -> tuple[str, object, int]:
    """A request and the status it has to get."""
    text = "".join(rng.choice("abc é🎉") for _ in range(rng.randrange(1, 60)))
    most = rng.randrange(1, 20)
    chat = [{"role": "user", "content": text}]
    cases = [
        ("/generate", {"inputs": text, "parameters": {"max_new_tokens": most}}, 200),
        ("/generate_stream", {"inputs": text, "parameters": {"max_new_tokens": most}}, 200),
        ("/v1/chat/completions", {"messages": chat, "max_tokens": most, "n": 2}, 200),
        ("/v1/chat/completions", {"messages": chat, "max_tokens": most, "stream": True}, 200),
        ("/v1/completions", {"prompt": [text, "x"], "max_tokens": most, "logprobs": 2}, 200),
        ("/tokenize", {"inputs": text}, 200),
        ("/generate", {"inputs": text, "parameters": {"top_p": 2}}, 422),
        ("/v1/completions", {"prompt": text, "suffix": "x"}, 400),
        ("/generate", {"inputs": text, "parameters": {"seed": "x", text: 1}}, 422),
    ]
    return rng.choice(cases)


async def serve_many(number: int, seed: int) -> None:
    rng = random.Random(seed)
    engine = FakeEngine(V1, lambda request: Script(token_ids=[*request.prompt_ids[1:], 2] * 40))
    async with client_of(engine) as client:

        async def batch(size: int) -> None:
            asked = [requests(rng) for _ in range(size)]
            answers = await asyncio.gather(*(client.post(p, json=body) for p, body, _ in asked))
            for (path, body, status), answer in zip(asked, answers, strict=True):
                assert answer.status_code == status, (seed, path, body, answer.text)
            engine.tickets.clear()

        for _ in range(8):
            await batch(64)
        before = psutil.Process().memory_info().rss
        for _ in range(number // 64):
            await batch(64)
        grown = psutil.Process().memory_info().rss - before
    assert engine.running == set()
    assert grown <= MOST_GROWTH, f"{grown} bytes more after {number} requests"


def test_ten_thousand_mixed_requests_keep_memory_flat():
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    asyncio.run(serve_many(10_240, seed))
