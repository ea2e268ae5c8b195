"""Every layout in says what transformers says of the same weights; it loads all that goes out."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import mixtral_jax as mj
from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.errors import MixtralError
from tests.convert import checkpoints, native
from tests.parity.test_transformers import build

pytestmark = pytest.mark.parity

F32 = 1e-4
LAYOUTS = ("original", "fused", "native", "native_stacked")


@pytest.fixture(scope="module")
def model(torch, transformers):
    return build(torch, transformers, {"num_hidden_layers": 2})


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def write(layout: str, folder: Path, saved: Path) -> Path:
    """The saved weights in another layout, by the writers of tests/convert."""
    config = mj.load(saved).config
    tensors = load_file(saved / "model.safetensors")
    if layout in ("native", "native_stacked"):
        return native.write_layout(layout, folder, config, tensors, num_files=2)
    written = tensors if layout == "original" else checkpoints.fused(tensors, config)
    return checkpoints.write(folder, config, written)


def test_logits_of_every_layout(torch, model, saved, tmp_path):
    tokens = np.random.default_rng(0).integers(3, 128, (2, 64))
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    for layout in LAYOUTS:
        src = write(layout, tmp_path / layout, saved)
        convert(src, tmp_path / f"{layout}.out")
        for folder in (src, tmp_path / f"{layout}.out"):
            got = mj.load(folder, mesh="1x1").logits(tokens.tolist())
            np.testing.assert_allclose(got, want, atol=F32, err_msg=str(folder))
    config = mj.load(saved).config
    wrong = native.per_expert(load_file(saved / "model.safetensors"), config)
    for name in [name for name in wrong if ".attention.wq." in name]:
        wrong[name] = native.interleaved(wrong[name], config.num_attention_heads)
    params = native.params_of_mistral_inference(config)
    folder = native.write(tmp_path / "wrong", params, wrong)
    assert np.abs(mj.load(folder, mesh="1x1").logits(tokens.tolist()) - want).max() > 100 * F32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [None, "60KB"])
def test_transformers_loads_what_we_export(torch, transformers, saved, tmp_path, dtype, size):
    model = transformers.MixtralForCausalLM.from_pretrained(saved, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    options = ConvertOptions(format="safetensors", max_shard_size=size)
    convert(tmp_path / "ours", tmp_path / "back", options)
    assert (len(list((tmp_path / "back").glob("*.safetensors"))) == 1) == (size is None)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == getattr(torch, dtype)
    want, got = model.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    for name in want:
        assert torch.equal(want[name], got[name]), name


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "consolidated.00.pth"])
def test_the_fix_for_pickles_works_as_printed(torch, model, saved, tmp_path, kind):
    config = mj.load(saved).config
    folder = tmp_path / "it's pickled"
    folder.mkdir()
    if kind == "pytorch_model.bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / kind)
    else:
        native.write_layout("native", folder, config, load_file(saved / "model.safetensors"))
        (folder / "consolidated.safetensors").rename(tmp_path / "kept.safetensors")
        tensors = load_file(tmp_path / "kept.safetensors")
        parts = [dict(list(tensors.items())[k::2]) for k in range(2)]
        for k, part in enumerate(parts):
            path = folder / f"consolidated.{k:02}.pth"
            torch.save({name: torch.from_numpy(w) for name, w in part.items()}, path)
    with pytest.raises(MixtralError) as caught:
        convert(folder, tmp_path / "out")
    fix = re.search(r"resave as safetensors: (python -c .*)$", str(caught.value))
    assert fix is not None
    command = [sys.executable, *shlex.split(fix[1])[1:]]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    resaved = tmp_path / "NEW_FOLDER" if kind == "pytorch_model.bin" else folder
    digest = convert(resaved, tmp_path / "out").digest
    assert digest == convert(saved, tmp_path / "want").digest
