"""The notebooks, each in a fresh kernel: no cell fails, and their own assertions hold the numbers they speak of."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def kinds(cell) -> set[str]:
    return {kind for output in cell.outputs for kind in output.get("data", {"text": ""})}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_a_clean_kernel_and_shows_what_it_kept(path: Path, real_gguf: Path, monkeypatch):
    kept = nbformat.read(path, 4)
    assert path.stat().st_size < 1_500_000
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the kernel finds this tree, installed or not
    fresh = nbformat.read(path, 4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(fresh, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    for before, after in zip(kept.cells, fresh.cells):
        if before.cell_type == "code":
            assert before.outputs or not after.outputs, f"kept without its outputs: {before.source[:80]}"
            assert kinds(before) == kinds(after), before.source[:80]
    assert any("image/png" in kinds(cell) or "text/html" in kinds(cell) for cell in kept.cells if "outputs" in cell)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["first_steps", "inside_the_model", "quantization"]
