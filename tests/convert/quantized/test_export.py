"""The published GPTQ folder: our own reader has the same bits, and every key is a published one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from mixtral_jax.convert import convert
from mixtral_jax.convert.quantized.export import Made, export_gptq
from mixtral_jax.errors import BAD_DATA, OUTPUT_EXISTS, MixtralError
from tests.convert.quantized import published
from tests.convert.quantized.published import CASES, publish

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


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_published_folder_comes_back_byte_for_byte(tmp_path, name):
    case = ROUND_TRIPS[name]
    made = publish(case)
    src, is_v2 = made.write(tmp_path / "src"), "checkpoint_format" in case.quantization
    digest = convert(src, tmp_path / "ours").digest
    is_several = "two files" in name
    export_gptq(
        tmp_path / "ours",
        tmp_path / "out",
        is_v2=is_v2,
        made=Made(0.1, True),
        max_shard_bytes=400_000 if is_several else 10**9,
    )
    found = read_all(tmp_path / "out")
    assert found.keys() == made.tensors.keys()
    for key, w in made.tensors.items():
        assert (found[key].dtype, found[key].tobytes()) == (w.dtype, w.tobytes()), key
    assert (tmp_path / "out/model.safetensors.index.json").exists() == is_several
    assert convert(tmp_path / "out", tmp_path / "again").digest == digest
    settings = json.loads((tmp_path / "out/quantize_config.json").read_text())
    assert settings.keys() == PUBLISHED_KEYS | ({"checkpoint_format"} if is_v2 else set())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "gptq", **settings}
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


def test_a_zero_point_of_zero_asks_for_the_second_version(tmp_path):
    src = publish(published.gptq_case(2, 64, sym=False)).write(tmp_path / "src")
    error = refusal(src, tmp_path / "out")
    assert "write gptq_v2" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    export_gptq(src, tmp_path / "out", is_v2=True)


def test_a_plain_checkpoint_and_a_taken_folder_are_refused(tmp_path, original):
    assert "got no quantized weight" in str(refusal(original, tmp_path / "out"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    assert refusal(original, tmp_path / "taken").code == OUTPUT_EXISTS
