"""The notebooks run from top to bottom on the built-in models, and are committed without outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def test_there_is_one_for_each_family():
    assert [path.stem for path in NOTEBOOKS] == ["diffusion", "video", "vit", "vlm"]


@pytest.mark.timeout(
    600
)  # a kernel imports everything anew, which takes minutes on busy processors
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = nbclient.NotebookClient(
        book, timeout=400, resources={"metadata": {"path": str(tmp_path)}}
    )
    run.execute()  # raises CellExecutionError with the cell and its error
    shown = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]
    assert shown
