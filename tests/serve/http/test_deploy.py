"""What lies in deploy/ fits the server: its flags, its routes, its metrics."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtral_jax.serve.auth import read_keys
from tests.serve.http.conftest import client_of
from tests.serve.http.test_options import parsed
from tests.sharding.processes import free_port

DEPLOY = Path(__file__).parents[3] / "deploy"


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def pod(name: str) -> dict[str, Any]:
    (found,) = [m for m in manifests(name) if m["kind"] in ("Deployment", "StatefulSet")]
    return found["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", ["kubernetes-replicas.yaml", "kubernetes-hosts.yaml"])
def test_manifests_start_the_server_and_give_it_time_to_end(name):
    (container,) = pod(name)["containers"]
    args = [arg.replace("$(INDEX)", "1") for arg in container["args"]]
    found = parsed("--host", "0.0.0.0", *args)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert found.http.port == ports["http"]
    assert pod(name)["terminationGracePeriodSeconds"] > found.http.graceful_termination_timeout
    assert any(entry["name"] == "API_KEY" for entry in container["env"])
    if name == "kubernetes-hosts.yaml":
        (headless, state, _) = manifests(name)
        assert state["spec"]["replicas"] == found.processes.num_processes
        assert found.processes.coordinator == f"{state['metadata']['name']}-0.mixtral-hosts:8476"
        assert {port["port"] for port in headless["spec"]["ports"]} == {8476, 8477}
    else:
        assert found.watch.prometheus_port == ports["metrics"]


@pytest.mark.anyio
async def test_probes_ask_for_routes_that_need_no_key(engine):
    (container,) = pod("kubernetes-replicas.yaml")["containers"]
    probes = [probe for name, probe in container.items() if name.endswith("Probe")]
    assert len(probes) == 3
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    paths = {probe["httpGet"]["path"] for probe in probes} | set(re.findall(r"(/health)\\", text))
    async with client_of(engine, keys=(b"k",)) as client:
        for path in paths:
            assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("index", ["0", "1"])
def test_probes_of_many_hosts_ask_process_0_alone(index):
    """Nothing listens here: the probes of process 0 fail, those of the others hold."""
    (container,) = pod("kubernetes-hosts.yaml")["containers"]
    port = next(each["containerPort"] for each in container["ports"] if each["name"] == "http")
    for name, path in (("startup", "health"), ("readiness", "health"), ("liveness", "live")):
        *shell, script = container[f"{name}Probe"]["exec"]["command"]
        assert f"http://127.0.0.1:{port}/{path}'" in script
        command = [*shell, script.replace(str(port), str(free_port()))]
        environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "INDEX": index}
        ended = subprocess.run(command, env=environ, capture_output=True, check=False)
        assert (ended.returncode == 0) == (index != "0")
        if index == "0":
            assert b"ConnectionRefusedError" in ended.stderr


def test_the_container_serves_a_mounted_folder_on_port_80():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])  # type: ignore[index]
    assert entry[:3] == ["python", "-m", "mixtral_jax.serve"]
    environ = dict(re.findall(r"^(?:ENV|   ) +(\w+)=(\S+)", text, re.MULTILINE))
    found = parsed(*entry[3:], **environ)
    assert found.source == "/repository"
    assert found.http.port == 80
    assert "EXPOSE 80" in text
    assert "HEALTHCHECK" in text


def test_the_unit_starts_the_server(tmp_path):
    text = (DEPLOY / "mixtral.service").read_text(encoding="utf-8")
    line = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert line is not None
    words = shlex.split(line[1].replace("${CREDENTIALS_DIRECTORY}", str(tmp_path)))
    (tmp_path / "keys").write_text("k\n")
    found = parsed(*words[3:])
    assert read_keys(found.http, {}) == (b"k",)
    seconds = re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert seconds is not None
    assert int(seconds[1]) > found.http.graceful_termination_timeout


@pytest.mark.anyio
async def test_the_dashboard_asks_for_metrics_that_there_are(engine):
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b((?:tgi|mixtral)_\w+)\{", target["expr"])
    }
    async with client_of(engine) as client:
        await client.post("/generate", json={"inputs": "Hi"})
        await client.post("/generate", json={"inputs": "Hi", "parameters": {"top_k": 0}})
        text = (await client.get("/metrics")).text
    given = set(re.findall(r"^(\w+)[ {]", text, re.MULTILINE))
    assert len(asked) > 15
    assert asked <= given
