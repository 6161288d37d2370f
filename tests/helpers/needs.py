"""Finds what a test needs from the source alone: the names that it reaches, through helpers and fixtures of its file.

Nothing is imported, so that a file that needs PyTorch is known before it brings PyTorch into the process.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A test that reaches a name with one of these beginnings needs something.
NEEDS = {
    "torch": (
        "torch",
        "transformers",
        "mlx_lm",
        "accelerate",
        "sentencepiece",  # comes with mlx-lm
        "bitsandbytes",
        "compressed_tensors",
        "sentence_transformers",
        "peft",
        "safetensors.torch",
        "reference.lazy",
    ),
    "emulator": ("reference.emulator",),
    "nvrtc": ("nvidia", "tests.helpers.nvrtc"),
}


def of_name(name: str) -> set[str]:
    """The needs of something of this absolute name by itself."""
    return {need for need, starts in NEEDS.items() if any(f"{name}.".startswith(f"{s}.") for s in starts)}


@functools.cache
def file_of(module: str) -> Path | None:
    """The file of one of this repository's own modules that tests may reach; the package needs nothing."""
    if module.split(".")[0] not in ("tests", "reference", "benchmarks"):
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


class Source:
    """A file's imports and definitions, and the needs of each."""

    def __init__(self, path: Path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.package = ".".join(path.relative_to(ROOT).parent.parts)
        self.imports: dict[str, str] = {}
        self.nodes: dict[str, list[ast.AST]] = {}
        self.fixtures: set[str] = set()
        self.at_import: list[ast.AST] = []
        for node in self._statements(tree.body):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.imports |= self.names_of(node)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                self.nodes.setdefault(node.name, []).append(node)
                arguments = node.args.defaults if isinstance(node, ast.FunctionDef) else []
                self.at_import += [*node.decorator_list, *arguments]
                if any("fixture" in ast.dump(decorator) for decorator in node.decorator_list):
                    self.fixtures.add(node.name)
            else:
                for name in (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)):
                    self.nodes.setdefault(name.id, []).append(node)
                self.at_import.append(node)
        self._needs: dict[str, set[str]] = {}

    @staticmethod
    def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
        """The statements that an import of a module runs, those within `try` too."""
        found: list[ast.stmt] = []
        for node in body:
            if isinstance(node, ast.If) and any(n in ast.dump(node.test) for n in ("TYPE_CHECKING", "__name__")):
                continue
            found += Source._statements([*node.body, *node.handlers]) if isinstance(node, ast.Try) else [node]
        return found

    def names_of(self, node: ast.Import | ast.ImportFrom) -> dict[str, str]:
        """The local names that an import binds, and what they stand for."""
        if isinstance(node, ast.Import):
            return {a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names}
        parts = self.package.split(".")
        base = ".".join(
            [*parts[: len(parts) - node.level + 1], node.module or ""] if node.level else [node.module or ""]
        )
        return {a.asname or a.name: f"{base.rstrip('.')}.{a.name}" for a in node.names}

    def of_nodes(self, nodes: list[ast.AST]) -> set[str]:
        """The needs of statements: through the names in them, their own imports, and attributes of modules."""
        needs: set[str] = set()
        for node in (inner for outer in nodes for inner in ast.walk(outer)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for name in self.names_of(node).values():
                    needs |= of_absolute(name) | of_import(name)
            elif isinstance(node, ast.Name) and node.id not in self.fixtures:
                needs |= self.of(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in self.imports:
                needs |= of_absolute(f"{self.imports[node.value.id]}.{node.attr}")
            elif isinstance(node, ast.arg) and node.arg in self.fixtures:
                needs |= self.of(node.arg)
        return needs

    def of(self, name: str) -> set[str]:
        """The needs of a name of this file."""
        if name not in self._needs:
            self._needs[name] = set()  # for a function that calls itself
            needs = self.of_nodes(self.nodes.get(name, []))
            if name in self.imports:
                needs |= of_absolute(self.imports[name])
            self._needs[name] = needs
        return self._needs[name]

    @functools.cached_property
    def on_import(self) -> set[str]:
        """The needs of importing this file: its eager imports, and the code outside of functions."""
        needs = self.of_nodes(self.at_import) & {"torch"}
        for name in self.imports.values():
            needs |= of_import(name)
        return needs


@functools.cache
def source(path: Path) -> Source:
    """The file, parsed once."""
    return Source(path)


@functools.cache
def of_absolute(name: str) -> set[str]:
    """The needs of a name of another file."""
    module, _, last = name.rpartition(".")
    path = file_of(module) if module else None
    return of_name(name) | (source(path).of(last) if path and not of_name(module) else set())


def of_import(name: str) -> set[str]:
    """The needs of an import itself: a peer, or a module of this repository that imports one."""
    if name.startswith("reference.lazy"):
        return set()
    own = [path for module in (name, name.rpartition(".")[0]) if module and (path := file_of(module))]
    if not own:
        return of_name(name) & {"torch"}
    needs: set[str] = set()
    for path in own:
        needs |= _importing(path)
    return needs


_pending: set[Path] = set()


def _importing(path: Path) -> set[str]:
    if path in _pending:
        return set()
    _pending.add(path)
    try:
        return source(path).on_import
    finally:
        _pending.discard(path)


def of_file(path: Path) -> set[str]:
    """The needs of importing a test file."""
    return _importing(path)


def of_test(path: Path, function: str) -> set[str]:
    """The needs of a test function: its names and fixtures, its file's, and the emulator in tests/emulator."""
    file, own = source(path), {"emulator"} if path.parent == ROOT / "tests" / "emulator" else set()
    return own | file.of(function) | file.of("pytestmark") | of_file(path)
