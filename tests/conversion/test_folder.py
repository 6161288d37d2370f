"""The folder that a conversion writes, where it replaces one: only a model's, and there is always one or the other."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_mlx.conversion import folder as module
from qwen_mlx.conversion.folder import replaced_folder, temporary_prefix
from qwen_mlx.errors import QwenMLXError


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def replace(target: Path) -> None:
    with replaced_folder(target, 0, True) as new:
        write(new, config__json='{"model_type": "qwen2"}', conversion__json="[]")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"config__json": '{"model_type": "qwen2"}', "index__html": ""}, "'index.html', which no conversion writes"),
        ({"config__json": '{"port": 80}', "README__md": ""}, "names no model_type"),
        ({"config__json": "nonsense"}, "not valid JSON"),
    ],
)
def test_force_replaces_only_what_a_conversion_wrote(tmp_path: Path, files: dict[str, str], word: str):
    target = write(tmp_path / "web", **files)
    before = sorted(target.iterdir())
    with pytest.raises(QwenMLXError, match=word):
        replace(target)
    assert sorted(target.iterdir()) == before
    assert sorted(tmp_path.iterdir()) == [target]


def test_a_folder_within_is_foreign(tmp_path: Path):
    target = write(tmp_path / "web", config__json='{"model_type": "qwen2"}')
    write(target / ".git")
    with pytest.raises(QwenMLXError, match=r"'\.git', which no conversion writes"):
        replace(target)


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_model_is_replaced(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch):
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda *_: False)
    target = write(tmp_path / "out", config__json='{"model_type": "old"}')
    replace(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "qwen2" in (target / "config.json").read_text()


@pytest.mark.parametrize("which", ["old", "new"])
def test_the_old_model_stays_where_a_folder_cannot_be_renamed(
    tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
):
    """On file systems that cannot exchange two folders."""
    target, rename = write(tmp_path / "out", config__json='{"model_type": "old"}'), Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path == target if which == "old" else path.parent == tmp_path and to == target:
            raise OSError(errno.EIO, "Input/output error", str(path), None, str(to))
        return rename(path, to)

    monkeypatch.setattr(module, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(QwenMLXError, match="cannot be"):
        replace(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "old" in (target / "config.json").read_text()


def test_the_name_is_never_without_a_model(tmp_path: Path):
    """Killed at any moment, one of the two is there; the next run removes the rest."""
    target = write(tmp_path / "out", config__json='{"model_type": "qwen2"}')
    code = (
        "import os, signal, sys, shutil; from pathlib import Path; from qwen_mlx.conversion import folder\n"
        "shutil.rmtree = lambda *a, **b: os.kill(os.getpid(), signal.SIGKILL)\n"  # after the exchange
        "with folder.replaced_folder(Path(sys.argv[1]), 0, True) as new:\n"
        "    (new / 'config.json').write_text('{\"model_type\": \"new\"}')"
    )
    assert subprocess.run([sys.executable, "-c", code, target], check=False).returncode == -9
    assert "new" in (target / "config.json").read_text()
    assert len(list(tmp_path.iterdir())) == 2
    replace(tmp_path / "another")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "out"]


def test_a_number_in_use_again_hides_nothing(tmp_path: Path):
    """A temporary folder of a process whose number another has now."""
    left = write(tmp_path / f"{temporary_prefix(tmp_path / 'out')}{os.getppid()}-x" / "model", config__json="{}")
    replace(tmp_path / "new")
    assert left.exists(), "it may be of a process that still runs"
    old = time.time() - 7200
    os.utime(left.parent, (old, old))
    replace(tmp_path / "newer")
    assert not left.exists()
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_all_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[str] = []
    monkeypatch.setattr(module, "sync", lambda descriptor: synced.append(f"{(tmp_path / 'out').exists()}"))
    monkeypatch.setattr(module, "sync_folder", lambda folder: synced.append(folder.name))
    replace(tmp_path / "out")
    assert synced[:2] == ["False", "False"]
    assert synced[3:] == [tmp_path.name]


def test_a_source_that_cannot_be_read_is_blamed(tmp_path: Path):
    with pytest.raises(QwenMLXError, match=r"source: cannot be read"), replaced_folder(tmp_path / "out", 0, False):
        open(tmp_path / "source")  # noqa: SIM115 (fails)
    assert list(tmp_path.iterdir()) == []
