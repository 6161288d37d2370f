"""Every case of a test of many runs, with fixtures of its own, and every one that fails is named."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.cases import each


class Subtests:
    """Notes the names of cases, and which of them fail."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.failed: list[str] = []

    @contextmanager
    def test(self, name: str) -> Iterator[None]:
        self.ran.append(name)
        try:
            yield
        except AssertionError:
            self.failed.append(name)


@each(("count", "word"), [(1, "one"), (2, "two")], ids=str)
@each("letter", "abc")
def cases(count: int, word: str, letter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(tmp_path.iterdir())
    (tmp_path / letter).touch()
    monkeypatch.setenv("QWEN_MLX_CASE", word)
    assert (count, letter) not in ((1, "b"), (2, "c"))


def test_every_combination_runs_and_all_that_fail_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    subtests = Subtests()
    monkeypatch.delenv("QWEN_MLX_CASE", raising=False)
    assert list(inspect.signature(cases).parameters) == ["subtests", "tmp_path", "monkeypatch"]
    cases(subtests, tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert subtests.ran == [f"{count}-{word}-'{x}'" for count, word in ((1, "one"), (2, "two")) for x in "abc"]
    assert subtests.failed == ["1-one-'b'", "2-two-'c'"]
    with pytest.raises(KeyError):
        monkeypatch.delenv("QWEN_MLX_CASE")


def test_no_case_and_a_name_that_the_test_does_not_take_are_mistakes():
    with pytest.raises(AssertionError, match="no cases"):
        each("x", [])
    with pytest.raises(AssertionError, match="word"):
        each("word", ["x"])(lambda letter: None)
