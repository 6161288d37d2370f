"""The CPU benchmark runs every engine on the same small weights and finds that they compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpu_generate import ENGINES

from .small_models import hf_model, write_gguf


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mlx-lm would run on Apple's GPU")
def test_cpu_generate(tmp_path: Path):
    model, output = write_gguf(tmp_path / "small.gguf", hf_model()), tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.cpu_generate", "--model", model, "--output", output]
    sizes = ["--prefill", "24", "--decode", "3", "--repeats", "1"]
    done = subprocess.run(
        [*command, *sizes], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert list(report["medians"]) == list(ENGINES)
    assert all(value > 0 for row in report["medians"].values() for value in row.values())
    assert report["start_to_first_token"][0]["seconds"] > 0
    float32 = [runs[0]["tokens"] for engine, runs in report["runs"].items() if "float16" not in engine]
    assert float32 == [float32[0]] * 3
