"""Exports for tests, and the loader that was exported with them."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.config import ModelConfig
from mixtral_jax.export.driver import export
from mixtral_jax.export.options import ExportOptions, ExportReport
from mixtral_jax.language_model import LanguageModel
from tests.convert import checkpoints

Prompts = Sequence[Sequence[int]]


def write_checkpoint(folder: Path, config: ModelConfig) -> Path:
    """Random weights, as published."""
    return checkpoints.write(folder, config, checkpoints.random_tensors(config))


def write_export(checkpoint: str | Path, dst: Path, **options: Any) -> ExportReport:
    """Exports for the CPU unless told otherwise, in shapes that compile soon."""
    small: dict[str, Any] = {"platform": "cpu", "context": 64, "prefill_chunk": 16}
    return export(checkpoint, dst, ExportOptions(**(small | options)))


def arguments(prompts: Prompts, **given: Any) -> list[str]:
    """The command line of run.py."""
    ids = [",".join(map(str, prompt)) for prompt in prompts]
    flags = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items())
    return [*ids, *(part for flag in flags for part in flag)]


def parse(out: str) -> list[list[int]]:
    """What run.py printed."""
    return [[int(i) for i in line.split(",")] for line in out.splitlines()]


class Loader:
    """Runs DIR/run.py in this process; it knows nothing of the package, which is here all the same.

    ``test_alone.py`` runs it where the package is not.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.err = ""
        self.names: dict[str, Any] = {}  # the script's variables, after its run

    def __call__(self, folder: Path, prompts: Prompts, **given: Any) -> list[list[int]]:
        script = str(folder / "run.py")
        self._monkeypatch.setattr(sys, "argv", [script, *arguments(prompts, **given)])
        self._capsys.readouterr()
        try:
            self.names = runpy.run_path(script, run_name="__main__")
        finally:
            out, self.err = self._capsys.readouterr()
        return parse(out)


def generated(lm: LanguageModel, prompts: Prompts, **options: Any) -> list[list[int]]:
    """What the package itself writes, which is what ``sample`` prints."""
    completions = lm.generate(prompt_token_ids=prompts, **options)
    assert not any(completion.error for completion in completions)
    return [completion.token_ids for completion in completions]
