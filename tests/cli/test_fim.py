"""`generate` with a file that has a hole: its options, and the text alone on standard output."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_mlx import QwenMLXError, fill, load
from qwen_mlx.cli import fim, generate
from reference.small_models import RandomModel, write_gguf
from tests.helpers.cases import each
from tests.helpers.fim_model import save_fim_folder

COMMAND = [sys.executable, "-m", "qwen_mlx.generate", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fim_folder(tmp_path_factory.mktemp("fim") / "m")


def read(*arguments: str | Path):
    return fim.read(generate.parser().parse_args(list(map(str, arguments))))


def test_without_its_options_nothing_is_asked_for():
    assert read("--prompt", "x") is None


def test_a_file_with_a_mark_and_two_files_mean_the_same(tmp_path: Path):
    (tmp_path / "whole").write_bytes(b"def f():\r\n\t<|cursor|>\n# end")
    (tmp_path / "before").write_bytes(b"def f():\r\n\t")
    (tmp_path / "after").write_bytes(b"\n# end")
    one = read("--fim-file", tmp_path / "whole")
    assert one == read("--fim-prefix-file", tmp_path / "before", "--fim-suffix-file", tmp_path / "after")
    assert (one["prefix"], one["suffix"]) == ("def f():\r\n\t", "\n# end")
    assert read("--fim-suffix-file", tmp_path / "after")["prefix"] == ""
    (tmp_path / "whole").write_text("a@b")
    assert read("--fim-file", tmp_path / "whole", "--fim-cursor", "@")["suffix"] == "b"


def test_context_files_keep_their_order_and_names(tmp_path: Path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text(f"text of {name}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x<|cursor|>y")))
    options = ["--fim-context", tmp_path / "b", "--fim-context", tmp_path / "a", "--fim-repository", "r"]
    asked = read("--fim-file", "-", *options, "--fim-path", "z.py", "--fim-stop-at", "line")
    assert asked["files"] == [(str(tmp_path / "b"), "text of b"), (str(tmp_path / "a"), "text of a")]
    assert (asked["prefix"], asked["suffix"], asked["path"], asked["stop_at"]) == ("x", "y", "z.py", "line")


@each(
    ("arguments", "words"),
    [
        (["--fim-path", "x.py"], "needs --fim-file FILE, or --fim-prefix-file"),
        (["--fim-file", "{f}", "--fim-suffix-file", "{f}"], "needs --fim-file FILE, or"),
        (["--fim-suffix-file", "{f}", "--prompt", "x"], "--prompt does not go with --fim-prefix-file"),
        (["--fim-file", "{f}", "--raw"], "--raw does not go with --fim-file"),
        (["--fim-file", "{f}", "--system", "x"], "--system does not go with"),
        (["--fim-prefix-file", "{f}", "--fim-cursor", "x"], "--fim-cursor does not go with"),
        (["--fim-file", "{f}"], "holds the mark '<|cursor|>' 0 times, expected once"),
        (["--fim-file", "{f}", "--fim-cursor", "l"], "holds the mark 'l' 2 times"),
        (["--fim-file", "{f}", "--fim-cursor", ""], "holds the mark '' 0 times"),
        (["--fim-file", "/nowhere/x"], "--fim-file /nowhere/x: cannot be read"),
        (["--fim-file", "{f}", "--fim-max-prompt-tokens", "0"], "--fim-max-prompt-tokens is 0"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, arguments: list[str], words: str):
    (tmp_path / "f").write_text("hello")
    with pytest.raises(QwenMLXError) as caught:
        read(*(argument.format(f=tmp_path / "f") for argument in arguments))
    assert words in str(caught.value)


@pytest.mark.heavy
def test_only_the_fill_goes_to_standard_output(folder: Path):
    """No newline is added, so that an editor can insert what it gets."""
    command = [*COMMAND, "--model", str(folder), "--fim-file", "-"]
    done = subprocess.run(command, input=b"hello<|cursor|>ll", capture_output=True, timeout=120, check=True)
    model, tokenizer = load(folder)
    assert done.stdout.decode() == fill(model, tokenizer, "hello", "ll", max_tokens=12)
    assert b"generation: 12 tokens" in done.stderr


@pytest.mark.heavy
def test_a_model_that_cannot_fill_is_refused_by_name(tmp_path: Path):
    path = write_gguf(tmp_path / "plain.gguf", RandomModel())
    command = [*COMMAND, "--model", str(path), "--fim-file", "-"]
    done = subprocess.run(command, input=b"<|cursor|>", capture_output=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.decode().startswith(f"error: --model {path} cannot fill in the middle: its vocabulary lacks")
    assert done.stderr.count(b"\n") == 1
