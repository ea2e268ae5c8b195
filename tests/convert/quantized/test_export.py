"""The published GPTQ folder: our own reader has the same bits, and every key is a published one."""

from __future__ import annotations

import fcntl
import json
import re
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from safetensors.numpy import load_file

import mixtral_jax as mj
from mixtral_jax.convert import ConvertOptions, convert, output
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.convert.output import new_folder
from mixtral_jax.convert.quantized.export import Made, export_gptq
from mixtral_jax.errors import BAD_DATA, INTERRUPTED, OUTPUT_EXISTS, USAGE, MixtralError
from mixtral_jax.quantize.driver import quantize_checkpoint
from mixtral_jax.quantize.makers import Recipe
from tests.convert import checkpoints
from tests.convert.quantized import published
from tests.convert.quantized.published import CASES, publish
from tests.slow import mostly_slow

# What quantize_config.json of the published repositories holds, all of it.
PUBLISHED_KEYS = {
    "bits",
    "group_size",
    "damp_percent",
    "desc_act",
    "sym",
    "true_sequential",
    "model_name_or_path",
    "model_file_base_name",
}
# In the order of the published config.json: what reads the same inputs, then expert by expert.
MODULES = [
    ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"],
    ["self_attn.o_proj"],
    *([f"block_sparse_moe.experts.{e}.w{i}" for i in (1, 2, 3)] for e in range(8)),
]
ROUND_TRIPS = {
    "act-order in groups": published.gptq_case(4, 32, order=True),
    "one group": published.gptq_case(4, -1, order=True),
    "3 bits, two files": published.gptq_case(3, 128, order=True),
    "asymmetric": published.gptq_case(2, 64, sym=False, v2=True),
    "8 bits and the head": published.gptq_case(8, 64, has_head=True),
}


def read_all(folder) -> dict[str, np.ndarray]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


KEPT = ["one group", "3 bits, two files", "asymmetric"]


@pytest.mark.parametrize("name", mostly_slow(ROUND_TRIPS, KEPT))
def test_a_published_folder_comes_back_byte_for_byte(tmp_path, name):
    case = ROUND_TRIPS[name]
    made = publish(case)
    src, is_v2 = made.write(tmp_path / "src"), "checkpoint_format" in case.quantization
    digest = convert(src, tmp_path / "ours").digest
    is_several = "two files" in name
    report = export_gptq(
        tmp_path / "ours",
        tmp_path / "out",
        made=Made(0.1, True),
        max_shard_bytes=400_000 if is_several else 10**9,
    )
    assert report.digest == digest
    found = read_all(tmp_path / "out")
    assert (report.tensors, report.bytes) == (len(found), sum(w.nbytes for w in found.values()))
    assert found.keys() == made.tensors.keys()
    for key, w in made.tensors.items():
        assert (found[key].dtype, found[key].tobytes()) == (w.dtype, w.tobytes()), key
    assert (tmp_path / "out/model.safetensors.index.json").exists() == is_several
    assert convert(tmp_path / "out", tmp_path / "again").digest == digest
    settings = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert settings.keys() == PUBLISHED_KEYS | ({"checkpoint_format"} if is_v2 else set())
    config = json.loads((tmp_path / "out/config.json").read_text())
    layer = {"modules_in_block_to_quantize": MODULES}  # in config.json alone
    assert config["quantization_config"] == {"quant_method": "gptq", **settings, **layer}
    wanted = {k: v for k, v in case.quantization.items() if k != "quant_method"}
    # One group has no order, whatever the configuration said that there might be.
    assert settings == wanted | ({"desc_act": False} if name == "one group" else {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "ours", "out", "src"]


def refusal(src, dst, **options) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        export_gptq(src, dst, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ["nf4", "fp8 channel", "int8"])
def test_other_schemes_are_refused(tmp_path, name):
    error = refusal(publish(CASES[name]).write(tmp_path / "src"), tmp_path / "out")
    assert error.code == BAD_DATA
    assert "expected weights in one of gptq2" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_zero_point_of_zero_is_written_as_the_second_version_unless_told(tmp_path):
    src = publish(published.gptq_case(2, 64, sym=False)).write(tmp_path / "src")
    error = refusal(src, tmp_path / "out", is_v2=False)
    assert "write gptq_v2" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    notes: list[str] = []
    export_gptq(src, tmp_path / "out", note=notes.append)
    assert any("gptq_v2" in line for line in notes)
    settings = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert settings["checkpoint_format"] == "gptq_v2"
    assert (
        convert(tmp_path / "out", tmp_path / "again").digest == convert(src, tmp_path / "a").digest
    )


def test_scales_below_float16_are_rounded_and_told(tmp_path, small_config):
    """As of a row that training left near zero; codes were chosen for scales of bfloat16."""
    config = small_config(hidden_size=64, head_dim=16, num_hidden_layers=1, num_local_experts=2)
    tensors = checkpoints.random_tensors(config)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    tensors[name][3] *= np.float32(1e-6)
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    quantize_checkpoint(src, tmp_path / "ours", Recipe(scheme="int4"))
    notes: list[str] = []
    options = ConvertOptions(format="gptq")
    report = convert(tmp_path / "ours", tmp_path / "out", options, note=notes.append)
    (line,) = [line for line in notes if "rounded to float16" in line]
    assert line.startswith("1 of ")
    (worst,) = re.findall(r"at most (\S+) of", line)
    assert 0 < float(worst) < 0.5
    assert report.digest == read_manifest(tmp_path / "ours").digest
    before, after = (
        mj.load(tmp_path / which, mesh="1x1", dtype="float32").logits([[1, 2, 3]])
        for which in ("ours", "out")
    )
    np.testing.assert_allclose(before, after, atol=1e-3)
    tensors[name][3] = np.float32(1e7)
    src = checkpoints.write(tmp_path / "large", config, tensors)
    quantize_checkpoint(src, tmp_path / "q", Recipe(scheme="int4"))
    assert "too large for the float16" in str(refusal(tmp_path / "q", tmp_path / "no"))


KILLED = """
import os, signal, sys
from mixtral_jax.convert.quantized.export import export_gptq
def progress(done, total):
    os.kill(os.getpid(), signal.SIGKILL)
export_gptq(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    src = publish(ROUND_TRIPS["one group"]).write(tmp_path / "src")
    command = [sys.executable, "-c", KILLED, str(src), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("out.*.saving")
    (tmp_path / "out.mine.saving").mkdir()  # no folder that we made
    with new_folder(tmp_path / "out", 1):  # another process at the same: its folder is left alone
        assert not left.exists()
        export_gptq(src, tmp_path / "out")
        assert len(list(tmp_path.glob("out.*.saving"))) == 2
        (tmp_path / "out").rename(tmp_path / "moved")
    assert {path.name for path in tmp_path.iterdir()} == {"src", "out", "moved", "out.mine.saving"}


@pytest.mark.parametrize("moment", ["before it is open", "before it is locked"])
def test_a_folder_taken_away_before_it_is_locked_is_made_again(tmp_path, monkeypatch, moment):
    """Another process at the same DST finds it without a lock: abandoned, as far as it can tell."""
    make, lock, left = tempfile.mkdtemp, fcntl.flock, [1]

    def another_comes():
        if left:
            left.pop()
            output._remove_abandoned(tmp_path / "out")
            assert not list(tmp_path.iterdir())

    def making(**fields):
        found = make(**fields)
        another_comes()
        return found

    def locking(*arguments):
        another_comes()
        return lock(*arguments)

    if moment == "before it is open":
        monkeypatch.setattr(tempfile, "mkdtemp", making)
    else:
        monkeypatch.setattr(fcntl, "flock", locking)
    with new_folder(tmp_path / "out", 1) as work:
        (work / "file").touch()
    assert not left
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["out", "file"]


def test_an_export_that_is_stopped_leaves_nothing(tmp_path):
    src = publish(ROUND_TRIPS["one group"]).write(tmp_path / "src")
    error = refusal(src, tmp_path / "out", stop=lambda: True)
    assert error.code == INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    "fields", [{"dtype": "float32"}, {"adapter": "x"}, {"dequantize": True}, {"verify": True}]
)
def test_options_that_the_layout_has_no_use_for_are_refused(fields):
    with pytest.raises(MixtralError, match="is not for gptq") as caught:
        ConvertOptions(format="gptq", **fields)
    assert caught.value.code == USAGE


def test_a_plain_checkpoint_and_a_taken_folder_are_refused(tmp_path, original):
    assert "got no quantized weight" in str(refusal(original, tmp_path / "out"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    assert refusal(original, tmp_path / "taken").code == OUTPUT_EXISTS
