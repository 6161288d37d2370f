"""The house's rules, read from the source: what may import what."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qwen_mlx"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the bottom up: a module may import those of its own line and of the lines before it.
LAYERS = [
    {"errors", "blas"},
    {"backend", "gguf.unpack"},
    {"gguf.blocks", "cli", "files", "link"},
    {"gguf.reader", "ops", "safetensors_writer", "hub.transfer", "hub.repository"},
    {"hub.client"},
    {"hub.default"},
    {"hub.packages"},
    {"hub.download"},
    {"hub.names", "hub"},
    {"config", "cache", "layers", "tools", "terminal", "chat_template"},
    {"gguf.names", "model", "batch_cache", "step", "batch_step", "display", "tokenizer", "sampling", "shards"},
    {"defaults", "weights", "parallel"},
    {"loading"},
    {"decoding", "prompt_cache", "sources", "storage"},
    {"drafts", "evaluation"},
    {"speculative"},
    {"generation"},
    {"conversion", "batch", "session"},
    {"generate", "convert", "evaluate", "selftest", "selftest_decoding"},
    {"chat"},
]


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


class Run(ast.NodeTransformer):
    """Leaves out what only a type checker reads."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, inside functions too."""
    found = set()
    package = ["qwen_mlx", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(Run().visit(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names} | {name}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_torch_in_the_package_and_mlx_through_the_backend_only(path: Path):
    found = {name.split(".")[0] for name in imports(path)}
    assert not found & {"torch", "transformers", "reference", "tests", "benchmarks"}
    if path.name != "backend.py":
        assert not {name for name in imports(path) if name.split(".")[:2] == ["mlx", "core"]}


def layer(name: str) -> int | None:
    name = "ops" if name.startswith("ops") else name
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_layer_imports_a_higher_one(path: Path):
    name = module(path)
    if name in ("", "gguf", "metal"):
        return
    own = layer(name)
    assert own is not None, f"{name} has no place in LAYERS"
    for imported in imports(path):
        if imported.startswith("qwen_mlx."):
            other = layer(imported.removeprefix("qwen_mlx."))
            assert other is None or other <= own, f"{name} imports {imported}"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the last NumPy for Python 3.10 has older types")
def test_types_hold(tmp_path: Path):
    """mypy, strict as pyproject.toml says."""
    import subprocess

    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_package_imports_nothing_heavy():
    import subprocess

    code = "import sys, qwen_mlx; assert not {'mlx', 'numpy', 'tokenizers'} & set(sys.modules); qwen_mlx.nothing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no attribute 'nothing'" in result.stderr


def test_functions_stay_functions_when_the_commands_of_that_name_are_imported():
    import subprocess

    code = (
        "import qwen_mlx, qwen_mlx.generate, qwen_mlx.convert\n"
        "from qwen_mlx.convert import main\n"
        "from qwen_mlx import convert, generate\n"
        "print(generate.__module__, convert.__module__, qwen_mlx.generate is generate)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["qwen_mlx.generation", "qwen_mlx.conversion", "True"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_small(path: Path):
    """A file of more than 400 lines has more than one purpose."""
    assert len(path.read_text().splitlines()) <= 400
