"""Exported programs write the tokens that the package writes."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.config import read_config
from mixtral_jax.convert.hub import EMBEDDED_FOLDER
from mixtral_jax.decode import steps
from mixtral_jax.export.driver import Work
from mixtral_jax.export.options import ExportOptions
from tests.export.exported import generated, write_checkpoint, write_export
from tests.slow import mostly_slow

SEEDED = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
NEW = {"max_new_tokens": 12}


def test_greedy_and_seeded(tiny, exported_tiny, run_py):
    lm, dst = tiny, exported_tiny
    # Three chunks, of which the last is not full, beside a prompt that prefill does not read.
    long = lm.encode("twelve plus thirty is forty-two. What is the capital of Italy? ")[:1]
    long += list(range(300, 338))
    prompts = [long, [1]]
    written = [run_py(dst, prompts, **NEW, **options) for options in ({}, SEEDED)]
    assert written[0] == generated(lm, prompts, **NEW)
    assert written[1] == generated(lm, prompts, **NEW, **SEEDED)
    assert written[0] != written[1]


def test_a_row_ends_at_the_end_of_text_and_its_text_is_shown(tiny, exported_tiny, run_py):
    lm, dst = tiny, exported_tiny
    prompt = lm.encode_chat([{"role": "user", "content": "12+30="}])
    (ids,) = run_py(dst, [prompt], max_new_tokens=30)
    assert (ids[-1], len(ids) < 30) == (lm.config.eos_token_ids[0], True)
    (completion,) = lm.generate(prompt_token_ids=[prompt], max_new_tokens=30)
    assert completion.token_ids == ids
    assert "42" in str(completion.generated_text)
    assert "42" in run_py.err


def test_the_state_is_donated(exported_tiny, run_py):
    run_py(exported_tiny, [[1]], max_new_tokens=1)
    names = run_py.names
    before = names["state"]
    names["decode_step"](names["weights"], before, names["options"])
    # The keys and values are most of the state: two of them at a time would be felt.
    caches = [array for name, array in before.items() if name.startswith("cache.")]
    assert len(caches) > 2
    assert all(array.is_deleted() for array in caches)
    assert not any(array.is_deleted() for array in names["weights"])


def compare(run_py, folder, dst, *, prompts=None, load=None, **options):
    """Exports a checkpoint and compares seeded tokens; gives the plan of the CPU."""
    write_export(folder, dst, **options)
    fields: dict[str, Any] = {"mesh": "1x1"} | (load or {})
    lm = mj.load(folder, **fields)
    prompts = prompts or [[1, 5, 9, 3, 7], [2, 4]]
    written = run_py(dst, prompts, **NEW, **SEEDED)
    assert written == generated(lm, prompts, **NEW, **SEEDED)
    assert len({i for ids in written for i in ids}) > 4  # not one token again and again
    return json.loads((dst / "export.json").read_text())["programs"]["cpu"]


def test_a_ring_is_written_around(tmp_path, small_config, run_py):
    folder = write_checkpoint(tmp_path / "hf", small_config(sliding_window=6, eos_token_ids=(63,)))
    prompts = [list(range(1, 31)), list(range(40, 50))]
    plan = compare(run_py, folder, tmp_path / "dst", prompts=prompts, prefill_chunk=4)
    assert plan["slots"] == 6 + 4 - 1 < len(prompts[0])
    assert plan["max_tokens"] == 128


@pytest.mark.parametrize("scheme", mostly_slow(["int8", "fp8", "int4", "nf4"], ["int8"]))
def test_quantized(tmp_path, small_config, run_py, scheme):
    config = small_config(hidden_size=64, head_dim=16, num_hidden_layers=1, num_local_experts=4)
    folder = write_checkpoint(tmp_path / "hf", config)
    plan = compare(run_py, folder, tmp_path / "dst", quantize=scheme, load={"quantize": scheme})
    codes = [w for w in plan["weights"] if w["tensor"].endswith(f"gate.{scheme}.codes")]
    assert len(codes) == config.num_hidden_layers
    assert plan["sha256"].keys() == {"model.safetensors", *plan["files"]}


def test_a_mesh(tmp_path, small_config, run_py):
    folder = write_checkpoint(
        tmp_path / "hf", small_config(num_hidden_layers=1, num_local_experts=16)
    )
    plan = compare(run_py, folder, tmp_path / "dst", mesh="1x8", load={"mesh": "1x8"})
    slots = [w["rows"] for w in plan["weights"] if w["tensor"] == "layers.0.moe.experts.gate"]
    assert slots == [[[e, e + 1] for e in range(i, 16, 2)] for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("load", [{"dtype": "bfloat16"}, {"kv_dtype": "int8"}, {"kv_dtype": "fp8"}])
def test_dtypes(tmp_path, small_config, run_py, load):
    folder = write_checkpoint(tmp_path / "hf", small_config())
    compare(run_py, folder, tmp_path / "dst", load=load, **load)


@pytest.mark.slow
def test_a_quantized_checkpoint_on_a_mesh_that_splits_experts(tmp_path, small_config, run_py):
    config = small_config(num_local_experts=4, intermediate_size=64)
    folder = write_checkpoint(tmp_path / "hf", config)
    plan = compare(run_py, folder, tmp_path / "dst", mesh="1x8", load={"mesh": "1x8"})
    assert (plan["mesh_shape"], plan["mesh_axes"]) == ([1, 4, 2], ["data", "expert", "tensor"])


def test_the_state_begins_as_the_package_has_it():
    options = ExportOptions(platform="cpu", context=64, kv_dtype="int8")
    work = Work("tiny", EMBEDDED_FOLDER, options, lambda line: None)
    work.leaves.close()
    programs = work.programs
    made = steps.empty_state(
        read_config(EMBEDDED_FOLDER),
        np.zeros(work.sizes.rows, np.int32),
        np.zeros(work.sizes.rows, np.bool_),
        slots=work.sizes.slots,
        dtype=programs.cache_dtype,
        placement=programs.placement,
    )
    leaves = jax.tree.leaves(made)
    assert len(leaves) == len(programs.state)
    for (name, argument), leaf in zip(programs.state.items(), leaves, strict=True):
        filled = np.full(argument.shape.shape, argument.value, argument.shape.dtype)
        np.testing.assert_array_equal(filled, leaf, err_msg=name)
