"""The command: platforms that share weights, what is refused, nothing left half done."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixtral_jax import cli
from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.errors import (
    BAD_CONFIG,
    BAD_DATA,
    INPUT_NOT_FOUND,
    INTERRUPTED,
    OK,
    OUTPUT_EXISTS,
    USAGE,
    MixtralError,
)
from mixtral_jax.export.__main__ import Options, main
from mixtral_jax.export.driver import export
from mixtral_jax.export.options import ExportOptions
from mixtral_jax.export.weights import Form, WeightFiles
from tests.export.exported import write_checkpoint, write_export

TRITON = "__gpu$xla.gpu.triton"


def run(*arguments: object) -> int:
    return cli.run(main, Options, "python -m mixtral_jax.export", list(map(str, arguments)))


@pytest.fixture(scope="module")
def hf(tmp_path_factory, small_config) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("export") / "hf", small_config(num_hidden_layers=1)
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory, hf) -> Path:
    """Programs for the CPU; copy it to change it."""
    dst = tmp_path_factory.mktemp("export") / "dst"
    write_export(hf, dst)
    return dst


@pytest.fixture
def dst(tmp_path, exported) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "dst"))


def about(dst: Path) -> dict[str, Any]:
    return json.loads((dst / "export.json").read_text())


def test_further_platforms_join_the_weights(hf, dst, capfd):
    before = {p.name: p.read_bytes() for p in dst.iterdir() if p.name != "export.json"}
    for platform in ("cuda", "tpu"):
        assert run(hf, dst, "--platform", platform, "--json") == OK
    out, err = capfd.readouterr()
    reports = [json.loads(line) for line in out.splitlines()]
    assert [report["kernels"] for report in reports] == ["gpu", "tpu"]
    assert f"run them with jax {jax.__version__}, or export with --kernels tpu" in err
    assert err.count("note: ") == 1
    assert all((dst / name).read_bytes() == content for name, content in before.items())
    plans = about(dst)["programs"]
    assert {plan["platform"] for plan in plans.values()} == {"cpu", "cuda", "tpu"}
    assert plans.keys() == {"cpu", "gpu", "tpu"}  # as jax.default_backend() says
    assert [plan["unstable_custom_calls"] for plan in plans.values()] == [[], [TRITON], []]
    for plan in plans.values():
        for name in plan["files"]:
            program = jax.export.deserialize(bytearray((dst / name).read_bytes()))
            assert program.platforms == (plan["platform"],)
            assert len(program.in_avals) > len(plan["weights"])
            shapes = [(list(a.shape), a.dtype.name) for a in program.in_avals]
            weights = [(w["shape"], w["dtype"]) for w in plan["weights"]]
            assert shapes[: len(weights)] == weights
    # Experts lie in slots on the CPU, in stacks elsewhere; of the same tensors.
    tensors = load_file(dst / "model.safetensors")
    assert all({w["tensor"] for w in plan["weights"]} == tensors.keys() for plan in plans.values())
    assert len(plans["cpu"]["weights"]) > len(plans["gpu"]["weights"]) == len(tensors)


def test_plain_xla_for_cuda_calls_nothing_unstable(hf, tmp_path, capfd):
    options = ("--platform", "cuda", "--kernels", "tpu", "--dtype", "bfloat16")
    assert run(hf, tmp_path / "dst", *options) == OK
    out, err = capfd.readouterr()
    assert "cuda, kernels tpu, mesh 1x1" in out
    assert err == ""
    plan = about(tmp_path / "dst")["programs"]["gpu"]
    assert plan["unstable_custom_calls"] == []
    assert TRITON.encode() not in (tmp_path / "dst" / "decode_step.cuda.bin").read_bytes()


def test_the_digest_is_that_of_convert(hf, tmp_path, exported):
    convert(hf, tmp_path / "orbax", ConvertOptions())
    assert about(exported)["weights"]["digest"] == read_manifest(tmp_path / "orbax").digest
    write_export(tmp_path / "orbax", tmp_path / "dst")
    assert about(exported)["weights"] == about(tmp_path / "dst")["weights"]


def test_weights_in_several_files(tmp_path):
    values = {
        name: np.arange(size, dtype=dtype)
        for name, size, dtype in (("a", 3, "int8"), ("b", 5, "float32"), ("c", 2, "float32"))
    }
    files = WeightFiles({n: Form(v.shape, v.dtype) for n, v in values.items()}, max_file_bytes=23)
    files.write(tmp_path, iter(values.items()))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names
    read = {k: v for name in names for k, v in load_file(tmp_path / name).items()}
    assert read.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], value)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), USAGE, "--platform"),
        (("--platform", "rocm"), USAGE, "platform"),
        (("--platform", "cpu", "--rows", "0"), USAGE, "--rows: expected at least 1, got 0"),
        (("--platform", "cpu", "--context", "129"), USAGE, "at most 128"),
        (("--platform", "cpu", "--mesh", "8"), USAGE, "--mesh 1x8"),
        (("--platform", "cpu", "--mesh", "1x3"), BAD_CONFIG, "--mesh 1x8"),
        (("--platform", "cpu", "--mesh", "1x1x2", "--quantize", "int8"), BAD_CONFIG, "tensor axis"),
    ],
)
def test_what_is_refused_in_one_line(hf, tmp_path, capfd, arguments, code, words):
    assert run(hf, tmp_path / "dst", *arguments) == code
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "dst").exists()


def test_folders_that_are_refused(hf, tmp_path, dst, capfd):
    cpu = ("--platform", "cpu", "--context", "64")
    assert run(tmp_path / "none", tmp_path / "new", *cpu) == INPUT_NOT_FOUND
    assert run(hf, hf, *cpu) == OUTPUT_EXISTS
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert run(hf, tmp_path / "other", *cpu) == OUTPUT_EXISTS
    assert run(hf, dst, *cpu) == OUTPUT_EXISTS
    assert "--overwrite" in capfd.readouterr().err
    assert run(hf, dst, "--platform", "tpu", "--sliding-window", "8") == OUTPUT_EXISTS
    assert run(hf, dst, "--platform", "tpu", "--dtype", "bfloat16") == OUTPUT_EXISTS
    assert run(hf, dst, "--platform", "tpu", "--quantize", "int8") == OUTPUT_EXISTS
    weights = dst / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "norm.weight": tensors["norm.weight"] + 1}, weights)
    assert run(hf, dst, "--platform", "tpu") == BAD_DATA
    told = capfd.readouterr().err.splitlines()
    # Of --quantize the notes too: what would be in how many bits.
    errors = [line for line in told if not line.startswith("note: ")]
    assert len(errors) == 4
    assert all(line.startswith("error: ") for line in errors)
    assert "'sliding_window': None" in errors[0]
    assert about(dst)["programs"].keys() == {"cpu"}


@pytest.mark.parametrize("text", ['{"version": 1}', '{"version": 1, "programs": {}}'])
def test_a_damaged_record_is_refused(hf, tmp_path, dst, capfd, text):
    (dst / "export.json").write_text(text)
    assert run(hf, dst, "--platform", "cpu") == BAD_DATA
    assert "export.json lacks " in capfd.readouterr().err


def files_are_whole(dst: Path) -> bool:
    plan = about(dst)["programs"]["cpu"]
    return all(
        hashlib.sha256((dst / name).read_bytes()).hexdigest() == digest
        for name, digest in plan["sha256"].items()
    )


def test_programs_are_replaced_where_that_is_asked_for(hf, dst):
    for rows in (4, 2):
        report = write_export(hf, dst, rows=rows - 1, overwrite=True)
        assert about(dst)["programs"]["cpu"]["rows"] == rows
        assert files_are_whole(dst)
        programs = {path.name for path in dst.iterdir() if path.suffix == ".bin"}
        assert programs == {*report.program_bytes} == {*about(dst)["programs"]["cpu"]["files"]}
        assert {*about(dst)["sha256"]} == {p.name for p in dst.iterdir()} - {"export.json"}


def test_a_killed_replacement_leaves_programs_that_run(hf, dst, monkeypatch):
    """Killed between two files: export.json still names the old ones, which are all there."""
    before, replace, done = about(dst), os.replace, list[Path]()

    def killed(source: Path, target: Path) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_export(hf, dst, rows=3, overwrite=True)
    assert len(done) == 2
    assert about(dst) == before
    assert files_are_whole(dst)


def test_kernels_of_another_platform_are_told(hf, tmp_path, capfd):
    assert run(hf, tmp_path / "dst", "--platform", "cuda", "--kernels", "visit") == OK
    told = "note: kernels visit are not those of cuda: they may be slow there, or not compile"
    assert told in capfd.readouterr().err


def test_weights_that_are_not_finite_are_refused(hf, tmp_path, capfd):
    copy = shutil.copytree(hf, tmp_path / "hf")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, copy / "model.safetensors")
    assert run(copy, tmp_path / "dst", "--platform", "tpu") == BAD_DATA
    assert "norm.weight has NaN" in capfd.readouterr().err
    assert os.listdir(tmp_path) == ["hf"]


def test_without_flatbuffers(hf, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(hf, tmp_path / "dst", "--platform", "cpu") == BAD_CONFIG
    assert "pip install 'mixtral-jax[export]'" in capfd.readouterr().err


@pytest.mark.parametrize("is_addition", [False, True])
def test_a_stopped_export_leaves_all_as_it_was(hf, tmp_path, dst, is_addition):
    target = dst if is_addition else tmp_path / "new"
    before = {p.name: p.read_bytes() for p in dst.iterdir()}
    asked = iter([False, True])
    with pytest.raises(MixtralError) as stopped:
        export(hf, target, ExportOptions(platform="tpu", context=64), stop=lambda: next(asked))
    assert stopped.value.code == INTERRUPTED
    assert os.listdir(tmp_path) == ["dst"]
    assert {p.name: p.read_bytes() for p in dst.iterdir()} == before
