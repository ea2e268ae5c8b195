"""Two processes load one quantized folder together: the bits on their devices are those of one."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np
import pytest
from flax import nnx

import mixtral_jax as mj
from mixtral_jax.quantize.driver import Calibration, quantize_checkpoint, quantize_gptq
from mixtral_jax.quantize.gptq_recipe import GptqRecipe
from mixtral_jax.quantize.makers import Recipe
from tests.quantize.gptq_text import small_checkpoint, write_text
from tests.sharding.processes import run
from tests.slow import mostly_slow

# Says what each of this process's devices holds, and greedy tokens.
PROCESS = """
import sys, json
import mixtral_jax as mj
from mixtral_jax.sharding import hosts
from tests.quantize.test_hosts import PROMPT, held
def flag(name, cast):
    found = [a.split("=")[1] for a in sys.argv if a.startswith(name + "=")]
    return cast(found[0]) if found else None
mj.join(mj.ProcessOptions(coordinator=flag("--coordinator", str),
        num_processes=flag("--num-processes", int), process_id=flag("--process-id", int)))
lm = mj.load(sys.argv[1], mesh=sys.argv[2], dtype="float32")
shards = held(lm)
(done,) = lm.generate(prompt_token_ids=[PROMPT], max_new_tokens=6, temperature=0, ignore_eos=True)
print(json.dumps([shards, done.token_ids]))
hosts.leave(0)
"""
PROMPT = [1, 7, 300, 41, 12]


def held(lm: mj.LanguageModel) -> dict[str, str]:
    """A digest of every part of a weight on every device of this process."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(lm.model)):
        for shard in leaf.addressable_shards:
            name = f"{jax.tree_util.keystr(path)} {shard.index} {shard.device.id}"
            found[name] = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_config):
    root, found = tmp_path_factory.mktemp("hosts"), {}
    src = small_checkpoint(root / "hf", small_config)

    def make(kind: str):
        if kind not in found:
            found[kind] = root / kind
            if kind == "gptq3":
                path = write_text(root / "text.jsonl", 8, seed=1)
                recipe = GptqRecipe(bits=3, group=32, act_order=True)
                quantize_gptq(src, found[kind], recipe, Calibration(path=path, length=32))
            else:
                quantize_checkpoint(src, found[kind], Recipe(scheme=kind, double_quant=True))
        return found[kind]

    return make


CASES = ["nf4 on 1x2x2", "gptq3 on 1x2x2", "nf4 on 1x4", "gptq3 on 2x2"]


@pytest.mark.parametrize("case", mostly_slow(CASES, ["gptq3 on 1x2x2"]))
def test_two_processes_hold_what_one_does(folders, case):
    """Where matrices are split, nested scales and activation orders are taken out by both."""
    kind, mesh = case.split(" on ")
    folder = folders(kind)
    ended = run(["-c", PROCESS, str(folder), mesh])
    (first, tokens), (second, same) = (json.loads(each.stdout) for each in ended)
    lm = mj.load(folder, mesh=mesh, dtype="float32")
    (done,) = lm.generate(
        prompt_token_ids=[PROMPT], max_new_tokens=6, temperature=0, ignore_eos=True
    )
    assert tokens == same == list(done.token_ids)
    want = held(lm)
    assert not first.keys() & second.keys(), "a device is of one process"
    assert len(first) == len(second) == len(want) // 2
    # Devices are numbered otherwise in several processes; what they hold is the same.
    assert sorted(digest for part in (first, second) for digest in part.values()) == sorted(
        want.values()
    )
    assert {name.rpartition(" ")[0] for name in first | second} == {
        name.rpartition(" ")[0] for name in want
    }
