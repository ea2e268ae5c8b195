"""GPTQ that goes on after a cut: no matrix is of two runs, whatever machine goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.convert import driver
from mixtral_jax.convert.driver import JOURNAL_NAME, OUTPUT_NAME, WORK_SUFFIX
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.convert.orbax_leaves import WEIGHTS
from mixtral_jax.convert.parts import split_path
from mixtral_jax.errors import INTERRUPTED, MixtralError
from mixtral_jax.quantize import gptq_matrices
from mixtral_jax.quantize.driver import Calibration, quantize_gptq
from mixtral_jax.quantize.gptq_leaves import GptqLeaves
from mixtral_jax.quantize.gptq_recipe import GptqRecipe
from tests.quantize.gptq_text import small_checkpoint, write_text

RECIPE = GptqRecipe(bits=4, group=32, act_order=True)
CODES = "layers.0.attention.q_proj.gptq4.codes"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "calibration.jsonl", 20, seed=1)


@pytest.fixture
def small(tmp_path, small_config) -> Path:
    return small_checkpoint(tmp_path / "hf", small_config, num_local_experts=2)


class Machines:
    """Runs on one machine or another, whose sums round otherwise; may stop after a leaf."""

    def __init__(self, monkeypatch, src: Path, text: Path):
        self.patch, self.src = monkeypatch, src
        self.calibration = Calibration(path=text, samples=10, length=64)
        self.notes: list[str] = []

    def run(self, dst: Path, *, other: bool = False, stop_after: str | None = None):
        solve, convert_leaf, done = gptq_matrices.solve, driver._Conversion._convert_leaf, [""]

        def disturbed(w, hessian, **how):
            noise = np.random.default_rng(0).standard_normal(hessian.shape).astype(np.float32)
            return solve(w, hessian * (1 + 1e-4 * (noise + noise.T)), **how)

        def convert(self, output, leaf, following):
            made = convert_leaf(self, output, leaf, following)
            done[0] = leaf
            return made

        with self.patch.context() as patch:
            patch.setattr(driver._Conversion, "_convert_leaf", convert)
            if other:
                patch.setattr(gptq_matrices, "solve", disturbed)
                patch.setattr(GptqLeaves, "machine", {"device": "another", "cpus": 1})
            self.notes.clear()
            return quantize_gptq(
                self.src,
                dst,
                RECIPE,
                self.calibration,
                note=self.notes.append,
                stop=lambda: done[0] == stop_after,
            ).converted

    def interrupt(self, dst: Path, leaf: str, **how) -> None:
        with pytest.raises(MixtralError) as stopped:
            self.run(dst, stop_after=leaf, **how)
        assert stopped.value.code == INTERRUPTED


@pytest.fixture
def machines(monkeypatch, small, text) -> Machines:
    return Machines(monkeypatch, small, text)


def layer_digests(folder: Path, layer: int) -> dict:
    records = read_manifest(folder).leaves
    return {p: r for p, r in records.items() if p.startswith(f"layers.{layer}.") and split_path(p)}


def test_no_part_of_a_layer_is_of_another_run(tmp_path, machines, small_config):
    """Cut after the codes of a weight, before its scales and order."""
    machines.src = small_checkpoint(tmp_path / "1", small_config, num_hidden_layers=1)
    other = machines.run(tmp_path / "other", other=True)
    machines.interrupt(tmp_path / "q", CODES)
    lines = (tmp_path / f"q{WORK_SUFFIX}" / JOURNAL_NAME).read_text().splitlines()
    (codes,) = [entry for entry in map(json.loads, lines) if entry.get("leaf") == CODES]
    whole = read_manifest(tmp_path / "other").leaves[CODES]
    assert tuple(codes["chunks"]) != whole.chunks  # the machines do differ
    assert machines.run(tmp_path / "q", other=True).digest == other.digest
    assert not any("another machine" in line for line in machines.notes)  # nothing of it is left


@pytest.mark.slow
def test_a_layer_of_another_machine_is_kept_whole_and_told(tmp_path, machines):
    machines.run(tmp_path / "one")
    machines.interrupt(tmp_path / "q", "layers.1.attention.q_proj.gptq4.scales")
    machines.run(tmp_path / "q", other=True)
    assert any("another machine (device cpu" in line for line in machines.notes)
    assert layer_digests(tmp_path / "q", 0) == layer_digests(tmp_path / "one", 0)


@pytest.mark.slow
def test_a_damaged_part_has_its_layer_made_again_even_if_that_is_cut_too(tmp_path, machines):
    """Leaf by leaf the second run overwrites the first one's; a third must not take up both."""
    other = machines.run(tmp_path / "other", other=True)
    machines.interrupt(tmp_path / "q", "layers.1.moe.experts.down.gptq4.scales")
    work = tmp_path / f"q{WORK_SUFFIX}" / OUTPUT_NAME / WEIGHTS
    damaged = next(path for path in (work / CODES).rglob("0.0"))
    damaged.write_bytes(bytes(len(damaged.read_bytes())))
    machines.interrupt(tmp_path / "q", CODES, other=True)
    assert any(f"{CODES} is no longer as it was written" in line for line in machines.notes)
    machines.run(tmp_path / "q", other=True)
    assert layer_digests(tmp_path / "q", 0) == layer_digests(tmp_path / "other", 0)
    assert other.digest == read_manifest(tmp_path / "other").digest
