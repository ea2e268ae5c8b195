"""A model saved from one mesh is the same, bit for bit, on every other."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.convert import convert, save_model
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.convert.orbax_leaves import OrbaxLeaves
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import OUTPUT_EXISTS, USAGE, MixtralError
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.weights import QTensor
from tests.convert import checkpoints
from tests.convert.test_adapter import pairs, write
from tests.models import random_model
from tests.sharding import processes


def test_saved_on_one_mesh_loads_on_the_others_bit_exact(tmp_path, config, tensors, original):
    saved = mj.load(original, mesh="1x8").save(tmp_path / "saved")
    assert saved == convert(original, tmp_path / "converted").digest
    assert OrbaxLeaves(tmp_path / "saved", leaf_specs(config)).manifest.digest == saved
    want = read_manifest(tmp_path / "converted").leaves
    for mesh in ("2x4", "1x1", "8x1", "2x2x2", "1x8"):
        lm = mj.load(tmp_path / "saved", mesh=mesh)
        again = tmp_path / f"again-{mesh}"
        assert lm.save(again) == saved, mesh
        assert read_manifest(again).leaves == want


SAVING = """
import sys
import mixtral_jax as mj
from mixtral_jax import cli
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.cluster import ProcessOptions
src, dst = sys.argv[1:3]

def main(options):
    hosts.join(options)
    print(mj.load(src, mesh="1x8").save(dst))
    hosts.barrier("saved")
    return 0

sys.exit(cli.run(main, ProcessOptions, "test", sys.argv[3:]))
"""


@pytest.mark.slow
def test_two_processes_save_what_neither_holds_whole(tmp_path, original):
    ended = processes.run(["-c", SAVING, str(original), str(tmp_path / "saved")])
    wanted = convert(original, tmp_path / "converted").digest
    assert [one.stdout.strip() for one in ended] == [wanted] * 2
    assert mj.load(tmp_path / "saved", verify=True).config == mj.load(original).config
    assert read_manifest(tmp_path / "saved").digest == wanted
    assert not list(tmp_path.glob("saved.*"))


def test_one_changed_weight_changes_the_digest(tmp_path, small_config):
    model = random_model(small_config())
    first = save_model(model, tmp_path / "first").digest
    scale = model.norm.weight.get_value()
    model.norm.weight.set_value(scale.at[3].set(np.nextafter(scale[3], np.float32(9))))
    assert save_model(model, tmp_path / "second").digest != first


def test_small_files_go_along_and_the_model_speaks_as_before(tmp_path):
    lm = mj.load("tiny", mesh="1x8")
    lm.save(tmp_path / "saved")
    options, prompts = SamplingOptions(max_new_tokens=4, temperature=0), ["What is 12 + 30?"]
    said = mj.load(tmp_path / "saved", mesh="2x4").generate(prompts, options=options)
    assert said[0].token_ids == lm.generate(prompts, options=options)[0].token_ids


def test_what_exists_is_kept_and_a_failure_leaves_nothing(tmp_path, small_config, monkeypatch):
    model = random_model(small_config())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(MixtralError, match="exists") as caught:
        save_model(model, tmp_path / "out")
    assert caught.value.code == OUTPUT_EXISTS
    monkeypatch.setattr(jax, "device_get", lambda array: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(model, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_plain_are_refused(tmp_path, small_config):
    config = small_config(num_local_experts=4)
    tensors = checkpoints.random_tensors(config)
    base = checkpoints.write(tmp_path / "base", config, tensors)
    adapter = write(tmp_path / "adapter", pairs(tensors, "model.layers.0.self_attn.q_proj"))
    with pytest.raises(MixtralError, match=r"layers\.0\.attention\.q_proj is adapted") as caught:
        mj.load(base, adapter=str(adapter)).save(tmp_path / "out")
    assert caught.value.code == USAGE
    model = random_model(config)
    head = model.lm_head.get_value()
    codes, scales = head.astype("int8"), head[:, :1]
    model.lm_head.set_value(QTensor(codes, scales, "int8", head.dtype))
    with pytest.raises(MixtralError, match="lm_head is quantized"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
