"""The loader where there is nothing but what it says it needs."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_jax.export.driver import LOADER
from tests.environ import without_devices
from tests.export.exported import arguments, generated, parse

# jax, flatbuffers, safetensors, and what jax itself depends on.
NEEDED = ("jax", "jaxlib", "flatbuffers", "safetensors")
OF_JAX = ("numpy", "ml_dtypes", "scipy", "opt_einsum")
ABSENT = ("mixtral_jax", "flax", "orbax", "sentencepiece", "jaxtyping", "tyro", "tests")
MAX_LINES = 46
PROMPTS = [[1, 733, 16, 289], [1, 5]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[str]:
    """The environment of a Python that finds those packages and no others."""
    links = tmp_path_factory.mktemp("packages")
    for name in (*NEEDED, *OF_JAX):
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        (place,) = list(spec.submodule_search_locations or [])
        for found in Path(place), Path(f"{place}.libs"):
            if found.exists():
                (links / found.name).symlink_to(found, target_is_directory=True)
    kept = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "PATH", "HOME")
    variables = {name: value for name, value in without_devices().items() if name in kept}
    return ["env", "-i", *(f"{n}={v}" for n, v in variables.items()), f"PYTHONPATH={links}"]


def python(alone: list[str], *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # -S: without site-packages, and what their .pth files bring; -s: nor the user's.
    command = [*alone, sys.executable, "-S", "-s", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_it_writes_the_tokens_of_sample(tiny, exported_tiny, alone, tmp_path):
    look = f"import importlib.util as u; print([n for n in {ABSENT + NEEDED} if u.find_spec(n)])"
    assert ast.literal_eval(python(alone, "-c", look, cwd=tmp_path).stdout) == list(NEEDED)
    done = python(
        alone, str(exported_tiny / "run.py"), *arguments(PROMPTS, max_new_tokens=20), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert parse(done.stdout) == generated(tiny, PROMPTS, max_new_tokens=20)


def code_lines(source: str) -> int:
    """Lines that are no imports, docstrings, comments or blank."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
            first = node.body[0]
            left_out |= {*range(first.lineno, (first.end_lineno or first.lineno) + 1)}
    lines = enumerate(source.splitlines(), 1)
    is_code = (line.strip() and not line.strip().startswith("#") for _, line in lines)
    return sum(1 for n, code in enumerate(is_code, 1) if code and n not in left_out)


def test_the_loader_is_short_and_imports_what_it_says():
    source = LOADER.read_text()
    assert code_lines(source) <= MAX_LINES
    assert code_lines('"""A."""\nimport a\n\n# b\nx = 1\n') == 1
    imports = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports}
    others = {str(name).split(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"jax", "numpy", "safetensors", "sentencepiece"}


def test_all_that_it_reads_is_proved(exported_tiny, tmp_path, run_py):
    plan = json.loads((exported_tiny / "export.json").read_text())["programs"]["cpu"]
    assert {*plan["sha256"]} == {*os.listdir(exported_tiny)} - {"run.py", "export.json"}
    for name in plan["sha256"]:
        copy = tmp_path / name
        shutil.copytree(exported_tiny, copy)
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(SystemExit, match=f"error: .*{name} was altered; fix: "):
            run_py(copy, PROMPTS)


def test_a_platform_without_programs_is_told(exported_tiny, tmp_path, run_py):
    copy = tmp_path / "copy"
    shutil.copytree(exported_tiny, copy)
    about = json.loads((copy / "export.json").read_text())
    about["programs"] = {"gpu": about["programs"]["cpu"]}
    (copy / "export.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match="error: no programs for cpu, only for gpu; fix: "):
        run_py(copy, PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "given"),
    [
        ([[1]] * 3, {}),
        ([[2048]], {}),
        ([[1, -1]], {}),
        ([[1] * 65], {}),
        ([[1]], {"max_new_tokens": 128}),
        ([[1]], {"seed": "x"}),
        ([[1]], {"seed": -1}),
        ([[1]], {"seed": 2**32}),
        ([[1]], {"max_new_tokens": 0}),
        ([[1]], {"max_new_tokens": -4}),
        ([[1]], {"temperature": -1.0}),
        ([[1]], {"temperature": "nan"}),
        ([[1]], {"temperature": "inf"}),
        ([[1]], {"top_p": 0.0}),
        ([[1]], {"top_p": 7.0}),
        ([[]], {}),
    ],
)
def test_it_refuses_what_the_programs_cannot_take(exported_tiny, run_py, prompts, given):
    with pytest.raises(SystemExit) as refused:
        run_py(exported_tiny, prompts, **given)
    assert refused.value.code == 2
    assert run_py.err.splitlines()[-1].startswith("run.py: error: ")
