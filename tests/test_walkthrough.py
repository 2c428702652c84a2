"""docs/walkthrough.ipynb runs from its first cell to its last, in a kernel of its own, and is stored with what it prints and draws."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.process import ROOT

FILE = ROOT / "docs" / "walkthrough.ipynb"
SAID = (
    "batched = alone bit for bit, cut = whole bit for bit",
    "cuttings, 0 that differ",
    "killed: -9",
    "the same state, bit for bit: True",
    "the same reply: True · turns applied: 15",
)


def _text(notebook: nbformat.NotebookNode) -> str:
    return "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))


@pytest.mark.filterwarnings("ignore")  # the kernel's own, of its loop and its sockets
@pytest.mark.timeout(300)
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell ends well, says what it is for, and three of them draw; nothing stays behind."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(FILE, as_version=4)
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    for said in SAID:
        assert said in _text(notebook)
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 3


def test_it_is_stored_with_small_outputs() -> None:
    """Who only reads it sees what it shows; no error, no path of a machine, and not many bytes."""
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it whole, and store it"
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    for said in SAID:
        assert said in _text(notebook)
    stored = FILE.read_text(encoding="utf-8")
    assert len(stored) < 200_000
    assert os.path.expanduser("~") not in stored  # noqa: PTH111 (a text to look for, not a path to open)
    assert "/tmp" not in stored
