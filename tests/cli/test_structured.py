"""`generate` with a form for its text: the options, and a JSON object on standard output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from qwen_mlx import QwenMLXError
from qwen_mlx.cli import generate, structured
from reference.small_models import RandomModel, write_gguf

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = write_gguf(tmp_path_factory.mktemp("small") / "m.gguf", RandomModel())
    return [sys.executable, "-m", "qwen_mlx.generate", "--model", str(path), "--prompt", "hello"]


def read(*arguments: str | Path):
    return structured.read(generate.parser().parse_args(list(map(str, arguments))))


def test_each_option_asks_for_its_form(tmp_path: Path):
    (tmp_path / "f").write_text("text of f")
    assert read("--prompt", "x") is None
    for options, kind, value in (
        (["--json-schema", tmp_path / "f"], "json_schema", "text of f"),
        (["--json-object"], "json_object", True),
        (["--regex", "a+"], "regex", "a+"),
        (["--choice", "a", "--choice", "b"], "choices", ["a", "b"]),
        (["--grammar", tmp_path / "f"], "grammar", "text of f"),
    ):
        assert {name: v for name, v in read(*options).items() if v} == {kind: value}
    with pytest.raises(QwenMLXError, match="--json-schema /nowhere: cannot be read"):
        read("--json-schema", "/nowhere")
    with pytest.raises(QwenMLXError, match="--min-tokens does not go with structured output"):
        read("--json-object", "--min-tokens", "3")


@pytest.mark.heavy
def test_the_text_satisfies_the_schema(command: list[str], tmp_path: Path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    options = ["--json-schema", str(tmp_path / "schema.json"), "--seed", "1"]
    done = subprocess.run([*command, *options], capture_output=True, timeout=120, check=True)
    jsonschema.validate(json.loads(done.stdout), SCHEMA)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--regex", "(a"], "error: unclosed group"),
        (["--json-object", "--regex", "a"], "not allowed with argument"),
        (["--json-object", "--fim-file", "{f}"], "not allowed with argument"),
    ],
)
def test_mistakes_are_one_sentence(command: list[str], tmp_path: Path, options: list[str], words: str):
    (tmp_path / "f").write_text("<|cursor|>")
    options = [option.format(f=tmp_path / "f") for option in options]
    done = subprocess.run([*command, *options], capture_output=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == b""
    assert words in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


@pytest.mark.heavy
def test_a_form_does_not_go_with_a_fill(command: list[str], tmp_path: Path):
    (tmp_path / "f").write_text("<|cursor|>")
    done = subprocess.run(
        [*command[:-2], "--json-object", "--fim-file", str(tmp_path / "f")],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: Structured output does not go with fill in the middle")
