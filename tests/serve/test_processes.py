"""Two processes serve one model: rank 0 answers, the other follows; a lost one is named."""

from __future__ import annotations

import json
import signal
import sys
import time

import httpx
import pytest

from mixtral_jax.errors import PEER_LOST
from tests.serve.http.live import wait_until
from tests.sharding.processes import finish, free_port, start

SERVE = """
import sys, json, time, random
import mixtral_jax as mj
from mixtral_jax.sharding import hosts
from mixtral_jax.serve.engine import Engine
from mixtral_jax.serve.limits import EngineOptions, plan_limits
from mixtral_jax.serve.follow import follow
from mixtral_jax.serve.request import ServeRequest, ServeSampling
how, mesh, *flags = sys.argv[1:]
def flag(name, cast):
    found = [a.split("=")[1] for a in flags if a.startswith(name + "=")]
    return cast(found[0]) if found else None
mj.join(mj.ProcessOptions(
    coordinator=flag("--coordinator", str), process_id=flag("--process-id", int),
    num_processes=flag("--num-processes", int), peer_timeout=flag("--peer-timeout", float) or 10,
))
lm = mj.load(mesh=mesh)
options = EngineOptions(max_total_tokens=128, prefill_chunk=16, max_batch_size=4)
if not hosts.is_first():
    follow(lm, plan_limits(lm, options)[1])
    hosts.leave(0)
    sys.exit()
engine = Engine(lm, options)
engine.start(wait=True)
print("ready", flush=True)
rng, asked = random.Random(1), []
for i in range(6):
    ids = tuple(rng.randrange(3, 2000) for _ in range(rng.randint(1, 60)))
    sampling = ServeSampling(max_new_tokens=12, temperature=(i % 2) * 1.0, seed=i,
                             top_logprobs=i % 3, prompt_logprobs=i == 4)
    asked.append(ServeRequest(prompt_ids=ids, sampling=sampling))
while True:
    tickets = [engine.submit(each) for each in asked]
    tokens = [list(t.iterate())[-1].token_ids for t in tickets]
    if how == "once":
        break
assert engine.stats().counters["compilations_since_ready"] == 0
print(json.dumps(tokens), flush=True)
engine.close()
hosts.leave(0)
"""


@pytest.mark.slow
def test_two_processes_answer_as_one():
    alone = finish(start(["-c", SERVE, "once", "1x1"], count=1), seconds=500)[0]
    assert alone.code == 0, alone.stderr
    ended = finish(start(["-c", SERVE, "once", "1x8"]), seconds=500)
    for process in ended:
        assert process.code == 0, process.stderr
    assert ended[1].stdout == ""
    answers = [json.loads(p.stdout.splitlines()[-1]) for p in (alone, ended[0])]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 6


@pytest.mark.slow
def test_the_command_serves_with_two_processes_and_all_end_well_together():
    port = free_port()
    arguments = ["-m", "mixtral_jax.serve", "--mesh", "1x8", "--port", str(port)]
    arguments += ["--max-total-tokens", "128", "--json-output"]
    processes = start(arguments)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            wait_until(lambda: _is_ready(client), seconds=400)
            body = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 8}
            answer = client.post("/v1/chat/completions", json=body | {"temperature": 0}).json()
        assert answer["choices"][0]["message"]["content"] == "42"
        for process in processes[::-1]:  # as a cluster does: all of a group at once
            process.send_signal(signal.SIGTERM)
    finally:
        ended = finish(processes, seconds=60 if sys.exc_info()[0] is None else 1)
    for process in ended:
        assert process.code == 0, process.stderr


def _is_ready(client: httpx.Client) -> bool:
    time.sleep(1)  # each call writes a line, and nobody reads them until the end
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_a_killed_follower_ends_the_server():
    first, other = processes = start(["-c", SERVE, "forever", "1x8"])
    try:
        while (line := first.stdout.readline()) and "ready" not in line:
            pass
        other.send_signal(signal.SIGKILL)
    finally:
        ended = finish(processes, seconds=60 if sys.exc_info()[0] is None else 1)
    assert ended[0].code == PEER_LOST, ended[0].stderr
    assert "process 1" in ended[0].stderr
    assert "gone" in ended[0].stderr
