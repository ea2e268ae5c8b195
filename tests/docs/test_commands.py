"""Every block of commands in the documentation runs, on small data under the names that it uses.

What cannot run here says so in a comment before it; see ``blocks.py``. Quick ones run always, those
marked ``<!-- test: slow -->`` with ``make slow``.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, Code, Marks, codes
from tests.docs.sandbox import Sandbox, inside, is_of_the_house, run_block

BLOCKS = [code for page in PAGES for code in codes(page) if code.is_shell]
RUN = [
    pytest.param(code, id=code.where, marks=[pytest.mark.slow] if code.mark else [])
    for code in BLOCKS
    if code.mark in (None, ("test", "slow"))
]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("kept"))


def missing(shown: list[str], printed: str) -> list[str]:
    """Lines that a page shows as output and that were not printed; numbers and all."""
    found = {" ".join(line.split()) for line in printed.splitlines()}
    return [line for line in shown if " ".join(line.split()) not in found]


@pytest.mark.parametrize("code", RUN)
def test_block_runs(code, sandbox, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with inside(tmp_path / "work"):
        printed = run_block(code.commands(), sandbox, capfd)
    assert missing(code.output(), printed) == []


PYTHON = {"docs/quickstart.md": [], "README.md": [pytest.mark.slow]}


@pytest.mark.parametrize("page", [pytest.param(p, marks=m) for p, m in PYTHON.items()])
def test_python_runs(page, sandbox, tmp_path, capfd):
    texts = ["\n".join(code.lines) for code in codes(page) if code.language == "python"]
    assert texts
    with inside(tmp_path / "work"):
        for text in texts:
            sandbox.lay(re.findall(r'load\("([^"]+)"', text), set())
            exec(compile(text, page, "exec"), {})
    assert capfd.readouterr().out.strip()


def test_most_blocks_run():
    """So that marks do not become the way out."""
    assert len(RUN) >= 0.7 * len(BLOCKS)
    assert sum(not param.marks for param in RUN) >= 7


def planted(text: str) -> Code:
    (code,) = codes("planted.md", text)
    return code


def test_what_nobody_runs_needs_a_mark(sandbox, capfd, tmp_path):
    code = planted("```sh\nsrun python x.py\n```\n")
    with inside(tmp_path), pytest.raises(AssertionError, match="needs a mark"):
        run_block(code.commands(), sandbox, capfd)
    assert planted("<!-- needs: gpu -->\n```sh\nsrun x\n```\n").mark == ("needs", "gpu")


def test_a_command_that_fails_is_found(sandbox, capfd, tmp_path):
    code = planted("```sh\nmixtral-jax sharding tiny --mesh 1x7\n```\n")
    with inside(tmp_path), pytest.raises(AssertionError, match="error: "):
        run_block(code.commands(), sandbox, capfd)


def test_a_script_that_a_block_made_has_to_run(sandbox, capfd, tmp_path):
    makes = "python -m mixtral_jax.convert tiny out/"
    for script, error in (("out/none.py", "can.t open file"), ("else/none.py", "needs a mark")):
        code = planted(f"```sh\n{makes}\npython {script} 1,2\n```\n")
        with inside(tmp_path), pytest.raises(AssertionError, match=error):
            run_block(code.commands(), sandbox, capfd)


def test_what_a_command_makes_takes_the_place_of_a_link_alone(sandbox, capfd, tmp_path):
    text = "```sh\nmixtral-jax sharding small/\nmixtral-jax convert tiny small/\n```\n"
    with inside(tmp_path):
        run_block(planted(text).commands(), sandbox, capfd)
        assert not Path("small").is_symlink()
    names = [path.name for path in sandbox.kept("small").iterdir()]
    assert sorted(names) == ["config.json", "tokenizer.model"]


def test_output_that_is_not_printed_is_found(sandbox, capfd, tmp_path):
    code = planted("text\n\n    $ mixtral-jax sharding tiny\n    total  no such line\n")
    assert code.output() == ["total  no such line"]
    with inside(tmp_path):
        printed = run_block(code.commands(), sandbox, capfd)
    assert "embed_tokens" in printed
    assert missing(code.output(), printed) == code.output()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<!-- needs: gpu -->\n\nNo block.\n", "no block behind it"),
        ("<!-- needs: gpu -->\n", "no block behind it"),
        ("<!-- needs: gpu -->\n```python\nx = 1\n```\n", "no block of shell"),
        ("<!-- needs: luck -->\n```sh\nmake x\n```\n", "got luck"),
        ("<!-- test: never -->\n```sh\nmake x\n```\n", "got never"),
        ("<!-- needs: gpu -->\n<!-- test: slow -->\n```sh\nmake x\n```\n", "two marks"),
    ],
)
def test_marks_are_checked(text, error):
    with pytest.raises(Marks, match=re.escape(error)):
        codes("planted.md", text)


def test_blocks_are_found():
    text = """
```sh
make a   # it's one
make b \\
  c
```

    $ make d
    output
    $ make e

and

    mixtral-jax plan --batch 1
    what it prints

and

    from x import y
"""
    found = codes("planted.md", text)
    assert [code.is_shell for code in found] == [True, True, True, False]
    assert found[0].commands() == ["make a   # it's one", "make b c"]
    assert found[1].commands() == ["make d", "make e"]
    assert found[1].output() == ["output"]
    assert found[2].commands() == ["mixtral-jax plan --batch 1"]


@pytest.mark.parametrize(
    ("words", "is_known"),
    [
        ("make demo", True),
        ("make no-such", False),
        ('pip install "mixtral-jax[serve,hub]"', True),
        ('pip install "mixtral-jax[servers]"', False),
        ("pip install jax flatbuffers safetensors", True),
        ("pip install jax flatbufers", False),
        (".venv/bin/python -m pytest tests/test_config.py", True),
        (".venv/bin/python -m pytest tests/test_no_such.py", False),
        ("rm -rf /tmp/x", False),
    ],
)
def test_what_ci_does_itself_is_seen_to_exist(words, is_known):
    assert is_of_the_house(words.replace('"', "").split()) == is_known
