"""What the pages say of the code is so: errors, numbers, the picture, links, the navigation."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from mixtral_jax import errors
from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = script("site_hooks")


@cache
def literals() -> str:
    """All texts in the package's code, and what tyro and JAX say."""
    texts = ["Unrecognized options:", "invalid choice", "RESOURCE_EXHAUSTED"]
    for path in (ROOT / "mixtral_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def unsaid(error: str) -> list[str]:
    """Parts of an error, as a page shows it, that no text of the code has."""
    parts = re.split(r"…|: expected |, got |; fix: ", error)
    return [part for part in map(str.strip, parts) if part and part not in literals()]


def shown_errors() -> list[str]:
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    return re.findall(r"^\| `([^`]+)`", text, flags=re.MULTILINE)


@pytest.mark.parametrize("error", shown_errors())
def test_errors_are_those_of_the_code(error):
    assert unsaid(error) == []


def test_an_error_that_nobody_raises_is_found():
    assert len(shown_errors()) > 30
    assert unsaid("no such folder: … is on the moon") == ["is on the moon"]


def test_exit_codes_are_those_of_the_code():
    text = (DOCS / "commands.md").read_text("utf-8")
    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    assert shown == {value for value in vars(errors).values() if type(value) is int} - {500}


def test_numbers_of_performance_are_those_of_the_records():
    assert (DOCS / "performance.md").read_text("utf-8") == script("make_performance").page()


def test_a_record_without_a_heading_is_refused(tmp_path):
    (tmp_path / "new.json").write_text("{}")
    with pytest.raises(KeyError, match="new"):
        script("make_performance").page(tmp_path)


def test_the_picture_is_that_of_its_script():
    drawn = "\n".join(script("draw_token").lines()) + "\n"
    assert (DOCS / "token.svg").read_text("utf-8") == drawn


def test_files_that_the_picture_names_exist():
    for _, file in script("draw_token").ROWS.values():
        assert (ROOT / "mixtral_jax" / file).is_file()


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_links_out_of_the_docs_lead_somewhere(path: Path):
    hooks.rewritten(path.read_text("utf-8"), path.relative_to(DOCS).as_posix())


def test_links_out_become_addresses_of_the_repository():
    text = "[a](../mixtral_jax/model/axes.py#L3) [b](plan.md#x) [c](token.svg) [d](https://x.y)"
    found = hooks.rewritten(text, "index.md")
    assert found.startswith(f"[a]({hooks.REPOSITORY}mixtral_jax/model/axes.py#L3) [b](plan.md#x)")
    assert found.endswith("[c](token.svg) [d](https://x.y)")
    deep = hooks.rewritten("[a](../design.md) [b](../../README.md)", "adr/x.md")
    assert deep == f"[a](../design.md) [b]({hooks.REPOSITORY}README.md)"


@pytest.mark.parametrize("link", ["../no/such.py", "../../outside.md", "record.py"])
def test_a_link_to_nowhere_is_refused(link):
    with pytest.raises(hooks.SiteError, match="not there"):
        hooks.rewritten(f"[a]({link})", "index.md")


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://unpkg.com/x"></script>',
        "<link rel=stylesheet href=//fonts.googleapis.com/css>",
        "body { background: url('https://x.y/z.png') }",
        '<img alt="x" src="http://x.y/z.png">',
    ],
)
def test_what_would_be_fetched_is_found(text):
    assert len(hooks.fetched(text)) == 1
    assert hooks.fetched('<a href="https://x.y">x</a> <script src="assets/x.js"></script>') == []


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert [
        page for page in pages if not re.search(rf"(- |: ){re.escape(page)}$", text, re.M)
    ] == []


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.name)
def test_pages_are_short(path: Path):
    assert len(path.read_text("utf-8").splitlines()) <= 400
