"""The installed program `qwen-mlx`, started by the script that pip writes for it, keeps the promises of `python -m`."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as T

import qwen_mlx
from qwen_mlx.cli.main import COMMANDS
from reference.small_models import RandomModel, write_gguf
from tests.helpers.cases import each

DOORS = ("generate", "chat", "serve", "convert", "evaluate", "selftest")  # that `python -m qwen_mlx.NAME` opens

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
# pip's own template, from pip._vendor.distlib.scripts.
SCRIPT = """#!{python}
# -*- coding: utf-8 -*-
import re
import sys
from {module} import {function}
if __name__ == '__main__':
    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])
    sys.exit({function}())
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed script, for this checkout."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert list(scripts) == ["qwen-mlx"]
    module, _, function = scripts["qwen-mlx"].partition(":")
    path = tmp_path_factory.mktemp("bin") / "qwen-mlx"
    path.write_text(SCRIPT.format(python=sys.executable, module=module, function=function))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("small") / "m.gguf", RandomModel(max_position_embeddings=256), T.Q8_0)


def start(script: Path, *arguments: str | Path, **options: object) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | options.pop("variables", {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([str(script), *map(str, arguments)], env=environment, **streams)


def run(script: Path, *arguments: str | Path, **options: object) -> tuple[int, str, str]:
    process = start(script, *arguments, **options)
    out, error = process.communicate(timeout=120)
    return process.returncode, (out or b"").decode(), error.decode()


def test_help_lists_every_command_in_a_line_and_version_is_the_package_s(script: Path):
    code, out, error = run(script, "--help")
    assert (code, error) == (0, "")
    for name, purpose in COMMANDS.items():
        assert [line.split() for line in out.splitlines()].count([name, *purpose.split()]) == 1
    version = (0, f"qwen-mlx {qwen_mlx.__version__}\n", "")
    assert run(script, "--version") == run(script, "generate", "--version") == version


def test_the_package_is_the_program_and_a_door_hides_no_function(script: Path):
    package = subprocess.run([sys.executable, "-m", "qwen_mlx", "--help"], capture_output=True, text=True, check=True)
    assert package.stdout == run(script, "--help")[1]
    for name in DOORS:
        with pytest.raises(ImportError, match=f"python -m qwen_mlx.{name}"):
            importlib.import_module(f"qwen_mlx.{name}")
    assert callable(qwen_mlx.generate)
    assert callable(qwen_mlx.convert)


@each("name", COMMANDS)
def test_a_command_s_help_names_it_as_it_was_started_and_imports_no_mlx(script: Path, name: str):
    code, out, error = run(script, name, "--help")
    assert (code, error) == (0, "")
    assert out.startswith(f"usage: qwen-mlx {name} ")
    words = [f"qwen_mlx.{name}"] if name in DOORS else ["qwen_mlx", name]
    module = [sys.executable, "-X", "importtime", "-m", *words, "--help"]
    done = subprocess.run(module, capture_output=True, text=True, check=True)
    program = f"python -m qwen_mlx.{name}" if name in DOORS else f"qwen-mlx {name}"
    assert done.stdout.startswith(f"usage: {program} ")
    imported = {line.split()[-1] for line in done.stderr.splitlines()}
    assert not {"mlx", "numpy", "tokenizers", "huggingface_hub"} & imported


MISTAKES = {
    "no command": ([], "no command is given: generate, chat, serve, "),
    "wrong command": (["genrate"], "There is no command 'genrate': did you mean 'generate'?"),
    "unlike any command": (["xyz"], "choose from chat, convert, embed, evaluate, export, fuse, generate"),
    "the old name of an option": (["--prompt", "x"], "a command comes first, such as qwen-mlx generate --prompt x;"),
    "wrong option": (["generate", "--promt-file", "x"], "--promt-file x; did you mean --prompt-file?"),
    "no prompt": (["generate"], "no prompt: give --prompt"),
    "no model": (["generate", "--model", "/nonexistent.gguf", "--prompt", "x"], "/nonexistent.gguf"),
    "chat": (["chat", "--max-tool-rounds", "0"], "--max-tool-rounds is 0"),
    "convert": (["convert", "/nonexistent.gguf", "out"], "/nonexistent.gguf"),
    "export": (["export", "/nonexistent.gguf", "out.gguf"], "/nonexistent.gguf"),
    "embed": (["embed", "--model", "x"], "there is no text"),
    "score": (["score", "--model", "/nonexistent.gguf", "x"], "/nonexistent.gguf"),
    "evaluate": (["evaluate", "--text", "/nonexistent.txt"], "/nonexistent.txt"),
}


@each("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(script: Path, case: str, tmp_path: Path):
    arguments, words = MISTAKES[case]
    code, out, error = run(script, *arguments, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert words in error


def test_a_working_folder_that_is_gone_is_said_to_be(script: Path, tmp_path: Path):
    folder = tmp_path / "gone"
    folder.mkdir()
    shell = f"rmdir {folder} && exec {shlex.quote(str(script))} convert model.gguf out"
    done = subprocess.run(["sh", "-c", shell], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the working folder is gone; change to one that is there.\n"


def test_ctrl_c_keeps_what_was_written_and_exits_130(script: Path, small: Path):
    process = start(script, "generate", "--model", small, "--prompt", "hello", "--temp", "0", "--max-tokens", "240")
    assert len(process.stdout.read(5)) == 5
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert b"Traceback" not in error
    assert b"generation: " in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_program_imports_is_quiet(script: Path, tmp_path: Path, number: signal.Signals):
    """The first import that the command itself needs is held up, until the signal comes."""
    (tmp_path / "shlex.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    process = start(script, "convert", "a", "b", variables={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (128 + number, b"")


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_the_chat_saves_its_cache(script: Path, small: Path, tmp_path: Path, number: signal.Signals):
    cache = tmp_path / "c.cache"
    process = start(
        script, "chat", "--model", small, "--prompt-cache", cache, "--max-tokens", "5", stdin=subprocess.PIPE
    )
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    while b"tok/s" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (128 + number, b"")
    assert cache.stat().st_size > 1000


def test_a_pipe_whose_reader_goes_away_is_quiet(script: Path, small: Path):
    process = start(script, "generate", "--model", small, "--prompt", "hello", "--temp", "0", "--max-tokens", "200")
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 141
    assert b"Traceback" not in error
    assert b"Exception" not in error


@pytest.mark.heavy
@pytest.mark.linux  # has /dev/full
@each("arguments", [["--help"], ["--version"], ["generate", "--list-models"], ["generate", "-h"]])
def test_a_full_disk_is_told_and_a_closed_output_is_not(script: Path, arguments: list[str]):
    for variables in ({}, {"PYTHONUNBUFFERED": ""}):
        with open("/dev/full", "wb") as full:
            code, _, error = run(script, *arguments, stdout=full, variables=variables)
        assert (code, error) == (2, "error: standard output cannot be written (No space left on device).\n")
    shell = f"{script} {' '.join(arguments)} >&-"
    done = subprocess.run(
        shell, shell=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.linux
def test_errors_that_cannot_be_written_change_no_exit_code(script: Path):
    with open("/dev/full", "wb") as full:
        process = start(script, "genrate", stderr=full)
        assert process.wait(30) == 2


def test_help_is_quick(script: Path):
    """Some 0.1 s; the processor's time is counted, which other work does not stretch as far."""

    def seconds() -> float:
        times = os.times()
        return times.children_user + times.children_system

    costs = []
    for _ in range(5):
        before = seconds()
        run(script, "generate", "--help")
        costs.append(seconds() - before)
    assert min(costs) < 0.3
