"""Bookkeeping needs no jax; the package and sampling need nothing of the ``serve`` extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

PURE = "request slots scheduler prefix commands metrics ticket answer"


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ([f"mixtral_jax.serve.{name}" for name in PURE.split()], ["jax", "llguidance"]),
        (["mixtral_jax.sample", "mixtral_jax.serve.start"], ["llguidance", "fastapi"]),
    ],
)
def test_what_is_imported(modules, absent):
    code = f"import sys, {', '.join(modules)}; print(set({absent}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
