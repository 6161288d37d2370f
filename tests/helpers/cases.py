"""Many quick cases in one test, which names every case that fails."""

from __future__ import annotations

import functools
import inspect
import itertools
import reprlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

Ids = Sequence[Any] | Callable[[Any], Any] | None


def each(names: str | Sequence[str], cases: Iterable[Any], ids: Ids = None) -> Callable[[Callable], Callable]:
    """A decorator with the arguments of pytest.mark.parametrize that makes one test of all cases, each a subtest.

    Several of them make every combination. A case has a `tmp_path` and a `monkeypatch` of its own and an empty
    `capsys` and `caplog`; other fixtures are shared.
    """
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    axis = []
    for index, case in enumerate(list(cases)):
        values = dict(zip(names, case if len(names) > 1 else [case], strict=True))
        if callable(ids):
            label = "-".join(str(ids(value)) for value in values.values())
        else:
            label = reprlib.repr(case) if ids is None else str(list(ids)[index])
        axis.append((label, values))
    assert axis, "no cases"

    def decorate(function: Callable) -> Callable:
        test, axes = getattr(function, "each", (function, []))
        axes = [axis, *axes]
        parameters = inspect.signature(test).parameters
        given = {name for one in axes for name in one[0][1]}
        assert given <= parameters.keys(), given - parameters.keys()

        @functools.wraps(test)
        def run(subtests: pytest.Subtests, **fixtures: Any) -> None:
            for number, combination in enumerate(itertools.product(*axes)):
                with subtests.test("-".join(label for label, _ in combination)), ExitStack() as stack:
                    values = {name: value for _, case in combination for name, value in case.items()}
                    test(**fixtures | fresh(fixtures, number, stack) | values)

        own = [p.replace(kind=p.KEYWORD_ONLY) for name, p in parameters.items() if name not in given]
        first = inspect.Parameter("subtests", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([first, *own])
        run.each = (test, axes)
        return run

    return decorate


def fresh(fixtures: dict[str, Any], number: int, stack: ExitStack) -> dict[str, Any]:
    """The fixtures that pytest would make anew for each test."""
    own: dict[str, Any] = {}
    if "tmp_path" in fixtures:
        own["tmp_path"] = Path(fixtures["tmp_path"]) / f"case{number}"
        own["tmp_path"].mkdir()
    if "monkeypatch" in fixtures:
        own["monkeypatch"] = stack.enter_context(pytest.MonkeyPatch.context())
    if "capsys" in fixtures:
        fixtures["capsys"].readouterr()
    if "caplog" in fixtures:
        fixtures["caplog"].clear()
    return own
