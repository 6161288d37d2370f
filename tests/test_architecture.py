"""The house's rules, read from the source: what may import what."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers.cases import each

PACKAGE = Path(__file__).parents[1] / "qwen_mlx"
OTHERS = [PACKAGE.parent / name for name in ("reference", "tests", "benchmarks")]
FILES = sorted(PACKAGE.rglob("*.py"))
# From the bottom up: a room may import the rooms before it, for types too, and none after it.
ROOMS = ["errors", "backend", "gguf", "text", "ops", "model", "parallel", "generation", "evaluation", "encoding"]
ROOMS += ["loading", "training", "conversion", "server", "cli"]
DOORS = ["__main__", "generate", "chat", "convert", "evaluate", "selftest", "serve"]


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Absolute names of everything that a file imports, inside functions and for types too; the package itself is not
    among them where a file imports only modules of it.
    """
    found = set()
    own = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{name}.{alias.name}" for alias in node.names}
            found |= names if all(map(is_module, names)) else names | {name}
    return found


@each("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_torch_in_the_package_and_mlx_through_the_backend_only(path: Path):
    found = {name.split(".")[0] for name in imports(path)}
    assert not found & {"torch", "transformers", "reference", "tests", "benchmarks"}
    if "backend" not in path.parts:
        assert not {name for name in imports(path) if name.split(".")[:2] == ["mlx", "core"]}


def test_every_file_is_in_a_room():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} == {"__init__", *ROOMS, *DOORS}


def too_high(path: Path) -> list[str]:
    """A file's imports from rooms above its own, and from the doors, which nothing may import."""
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        return []
    own = len(ROOMS) if room in DOORS else ROOMS.index(room)
    parts = [name.split(".") for name in imports(path) if name.startswith("qwen_mlx.")]
    rooms = {name[1]: ".".join(name) for name in parts if name[1] in ROOMS + DOORS}
    return [name for other, name in rooms.items() if other in DOORS or ROOMS.index(other) > own]


@each("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_imports_a_higher_one(path: Path):
    assert not too_high(path)


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@each("root", [PACKAGE, *OTHERS], ids=lambda root: root.name)
def test_no_circle(root: Path):
    """No file imports itself by way of others, not even for a type."""
    files = {module_of(path, root): path for path in sorted(root.rglob("*.py")) if path != root / "__init__.py"}
    left = {name: imports(path, root) & files.keys() - {name} for name, path in files.items()}
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left


@pytest.mark.parametrize("root", OTHERS, ids=lambda root: root.name)
def test_helpers_are_shared_by_way_of_the_reference_and_of_tests_helpers(root: Path):
    """Tests import the reference, benchmarks and helpers; benchmarks the reference; and no test another test."""
    forbidden = {"reference": {"tests", "benchmarks"}, "benchmarks": {"tests"}, "tests": set()}[root.name]
    for path in sorted(root.rglob("*.py")):
        names = imports(path, root)
        assert not {name for name in names if name.split(".")[0] in forbidden}, path
        assert not {name for name in names if any(part.startswith("test_") for part in name.split("."))}, path


def test_the_package_imports_nothing_heavy():
    import subprocess

    code = "import sys, qwen_mlx; assert not {'mlx', 'numpy', 'tokenizers'} & set(sys.modules); qwen_mlx.nothing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "has no attribute 'nothing'" in result.stderr
