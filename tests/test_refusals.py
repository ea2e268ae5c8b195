"""What a type annotation already forbids is refused in one line by the code itself.

Under pytest the type checker would refuse first, so these run in a Python of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys

from mixtral_jax.errors import USAGE

SCRIPT = """
import json
import mixtral_jax as mj
from mixtral_jax.errors import MixtralError
from mixtral_jax.sharding.dispatch import DispatchOptions

lm = mj.load("tiny")
cases = {
    "dtype": lambda: mj.load(dtype="int8"),
    "window": lambda: mj.load(sliding_window="16"),
    "dispatch": lambda: mj.load(dispatch="alltoall"),
    "overflow": lambda: mj.load(overflow="Drop"),
    "capacity": lambda: mj.load(capacity_factor="2"),
    "kernels": lambda: mj.load(kernels=["gpu"]),
    "unknown": lambda: mj.load(quantise="int8"),
    "method": lambda: DispatchOptions(method="everything"),
    "floats": lambda: lm.logits([[1.9, 2.7]]),
    "texts": lambda: lm.logits(["12"]),
    "one row": lambda: lm.logits([1, 2]),
    "none": lambda: lm.generate(prompt_token_ids=[[None]]),
    "prompt floats": lambda: lm.generate(prompt_token_ids=[[1, 2.9]]),
    "no list": lambda: lm.generate(prompt_token_ids=3),
    "no text": lambda: lm.generate([3]),
    "no stop": lambda: lm.generate(["a"], stop=3),
}
for name, case in cases.items():
    try:
        case()
        print(json.dumps([name, 0, ""]))
    except MixtralError as error:
        print(json.dumps([name, error.code, str(error)]))
    except Exception as error:
        print(json.dumps([name, 1, repr(error)]))
"""


def test_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == SCRIPT.count("lambda:")
    for name, code, line in answers:
        assert (name, code) == (name, USAGE), line
        assert "\n" not in line
