"""The notebooks run from first cell to last, one after the other in one folder, and show pictures and progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# In a process of its own, as its libraries warn of what is theirs.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""
PICTURES = {
    "1_explain_a_slide": 2,
    "2_read_results_with_xarray": 1,
    "4_bring_your_own_model": 1,
    "5_compare_methods": 1,
}

SLOW = {"3_audit_a_model": pytest.mark.slow}  # half of all their time; the demo's audit, in CI, makes the same calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all notebooks run in: each takes what is there already."""
    return tmp_path_factory.mktemp("notebooks")


def executed(notebook: Path, folder: Path) -> list[dict[str, Any]]:
    """The outputs of a notebook that was run in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(notebook), str(folder / notebook.name)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((folder / notebook.name).read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def shown(outputs: list[dict[str, Any]], kind: str) -> list[str]:
    """What outputs show of a MIME type."""
    return ["".join(output["data"][kind]) for output in outputs if kind in output.get("data", {})]


@pytest.mark.parametrize(
    "notebook", [pytest.param(path, id=path.stem, marks=SLOW.get(path.stem, ())) for path in NOTEBOOKS]
)
def test_a_notebook_runs_and_shows_what_it_says(notebook: Path, folder: Path) -> None:
    outputs = executed(notebook, folder)
    pages = shown(outputs, "text/html")
    pictures = shown(outputs, "image/png") + [page for page in pages if "data:image/png;base64," in page]
    assert len(pictures) >= PICTURES.get(notebook.stem, 0)
    assert any("<progress " in page for page in pages)
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_notebooks_are_kept_without_their_outputs() -> None:
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")], path
