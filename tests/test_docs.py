"""The documentation says what the code says, and every public name has a docstring; `make docs` builds it."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import qwen_mlx
from qwen_mlx import QwenMLXError, convert, generate, load
from qwen_mlx.cli.command import kernel_failure
from reference.small_models import RandomModel, write_gguf
from tests.helpers.cases import each

ROOT = Path(__file__).parents[1]
DOORS = ("__main__", "generate", "chat", "convert", "evaluate", "selftest", "serve")


@each("page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_a_page_reads_as_a_file_too(page: str):
    """Links lead somewhere, and what only Sphinx understands stands in a comment."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    assert not re.search(r"\{[\w:-]+\}`|^`{3,}\{|^:::", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL), re.MULTILINE)


def public() -> dict[str, object]:
    """Every public class and function of the package by its name, commands left out: those have --help."""
    found = {}
    for module in pkgutil.walk_packages(qwen_mlx.__path__, "qwen_mlx."):
        if module.name.split(".")[1] in ("cli", *DOORS):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            own = getattr(value, "__module__", "") == module.name and not name.startswith("_")
            if own and (inspect.isclass(value) or inspect.isfunction(value)):
                found[f"{module.name}.{name}"] = value
    return found


def listed() -> dict[str, list[str]]:
    """What the lists of docs/api.md link to, full names of objects and modules, with the members that are named."""
    found = {}
    text = (ROOT / "docs" / "api.md").read_text()
    for label, path, members in re.findall(r"^- \[`([\w./]+)`\]\(\.\./(\S+)\.py\)(.*)$", text, re.MULTILINE):
        assert not label.endswith(".py") or f"qwen_mlx/{label}" == f"{path}.py"
        module = path.replace("/", ".")
        found[module if label.endswith(".py") else f"{module}.{label}"] = re.findall("`(.+?)`", members)
    return found


LISTED = listed()


def described(name: str) -> bool:
    """docs/api.md lists the name, or the file it is from, and so shows its methods."""
    return any(name in LISTED for name in (name, name.rpartition(".")[0]))


PUBLIC = public()


@each("name", PUBLIC)
def test_public_names_have_docstrings(name: str):
    value = PUBLIC[name]
    text = value.__doc__ or ""
    assert text.strip()
    assert not text.startswith(f"{value.__name__}("), "dataclasses write themselves one: that is none"
    if inspect.isclass(value) and (described(name) or value.__name__ in qwen_mlx.__all__):
        for member, function in vars(value).items():
            if not member.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
                inherited = any(getattr(base, member, None) for base in value.__mro__[1:])
                assert function.__doc__ or inherited, f"{name}.{member}"


def test_what_the_api_page_lists_exists():
    assert len(LISTED) > 20
    for name, members in LISTED.items():
        for member in members or [""]:
            pkgutil.resolve_name(f"{name}.{member}".rstrip("."))
    assert any(described(name) for name in PUBLIC)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple:
    path = Path(write_gguf(tmp_path_factory.mktemp("docs") / "small.gguf", RandomModel()))
    return path, *load(path)


def without_mlx() -> None:
    code = "import sys; sys.modules['mlx.core'] = None; import qwen_mlx.backend"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    raise QwenMLXError(done.stderr.strip().splitlines()[-1].partition("QwenMLXError: ")[2])


def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from qwen_mlx.ops import dispatch; dispatch.switched_off()"
    environment = {**os.environ, "QWEN_MLX_KERNELS": "fast"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    raise QwenMLXError(done.stderr.strip().splitlines()[-1].partition("QwenMLXError: ")[2])


def refused_kernel() -> None:
    raise QwenMLXError(kernel_failure("[metal::Device] Unable to load kernel custom_kernel_qwen_matvec_q4_k"))


def not_finite(model, tokenizer) -> None:
    norm = model.model.norm
    before, norm.weight = norm.weight, norm.weight * float("nan")
    try:
        generate(model, tokenizer, "x", max_tokens=2)
    finally:
        norm.weight = before


def test_every_message_of_the_troubleshooting_page_is_raised(small, tmp_path: Path, monkeypatch):
    path, model, tokenizer = small
    (tmp_path / "text.gguf").write_text("hello " * 100)
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-5000])
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    cases: dict[str, Callable[[], object]] = {
        "MLX cannot be loaded": without_mlx,
        "QWEN_MLX_KERNELS is": lambda: kernels(monkeypatch),
        "The kernel of …": refused_kernel,
        "…: no such file or folder; it": lambda: load(tmp_path / "missing.gguf"),
        "…: no such file or folder, not": lambda: load("Qwen/Nothing-Here"),
        "…: not a GGUF": lambda: load(tmp_path / "text.gguf"),
        "…: tensor …": lambda: load(tmp_path / "cut.gguf"),
        "…: damaged or not": lambda: qwen_mlx.PromptCache.load(tmp_path / "bad.safetensors", model),
        "The prompt has": lambda: generate(model, tokenizer, "x " * 1000),
        "The model's logits": lambda: not_finite(model, tokenizer),
        "… is …, expected …": lambda: generate(model, tokenizer, "x", top_p=0),
        "There is no argument": lambda: generate(model, tokenizer, "x", temperatur=0),
    }
    headings = re.findall(r"^### (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) == len(cases)
    for heading, (start, call) in zip(headings, cases.items()):
        assert heading.startswith(start)
        with pytest.raises(QwenMLXError) as caught:
            call()
        pattern = ".*".join(re.escape(part) for part in heading.split("…"))
        assert re.match(pattern, str(caught.value), re.DOTALL), f"{heading}\n{caught.value}"


def test_the_convert_command_of_the_readme(small, tmp_path: Path):
    convert(small[0], tmp_path / "out")
    assert load(tmp_path / "out")[0].config == small[1].config
