"""The house's rules, read from the source: what may import what."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qwen_mlx"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the bottom up: a room may import the rooms before it, for types too, and none after it.
ROOMS = ["errors", "backend", "gguf", "text", "ops", "model", "parallel", "generation", "evaluation", "loading"]
ROOMS += ["conversion", "cli"]
DOORS = ["generate", "chat", "convert", "evaluate", "selftest"]


def imports(path: Path, package: Path = PACKAGE) -> set[str]:
    """Absolute names of everything that a file imports, inside functions and for types too."""
    found = set()
    own = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names} | {name}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_torch_in_the_package_and_mlx_through_the_backend_only(path: Path):
    found = {name.split(".")[0] for name in imports(path)}
    assert not found & {"torch", "transformers", "reference", "tests", "benchmarks"}
    if "backend" not in path.parts:
        assert not {name for name in imports(path) if name.split(".")[:2] == ["mlx", "core"]}


def test_every_file_is_in_a_room():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} == {"__init__", *ROOMS, *DOORS}


def too_high(path: Path) -> list[str]:
    """What a file imports of rooms above its own; of the doors too, which nothing may import."""
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        return []
    own = len(ROOMS) if room in DOORS else ROOMS.index(room)
    parts = [name.split(".") for name in imports(path) if name.startswith("qwen_mlx.")]
    rooms = {name[1]: ".".join(name) for name in parts if name[1] in ROOMS + DOORS}
    return [name for other, name in rooms.items() if other in DOORS or ROOMS.index(other) > own]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_imports_a_higher_one(path: Path):
    assert not too_high(path)


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("root", [PACKAGE, *(PACKAGE.parent / name for name in ("reference", "tests", "benchmarks"))])
def test_no_circle(root: Path):
    """No file imports itself by way of others, not even for a type."""
    files = {module_of(path, root): path for path in sorted(root.rglob("*.py")) if path != root / "__init__.py"}
    edges = {name: {other for other in imports(path, root) if other in files} - {name} for name, path in files.items()}
    while leaves := [name for name, others in edges.items() if not others & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges


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
