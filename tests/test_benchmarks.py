"""The CPU benchmark runs every engine on the same small weights and finds that they compute the same."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import train
from benchmarks.cpu_generate import ENGINES
from qwen_mlx.errors import QwenMLXError
from reference.small_models import RandomModel, write_gguf
from tests.helpers.cases import each
from tests.helpers.commands import run_here


@pytest.mark.slow
@pytest.mark.linux  # mlx-lm would run on Apple's GPU
def test_cpu_generate(tmp_path: Path):
    model, output = write_gguf(tmp_path / "small.gguf", RandomModel()), tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.cpu_generate", "--model", model, "--output", output]
    sizes = ["--prompts", "24", "40", "--decode", "3", "--repeats", "1", "--without", "llama.cpp"]
    done = subprocess.run(
        [*command, *sizes], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert list(report["medians"]) == [engine for engine in ENGINES if engine != "llama.cpp"]
    for engine, found in report["medians"].items():
        assert list(found["rows"]) == ["24"] if engine.startswith("mlx-lm") else ["24", "40"]
        assert all(value > 0 for row in found["rows"].values() for value in row.values())
    assert report["start_to_first_token"][0]["seconds"] > 0
    assert "round 1 of 1, qwen_mlx, prompt of 40: prefill " in done.stderr
    assert "'tokens'" not in done.stderr
    float32 = [runs[0]["rows"]["24"]["tokens"] for name, runs in report["runs"].items() if "float16" not in name]
    assert float32 == [float32[0]] * 3


@pytest.mark.heavy
@pytest.mark.linux  # mlx-lm would run on Apple's GPU
def test_run_compares_engines_that_make_the_same_tokens(tmp_path: Path):
    output, picture = tmp_path / "run.json", tmp_path / "run.png"
    command = [sys.executable, "-m", "benchmarks.run", "--models", "tiny", "tiny:q4_k_m", "--output", output]
    command += ["--engines", "qwen_mlx", "mlx-lm", "transformers", "--prompts", "1", "40", "--batches", "1", "3"]
    command += ["--tokens", "4", "--repeats", "1", "--plot", picture]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    dense, packed = (report["models"][name]["rows"] for name in ("tiny", "tiny:q4_k_m"))
    assert [row["engine"] for row in dense] == ["qwen_mlx", "mlx-lm", "transformers dynamic"] * 3
    assert [row["engine"] for row in packed] == ["qwen_mlx", "mlx-lm"] * 3
    assert [(row["prompt"], row["batch"]) for row in packed[::2]] == [(1, 1), (40, 1), (128, 3)]
    # bfloat16 rounds differently in each engine: the first token is nobody's luck.
    assert all(row["first_different_token"] != 0 for row in dense)
    assert picture.stat().st_size > 1000
    table = [row for row in done.stdout.splitlines() if row.startswith(("model", "tiny"))]
    assert table[0].split()[:2] == ["model", "prompt"]
    assert len(table) == 1 + len(dense) + len(packed)
    assert len({len(row) for row in table}) == 1, "the columns are not aligned"
    assert "40 x 1, round 1 of 1, mlx-lm: prefill " in done.stderr


@pytest.mark.heavy
@pytest.mark.linux  # mlx-lm would run on Apple's GPU
def test_train_gives_both_trainers_the_same_work(monkeypatch: pytest.MonkeyPatch):
    results = train.measure("tiny", batch=2, length=16, rank=4, steps=2, rounds=1)
    assert list(results) == ["qwen_mlx", "mlx-lm"]
    own, other = results.values()
    assert own["first_loss"] == pytest.approx(other["first_loss"], rel=1e-4)
    for result in results.values():
        assert len(result["tokens_per_second"]) == 2
        assert result["peak_bytes"] > 0
    monkeypatch.setattr(train, "mlx_lms", lambda *_: iter([(1.1 * own["first_loss"], 1.0)] * 2))
    with pytest.raises(QwenMLXError, match="first losses differ"):
        train.measure("tiny", batch=2, length=16, rank=4, steps=1, rounds=1)


def test_a_peer_gets_nothing_of_ours():
    """mlx-lm's and transformers' processes start as their users' do: MLX comes with the engine, if at all."""
    code = "import sys, benchmarks.cpu_generate, benchmarks.cpu_primitives; sys.exit('mlx.core' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0


MISTAKES = {
    "model": (["run", "--models", "tiny", "9B"], "No model '9B': expected a file, or tiny, 0.5B"),
    "no GGUF": (["run", "--models", "README.md"], "README.md: not a GGUF file"),
    "prompt": (["run", "--prompts", "0"], "'0': expected a number from 1 to 10,000,000"),
    "tokens": (["run", "--tokens", "9" * 20], "expected a number from 1 to 10,000,000"),
    "output": (["run", "--output", "nowhere/run.json"], "cannot write 'nowhere/run.json'"),
    "first engine": (["run", "--engines", "mlx-lm"], "first of --engines must be qwen_mlx"),
    "arguments that are not there": (["launches", "nonsense"], "unrecognized arguments: nonsense"),
    "one token of an answer": (["cpu_speculative", "--tokens", "1"], "expected a number from 2"),
    "cache": (["cache", "--context", "-256"], "expected a number from 2"),
    "nothing to try": (["trial"], "No kernel to try: the default device is the CPU"),
    "no GPU": (["kernels"], "No kernel to time: this needs"),
}


@pytest.mark.heavy
@pytest.mark.linux  # a Mac has a GPU
@each("name", MISTAKES)
def test_mistakes_are_one_sentence_before_anything_is_measured(name: str, monkeypatch: pytest.MonkeyPatch):
    (script, *arguments), message = MISTAKES[name]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.chdir(Path(__file__).parents[1])
    main = importlib.import_module(f"benchmarks.{script}").main
    done = run_here(main)
    assert done.returncode == 2
    assert message in done.stderr.decode().splitlines()[-1]


def test_a_benchmark_overwrites_no_stored_result_unasked():
    for script in (Path(__file__).parents[1] / "benchmarks").glob("*.py"):
        assert not re.search(r"default=.*results", script.read_text()), script.name


def test_the_readme_s_speeds_are_those_of_the_stored_runs():
    from benchmarks import claims

    for name, (claim, fresh) in claims.speeds().items():
        assert claim == fresh, name
    claim, fresh = claims.kernel_cases()
    assert fresh == f"{claim}, 0 failed"
