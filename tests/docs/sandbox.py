"""A folder in which the commands of the documentation run: small things by the names it uses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from examples.tiny import data
from mixtral_jax.__main__ import main
from mixtral_jax.language_model import EMBEDDED_FOLDER
from tests.docs.blocks import ROOT, call_of
from tests.environ import without_devices

READY_SECONDS = 900.0  # of eight devices on two busy cores
END_SECONDS = 180.0
_FOLDERS = ("Mixtral-8x7B-Instruct-v0.1", "SRC", "MODEL", "CHECKPOINT", "base")


class Sandbox:
    """Makes what commands read, when they first name it, and keeps it for the next block."""

    def __init__(self, folder: Path):
        self._kept = folder
        quantize = ("quantize", "tiny", "{}", "--scheme", "int4", "--group-size", "128")
        gptq = ("convert", "{OURS}", "{}", "--format", "gptq")
        self._makers: dict[str, Callable[[Path], object]] = {
            **dict.fromkeys(_FOLDERS, lambda at: shutil.copytree(EMBEDDED_FOLDER, at)),
            **dict.fromkeys(("mixtral-orbax", "tuned"), self._by("convert", "tiny", "{}")),
            "OURS": self._by(*quantize),
            **dict.fromkeys(("Mixtral-8x7B-Instruct-v0.1-GPTQ", "QUANTIZED"), self._by(*gptq)),
            "lora": _adapter,
            "small": _untrained,
            "FOLDER": _data,
            "text.jsonl": self._few,
            "chat.jsonl": _chats,
            "ultrachat_200k": lambda at: _chats(at / "data" / "train_sft-00000.jsonl"),
            "pairs": lambda at: _pairs(at / "pairs.jsonl"),
            "examples": lambda at: shutil.copytree(
                ROOT / "examples", at, ignore=shutil.ignore_patterns("__pycache__")
            ),
        }
        files = {"questions.jsonl": "questions.jsonl", "text.txt": "text.txt"}
        files |= {"wiki.test.raw": "text.txt", "other.jsonl": "calibration.jsonl"}
        files |= {"de.txt": "text.txt", "code.txt": "text.txt"}
        for name, source in files.items():
            self._makers[name] = lambda at, source=source: shutil.copy(
                self.kept("FOLDER") / source, at
            )

    def _by(self, *words: str) -> Callable[[Path], object]:
        def make(at: Path) -> None:
            filled = [
                w.replace("{OURS}", str(self.kept("OURS"))) if "{O" in w else w for w in words
            ]
            code = in_process([word.replace("{}", str(at)) for word in filled])
            assert code == 0, words

        return make

    def _few(self, at: Path) -> None:
        """Sixteen documents: training takes two updates for an epoch of them."""
        lines = (self.kept("FOLDER") / "calibration.jsonl").read_text("utf-8").splitlines(True)
        at.write_text("".join(lines[:16]), encoding="utf-8")

    def kept(self, name: str) -> Path:
        """Where it lies; made now if it was not yet."""
        path = self._kept / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if name in ("ultrachat_200k", "pairs"):
                path.mkdir()
            self._makers[name](path)
        return path

    def lay(self, words: Sequence[str], made: set[str]) -> None:
        """Puts what the words name into the present folder, but for what the block makes itself."""
        for word in words:
            name = word.split("/")[0]
            if name in self._makers and name not in made and not Path(name).exists():
                Path(name).symlink_to(self.kept(name))


def outputs(verb: str, words: Sequence[str]) -> list[str]:
    """The folder that a command makes."""
    if verb in ("convert", "quantize", "export"):
        return [words[1].rstrip("/")]
    if verb == "finetune" and "--output-dir" in words:
        return [words[words.index("--output-dir") + 1].rstrip("/")]
    return []


def in_process(words: Sequence[str]) -> int | str | None:
    """A verb with its options, in this process: what was compiled once serves the next."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code


def run_block(commands: Sequence[str], sandbox: Sandbox, capfd: pytest.CaptureFixture[str]) -> str:
    """Runs a block in the present folder, one command after another.

    Returns:
        What the commands printed on stdout.

    Raises:
        AssertionError: a command that failed, or of a kind that no test can run.
    """
    made: set[str] = set()
    printed, port = "", None
    with contextlib.ExitStack() as stack:
        for command in commands:
            if command.startswith("curl "):
                port = stack.enter_context(serving([], {})) if port is None else port
                printed += _curl(command, port)
            else:
                printed += _run(command, sandbox, made, capfd)
    return printed


def _curl(command: str, port: int) -> str:
    words = shlex.split(command.replace("localhost:3000", f"127.0.0.1:{port}"), comments=True)
    done = subprocess.run([*words, "--fail", "--silent"], check=False, capture_output=True)
    assert done.returncode == 0, command
    return done.stdout.decode()


def _run(
    command: str,
    sandbox: Sandbox,
    made: set[str],
    capfd: pytest.CaptureFixture[str],
) -> str:
    assignments, words = [], shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        assignments.append(words.pop(0).split("=", 1))
    call = call_of(shlex.join(words), "")
    if call is not None:
        target, rest = call.target, list(call.words)
        for name in outputs(target, rest):
            if target != "export" or name not in made:  # whose second platform joins the first
                _remove(Path(name))
            made.add(name)
        sandbox.lay(rest, made)
        if target == "serve":
            with serving(rest, dict(assignments)):
                return ""
        capfd.readouterr()
        # plan simulates devices of its own, before JAX starts.
        is_apart = call.is_script or target in ("finetune", "plan")
        code = _apart(target, rest) if is_apart else in_process([target, *rest])
        out, err = capfd.readouterr()
        assert code in (0, None), f"{command}\n{err[-2000:]}"
        return out
    if words[0] == "python" and words[1].split("/")[0] in made:  # a script that the block made
        done = subprocess.run(
            [sys.executable, *words[1:]], env=without_devices(), check=False, capture_output=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr.decode()[-2000:]}"
        return done.stdout.decode()
    assert is_of_the_house(words), f"no test runs this, so it needs a mark: {command}"
    return ""


def _remove(path: Path) -> None:
    """What lies there, if anything; of a link, the link alone: other blocks read what is behind."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def is_of_the_house(words: Sequence[str]) -> bool:
    """What CI itself runs (make, its scripts), or prepares: seen to exist, and not run again."""
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        targets = [word for word in words[1:] if "=" not in word]
        return all(re.search(rf"^{each}:", makefile, flags=re.MULTILINE) for each in targets)
    if words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        optional = project["optional-dependencies"]
        known = {".", project["name"], *map(_name, project["dependencies"])}
        known |= {_name(each) for extra in optional.values() for each in extra}
        asked = [word for word in words[2:] if not word.startswith("-")]
        found = [re.search(r"\[(.*)\]", word) for word in asked]
        extras = {extra for each in found if each for extra in each[1].split(",")}
        return extras <= {*optional} and {*map(_name, asked)} <= known
    if words[0] == ".ci/run" or words[0].startswith(".venv/bin/"):
        paths = [word for word in words if word.startswith(("tests/", ".ci/", "docs/"))]
        return all((ROOT / path).exists() for path in paths)
    return False


def _name(requirement: str) -> str:
    """Of a package, without its extras and versions."""
    return re.split(r"[\[<>=~; ]", requirement)[0]


def _apart(target: str, words: Sequence[str]) -> int:
    """A script; or a verb on one device, as a CPU is to users: for eight, updates compile long."""
    if target.endswith(".py"):
        argv = [str(ROOT / target)]
    else:
        argv = ["-m", target if target.startswith("examples.") else f"mixtral_jax.{target}"]
    environment = without_devices() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv, *words], env=environment, check=False).returncode


@contextlib.contextmanager
def serving(words: Sequence[str], environ: dict[str, str]) -> Iterator[int]:
    """The port of a server that was started with these words, is ready, and ends well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = list(words)
    if "--port" in kept:
        kept[kept.index("--port") + 1] = str(port)
    else:
        kept += ["--port", str(port)]
    environment = without_devices() | {"PYTHONPATH": str(ROOT)} | environ
    argv = [sys.executable, "-m", "mixtral_jax", "serve", *kept]
    with open("serve.log", "w+", encoding="utf-8") as log:
        server = subprocess.Popen(argv, env=environment, stdout=log, stderr=log)
        try:
            _await_ready(server, port, log)
            yield port
            server.send_signal(signal.SIGTERM)
            assert server.wait(END_SECONDS) == 0
        finally:
            server.kill()
            server.wait()


def _await_ready(server: subprocess.Popen, port: int, log: io.TextIOBase) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        if server.poll() is not None:
            break
        time.sleep(0.5)
    log.seek(0)
    raise AssertionError(f"the server is not ready: {log.read()[-2000:]}")


def _adapter(at: Path) -> None:
    """Factors of rank 2 on one matrix of each layer, as PEFT writes them."""
    at.mkdir()
    asked = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (at / "adapter_config.json").write_text(json.dumps(asked), encoding="utf-8")
    config = json.loads((EMBEDDED_FOLDER / "config.json").read_text("utf-8"))
    size, rng = config["hidden_size"], np.random.default_rng(0)
    factors: dict[str, np.ndarray] = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        factors[f"{name}.lora_A.weight"] = rng.standard_normal((2, size)).astype(np.float32)
        factors[f"{name}.lora_B.weight"] = rng.standard_normal((size, 2)).astype(np.float32) / 10
    save_file(factors, at / "adapter_model.safetensors")


def _untrained(at: Path) -> None:
    """A config and a tokenizer, without weights."""
    at.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(EMBEDDED_FOLDER / name, at)


def _data(at: Path) -> None:
    data.main(data.Options(folder=at, per_family=1, lines=80, conversations=40))


def _lines(at: Path, rows: Sequence[object]) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _chats(at: Path) -> None:
    chats = [[_turn("user", f"What is {k} + 1?"), _turn("assistant", f"{k + 1}")] for k in range(8)]
    _lines(at, [{"messages": chat} for chat in chats])


def _pairs(at: Path) -> None:
    pairs = [(f"What is {k} + 1?", str(k + 1), "Who knows?") for k in range(8)]
    _lines(at, [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])


def inside(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Work in that folder."""
    os.makedirs(folder, exist_ok=True)
    return contextlib.chdir(folder)
