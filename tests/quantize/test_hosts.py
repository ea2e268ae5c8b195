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


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x2x2", "1x4", "2x2"])
@pytest.mark.parametrize("kind", ["nf4", "gptq3"])
def test_two_processes_hold_what_one_does(folders, kind, mesh):
    """Where matrices are split, nested scales and activation orders are taken out by both."""
    command = ["-c", PROCESS, str(folders(kind)), mesh]
    # One process under the flags of the two: how XLA is told to compile decides the last bit of
    # scales that are un-nested on the devices.
    (alone,) = run(command, count=1)
    want, tokens = json.loads(alone.stdout)
    (first, ours), (second, theirs) = (json.loads(each.stdout) for each in run(command))
    assert ours == theirs == tokens
    assert not first.keys() & second.keys(), "a device is of one process"
    assert len(first) == len(second) == len(want) // 2
    # Devices are numbered otherwise in several processes; what they hold is the same.
    assert contents(first | second) == contents(want)


def contents(held: dict[str, str]) -> list[tuple[str, str]]:
    """Part, place and digest of all that devices hold, whichever they are."""
    return sorted((name.rpartition(" ")[0], digest) for name, digest in held.items())
