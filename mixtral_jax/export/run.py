"""Generates with the exported programs beside this file; needs jax, flatbuffers and safetensors.

    python run.py 1,2,3 1,733,16289 --max-new-tokens 64 --temperature 0.7 --top-p 0.95 --seed 0

Prints the new token ids of each prompt in a line of its own, and on stderr the list of their texts
where sentencepiece is installed. Temperature 0 is greedy. What the programs take is in export.json:
weights, then the state, which is donated and given back, then tokens and how many of them are real
(prefill), or options (decode_step).
"""

import argparse
import hashlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.export
import numpy as np
from safetensors import safe_open

here = Path(__file__).resolve().parent
programs = json.loads((here / "export.json").read_text())["programs"]
none = f"error: no programs for {jax.default_backend()}, only for {', '.join(programs)}"
plan = programs.get(jax.default_backend()) or sys.exit(f"{none}; fix: export them")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompts", nargs="+", type=lambda ids: [int(i) for i in ids.split(",") if ids])
for name, value in {"max-new-tokens": 64, "temperature": 0.0, "top-p": 1.0, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=type(value), default=value)
asked = vars(parser.parse_args())
prompts = asked.pop("prompts")
longest = max(map(len, prompts)) + asked["max_new_tokens"]
is_known = {i for ids in prompts for i in ids} <= {*range(plan["vocab_size"])}
if not is_known or not all(prompts) or len(prompts) > plan["rows"] or longest > plan["max_tokens"]:
    parser.error("1 to {rows} prompts, {max_tokens} tokens, ids < {vocab_size}".format(**plan))
least, most = {"max_new_tokens": 1, "top_p": 1e-9}, {"top_p": 1, "seed": 2**32 - 1}
if not all(least.get(n, 0) <= value <= most.get(n, 1e9) for n, value in asked.items()):
    parser.error(f"options from {least} (else 0) to {most} (else 1e9)")
for name, digest in plan["sha256"].items():
    if hashlib.sha256(np.memmap(here / name, mode="r").data).hexdigest() != digest:
        sys.exit(f"error: {here / name} was altered; fix: copy or export it again")
mesh = jax.make_mesh(plan["mesh_shape"], plan["mesh_axes"], (jax.sharding.AxisType.Auto,) * 3)
exported = [jax.export.deserialize((here / name).read_bytes()) for name in plan["files"]]
prefill, decode_step = (jax.jit(program.call, donate_argnums=1) for program in exported)
(places, state_places, *_), _ = exported[0].in_tree.unflatten(exported[0].in_shardings_jax(mesh))


def weight(it):
    """An array of weights on the host: rows of a tensor, as the programs take them."""
    tensor = safe_open(here / it["file"], "np").get_slice(it["tensor"])
    return np.concatenate([tensor[a:b] for a, b in it["rows"]]).view(it["dtype"])


def filled(arrays):
    """What was asked where it is an array's name, else the array's own value."""
    return {n: np.full(x["shape"], asked.get(n, x["value"]), x["dtype"]) for n, x in arrays.items()}


weights = [jax.device_put(weight(it), place) for it, place in zip(plan["weights"], places)]
rows, chunk = prompts + [[0]] * (plan["rows"] - len(prompts)), plan["prefill_chunk"]
asked |= {"token": [ids[-1] for ids in rows], "is_done": np.arange(len(rows)) >= len(prompts)}
state, options = jax.device_put(filled(plan["state"]), state_places), filled(plan["options"])
for start in range(0, max(map(len, prompts)) - 1, chunk):
    parts = [ids[:-1][start : start + chunk] for ids in rows]
    tokens = np.array([part + [0] * (chunk - len(part)) for part in parts], np.int32)
    state = prefill(weights, state, tokens, np.array([*map(len, parts)], np.int32))
answers = [[]] * len(prompts)
while not np.asarray(state["is_done"]).all():
    state, (tokens, _, counts) = decode_step(weights, state, options)
    answers = [ids + t[:n].tolist() for ids, t, n in zip(answers, np.asarray(tokens), counts)]
print(*(",".join(map(str, ids)) for ids in answers), sep="\n")
if plan["tokenizer"] and find_spec("sentencepiece"):
    from sentencepiece import SentencePieceProcessor

    print(SentencePieceProcessor(str(here / plan["tokenizer"])).decode(answers), file=sys.stderr)
