"""Files that appear complete or not at all, whatever ends the process, and files that are too large to be read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_mlx.errors import LONGEST_SENTENCE, GGUFError
from qwen_mlx.text import files
from qwen_mlx.text.files import LEFTOVER, QwenMLXError, atomic_write, check_folder, read_json


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(LEFTOVER)]


def test_a_later_run_removes_what_a_killed_one_left(tmp_path: Path):
    code = (
        "import os, signal, sys; from qwen_mlx.text.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as file:\n    file.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(left(tmp_path)) == 1
    check_folder(tmp_path / "b", "--prompt-cache")
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path):
    with atomic_write(tmp_path / "a") as first:
        first.write_text("1")
        with atomic_write(tmp_path / "b") as second:
            second.write_text("2")
        assert len(left(tmp_path)) == 1
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "1", "b": "2"}


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steps: list[str] = []
    replace = os.replace
    monkeypatch.setattr(files, "sync", lambda descriptor: steps.append(f"sync {os.fstat(descriptor).st_size > 99}"))
    monkeypatch.setattr(os, "replace", lambda *paths: (steps.append("replace"), replace(*paths)))
    monkeypatch.setattr(files, "sync_folder", lambda folder: steps.append(f"folder {folder == tmp_path}"))
    with atomic_write(tmp_path / "a") as file:
        file.write_text("x" * 100)
    assert steps == ["sync True", "replace", "folder True"]


def test_a_file_of_settings_without_end(tmp_path: Path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(3 << 30)  # a hole
    with pytest.raises(QwenMLXError, match="more than 32 MB"):
        read_json(tmp_path / "config.json")


def test_a_sentence_has_an_end():
    error = GGUFError("x" * 10**6)
    assert len(str(error)) < LONGEST_SENTENCE + 50
    assert str(error).endswith("(1,000,000 characters)")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have(name: str):
    with pytest.raises(QwenMLXError, match="no file can have this name"):
        files.read_text(name, "--system-file")
    with pytest.raises(QwenMLXError, match="not valid Unicode"):
        files.check_utf8("x\ud800", "--stop")
