"""`qwen-mlx lora`: from lines of JSON to an adapter, killed and gone on with, and what it says to bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

from qwen_mlx.cli.main import dispatch
from reference.small_models import RandomModel, write_gguf
from tests.helpers.cases import each
from tests.helpers.commands import run_here
from tests.helpers.training import chats, write_lines

QUICK = ["--iters", "4", "--batch-size", "2", "--rank", "4", "--steps-per-report", "2", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model and a folder of data, as arguments."""
    folder = tmp_path_factory.mktemp("lora")
    base = write_gguf(folder / "m.gguf", RandomModel(num_hidden_layers=1), T.Q8_0)
    write_lines(folder / "data" / "train.jsonl", chats(8))
    write_lines(folder / "data" / "valid.jsonl", chats(3))
    return ["lora", "--model", str(base), "--data", str(folder / "data")]


def test_a_training_from_lines_to_an_adapter(tmp_path: Path, inputs: list[str]):
    out = str(tmp_path / "out")
    done = run_here(lambda: dispatch([*inputs, "--adapter", out, "--mask-prompt", *QUICK]))
    text = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert "train.jsonl: 8 examples, " in text
    lines = [line.split(":")[0] for line in text.splitlines() if line.startswith("step ")]
    assert lines == ["step 0", "step 2", "step 4", "step 4"]
    assert "tokens/s, learning rate 0.001" in text
    assert f"--adapter {out} --prompt" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names - {"losses.png"} == {
        *("adapter_config.json", "adapters.safetensors", "losses.csv", "training_state.safetensors")
    }
    prompt = ["generate", *inputs[1:3], "--adapter", out, "--prompt", "hi", "--max-tokens", "1"]
    assert run_here(lambda: dispatch(prompt)).returncode == 0
    again = run_here(lambda: dispatch([*inputs, "--adapter", out, "--mask-prompt", *QUICK]))
    assert (again.returncode, again.stdout) == (2, b"")
    assert b"holds files already; give --resume to go on" in again.stderr
    more = ["--adapter", out, "--mask-prompt", "--resume", *QUICK, "--iters", "6"]
    assert run_here(lambda: dispatch([*inputs, *more])).returncode == 0
    assert (tmp_path / "out" / "losses.csv").read_text().count("\n") == 8


@pytest.mark.heavy
def test_kill_9_and_resume_give_the_same_losses(tmp_path: Path, inputs: list[str]):
    course = ["--iters", "12", "--batch-size", "2", "--rank", "4", "--save-every", "3", "--steps-per-eval", "5"]
    assert run_here(lambda: dispatch([*inputs, "--adapter", str(tmp_path / "expected"), *course])).returncode == 0
    command = [*inputs, "--adapter", str(tmp_path / "out"), *course]
    state = tmp_path / "out" / "training_state.safetensors"
    process = subprocess.Popen([sys.executable, "-m", "qwen_mlx", *command], stdout=subprocess.DEVNULL)
    while process.poll() is None and not state.exists():
        time.sleep(0.001)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run_here(lambda: dispatch([*command, "--resume"])).returncode == 0
    for name in ("losses.csv", "adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


MISTAKES = {
    "no data": (["--data", "/nonexistent"], "--data /nonexistent: is no folder"),
    "a broken line": (["--data", "BROKEN"], "train.jsonl, line 2: is not JSON"),
    "no target": (["--targets", "q"], "targets are q, expected some of q_proj"),
    "no step": (["--iters", "0"], "iters is 0"),
    "too long": (["--max-seq-length", "1"], "--max-seq-length is 1"),
    "no model": (["--model", "/nonexistent.gguf"], "/nonexistent.gguf"),
    "a file": (["--adapter", __file__], "is not a folder"),
    "a folder of other things": (["--adapter", str(Path(__file__).parent)], "holds files already; give another name"),
    "under a file": (["--adapter", f"{__file__}/x"], "cannot be written"),
}


@each("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(tmp_path: Path, inputs: list[str], case: str):
    arguments, words = MISTAKES[case]
    write_lines(tmp_path / "broken" / "train.jsonl", [{"text": "fine"}, "{"])
    arguments = [str(tmp_path / "broken") if argument == "BROKEN" else argument for argument in arguments]
    done = run_here(lambda: dispatch([*inputs, "--adapter", str(tmp_path / "out"), *arguments]))
    error = done.stderr.decode()
    assert done.returncode == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "out").exists()
