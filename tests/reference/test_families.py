"""The table of the models that load is the docs', and the tests that it names exist."""

from __future__ import annotations

import ast
from pathlib import Path

from reference import families
from tests.helpers.cases import each

ROOT = Path(__file__).parents[2]
NAMED = sorted({test for family in families.FAMILIES for test in family.tests})


def test_the_page_has_the_table():
    text = families.PAGE.read_text(encoding="utf-8")
    assert text.partition(families.START)[2].partition(families.END)[0] == families.table()


@each("test", NAMED)
def test_a_named_test_exists(test: str):
    file, _, function = test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_family_has_a_proof():
    assert all(family.tests for family in families.FAMILIES)
