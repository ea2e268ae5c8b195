"""The notebooks run from top to bottom, and show what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.blocks import ROOT
from tests.environ import without_devices

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
VARIES = "varies"  # a cell with this tag: its text may differ from machine to machine


def texts(notebook: Any) -> list[tuple[str, str]]:
    """Source and printed text of each cell that prints always the same; pictures are left out."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "code" or VARIES in cell.metadata.get("tags", []):
            continue
        parts = [
            output.get("text") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
            if output.get("name") != "stderr" and "image/png" not in output.get("data", {})
        ]
        found.append((cell.source, "".join(parts)))
    return found


def run(notebook: Any, folder: Path) -> None:
    NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": str(folder)}},
        kernel_name="python3",
    ).execute(env=without_devices() | {"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_what_comes_out(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    shown = texts(notebook)
    run(notebook, tmp_path)
    assert texts(notebook) == shown


def test_there_are_two_with_outputs_and_pictures():
    assert [path.stem for path in NOTEBOOKS] == ["first_steps", "inside_the_routing"]
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert sum(bool(text) for _, text in texts(notebook)) >= 2
    assert path.read_text("utf-8").count("image/png") >= 2
    assert str(ROOT) not in "".join(path.read_text("utf-8") for path in NOTEBOOKS)


def test_another_output_is_found():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    before = texts(notebook)
    cell = next(cell for cell in notebook.cells if cell.get("outputs"))
    cell.outputs[0]["text"] = "another"
    assert texts(notebook) != before
