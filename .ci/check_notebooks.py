"""Executes the notebooks, each in a fresh kernel: no cell fails, their assertions hold, stored outputs are shown."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["fine_tuning", "first_steps", "inside_the_model", "quantization"]


def kinds(cell) -> set[str]:
    """MIME types of a cell's outputs, without standard error, on which a machine may tell of itself."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return {kind for output in outputs for kind in output.get("data", {"text": ""})}


def check(path: Path) -> None:
    """Runs one notebook and compares the kinds of its outputs with those stored."""
    assert path.stat().st_size < 1_500_000, f"{path.name} is too large"
    stored, fresh = nbformat.read(path, 4), nbformat.read(path, 4)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(fresh, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    for before, after in zip(stored.cells, fresh.cells, strict=True):
        if before.cell_type == "code":
            told = [output for output in before.outputs if output.get("name") == "stderr"]
            assert not told, f"stored with standard error: {before.source[:80]}"
            assert kinds(before) == kinds(after), before.source[:80]
    shown = set().union(*(kinds(cell) for cell in stored.cells if "outputs" in cell))
    assert shown & {"image/png", "text/html"}, f"{path.name} shows no picture"


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(ROOT)  # the kernel finds this tree, installed or not
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [path.stem for path in paths] == NAMES
    for path in paths:
        check(path)
        print(f"{path.name}: runs and shows what it stores", file=sys.stderr)
