"""The mutation run, on a small project of its own; and its mutants of this one's sources."""

from __future__ import annotations

import ast
import json
import random
import subprocess
from pathlib import Path

import pytest

from tests import mutate
from tests.helpers.mutants import of_kernel, of_python, statement_lines

SOURCE = """
def doubled(x, times=2):
    return x * times


def larger(a, b):
    return a if a > b else b


def never_called(a):
    a.clear()
"""
TESTS = """
from qwen_mlx.model.small import doubled, larger

def test_doubled():
    assert doubled(3) == 6

def test_larger_sees_nothing():
    assert larger(1, 1) == 1
"""
EQUIVALENT = """
[[mutant]]
file = "qwen_mlx/model/small.py"
before = "return a if a > b else b"
after = "return a if a >= b else b"
reason = "equal numbers are alike"
"""


def test_mutants_of_python():
    text = (
        "def f(x: int = -1) -> int | None:\n    if x is not None and len('é') < min(x, 2):\n        g(x)\n    x += 1\n"
    )
    changed = [mutant.apply(text).split("\n") for mutant in of_python(text)]
    assert {new.strip() for lines in changed for new, old in zip(lines, text.split("\n")) if new != old} == {
        "def f(x: int = 1) -> int | None:",
        "def f(x: int = -2) -> int | None:",
        "if not (x is not None and len('é') < min(x, 2)):",
        "if x is None and len('é') < min(x, 2):",
        "if x is not None or len('é') < min(x, 2):",
        "if x is not None and len('é') <= min(x, 2):",
        "if x is not None and len('é') < max(x, 2):",
        "if x is not None and len('é') < min(x, 3):",
        "pass",
        "x += 2",
    }
    assert of_python("def f():\n    raise ValueError(f'{1 + 1} < {2}')\n") == []


def test_the_lines_of_a_statement():
    text = "def f(\n  a=1,\n):\n  if a:\n    return (\n      a\n    )\n  try: a()\n  except E:\n    pass\n"
    assert [statement_lines(text, line) for line in range(1, 11)] == [
        *[{1, 2, 3}] * 3,
        {4},
        *[{5, 6, 7}] * 3,
        {8},
        {9},
        {10},
    ]


def test_mutants_of_a_kernel():
    text = "// a < b\n#define N 4\ntemplate <int N>\nif (a < b && i == 2u) {\n  threadgroup_barrier(x);\n}\n"
    assert {mutant.apply(text).split("\n", 3)[3] for mutant in of_kernel(text)} == {
        "if (a < b && i != 2u) {\n  threadgroup_barrier(x);\n}\n",
        "if (a < b && i == 21u) {\n  threadgroup_barrier(x);\n}\n",
        "if (a < b && i == 2u) {\n  ;\n}\n",
        "if (a < b || i == 2u) {\n  threadgroup_barrier(x);\n}\n",
        "if (a <= b && i == 2u) {\n  threadgroup_barrier(x);\n}\n",
    }


def test_mutants_of_the_package_are_other_programs():
    """One of each of 30 files, by lot: it parses, and means something else."""
    lots = random.Random(0)
    files = lots.sample(sorted((mutate.ROOT / "qwen_mlx").rglob("*.py")), 30)
    for text in (path.read_text(encoding="utf-8") for path in files):
        if mutants := of_python(text):
            changed = lots.choice(mutants).apply(text)
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))


@pytest.mark.slow
def test_a_run_says_what_no_test_sees_and_leaves_the_tree_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    pytest.importorskip("pytest_cov")
    files = {"qwen_mlx/model/small.py": SOURCE, "tests/model/test_small.py": TESTS, mutate.EQUIVALENT: EQUIVALENT}
    files |= {".gitignore": ".mutants\n", "reference/__init__.py": "", "qwen_mlx/__init__.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    with pytest.raises(SystemExit, match="--trace first"):
        mutate.main([], tmp_path)
    assert mutate.main(["--trace", "tests"], tmp_path) == 0
    assert mutate.main(["qwen_mlx/model"], tmp_path) == 1
    results = [json.loads(line) for line in (tmp_path / ".mutants/results.jsonl").read_text().splitlines()]
    assert {(result["after"], result["outcome"]) for result in results} == {
        ("def doubled(x, times=3):", "killed"),
        ("return x / times", "killed"),
        ("return a if not (a > b) else b", "survived"),
        ("pass", "untested"),
    }
    assert "equal numbers are alike" in capfd.readouterr().out
    mutate.main(["qwen_mlx/model"], tmp_path)
    assert len((tmp_path / ".mutants/results.jsonl").read_text().splitlines()) == 4, "nothing is run again"
    assert {name: (tmp_path / name).read_text() for name in files} == files
