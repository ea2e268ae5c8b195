"""Servers to measure, each in a process of its own: ours, and ``transformers serve``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import httpx
import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by it)
import numpy as np
from _ours import std_of
from safetensors.numpy import save_file
from sentencepiece import SentencePieceProcessor

from mixtral_jax.config import ModelConfig, config_to_dict
from mixtral_jax.convert.names import pieces
from mixtral_jax.model.transformer import leaf_specs

READY_SECONDS = 600
OURS, PEER, PEER_BATCHING = "ours", "transformers serve", "transformers serve --continuous-batching"


def write_folder(folder: Path, config: ModelConfig, dtype: str, tokenizer: Path) -> None:
    """A Hugging Face folder of independent Gaussian weights, with a tokenizer."""
    folder.mkdir(parents=True)
    fields = config_to_dict(config) | {"dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(fields))
    shutil.copy(tokenizer, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False})
    )
    rng, weights = np.random.default_rng(0), {}
    for piece in pieces("original", leaf_specs(config)):
        name, shape = piece.rows.tensor, piece.tensor_shape
        if name in weights:
            continue
        if len(shape) == 1:
            weights[name] = np.ones(shape, dtype)
        else:
            path = "embed_tokens" if "embed_tokens" in name else name
            drawn = rng.standard_normal(shape, np.float32) * np.float32(std_of(path, shape))
            weights[name] = drawn.astype(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def tokenizer_file(given: Path | None) -> Path:
    """``given``, or the real v1 tokenizer that mistral-common carries."""
    if given is not None:
        return given
    return Path(str(files("mistral_common") / "data" / "tokenizer.model.v1"))


def texts(tokenizer: Path, number: int, length: int, seed: int) -> list[str]:
    """Texts of about ``length`` tokens, <s> included, no two alike."""
    model = SentencePieceProcessor(model_file=str(tokenizer))
    words = [
        model.id_to_piece(i)[1:]
        for i in range(model.vocab_size())
        if model.id_to_piece(i).startswith("▁") and model.id_to_piece(i)[1:].isalpha()
    ]
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, length - 1)) for _ in range(number)]


def _free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def _command(kind: str, folder: Path, port: int, dtype: str, flags: Sequence[str]) -> list[str]:
    if kind == OURS:
        ours = [sys.executable, "-m", "mixtral_jax.serve", str(folder), "--port", str(port)]
        return [*ours, "--dtype", dtype, *flags]
    theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    theirs += ["--port", str(port), "--host", "127.0.0.1", "--dtype", dtype, "--device", "auto"]
    return [*theirs, *(["--continuous-batching"] if kind == PEER_BATCHING else []), *flags]


@contextlib.contextmanager
def serving(kind: str, folder: Path, dtype: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """The address of a server that has answered once, while the block runs.

    Raises:
        RuntimeError: it ended, or was not ready in ten minutes; with the last lines of its log.
    """
    port, env = _free_port(), os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        command = _command(kind, folder, port, dtype, flags)
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            until = time.monotonic() + READY_SECONDS
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{kind} is not ready: {log.read()[-2000:]}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
