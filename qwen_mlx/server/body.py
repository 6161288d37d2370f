"""A request's JSON, taken field by field: what nobody takes is refused."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from .errors import RequestError

DEEPEST = 64  # levels of arrays and objects
T = TypeVar("T")


class Body:
    """The fields of a JSON object. Each method takes one, which is None or `default` where it is missing or null;
    `done` refuses those that were not taken. Raises RequestError (400) that names the field."""

    def __init__(self, fields: Mapping[str, Any], where: str = "") -> None:
        self._fields, self._where = dict(fields), where
        self._known: set[str] = set()

    @classmethod
    def read(cls, raw: bytes) -> Body:
        """Parses a request's bytes."""
        try:
            data = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        except RecursionError:
            raise RequestError(400, f"The body is nested more than {DEEPEST} levels deep.") from None
        except ValueError as error:
            raise RequestError(400, f"The body is not JSON in UTF-8: {str(error)[:200]}.") from None
        if not isinstance(data, dict):
            raise RequestError(400, f"The body is {_kind(data)}, expected a JSON object.")
        if _depth(data) > DEEPEST:
            raise RequestError(400, f"The body is nested more than {DEEPEST} levels deep.")
        return cls(data)

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raises RequestError about a field."""
        raise RequestError(400, f"{self._where}{name} {why}.", self._where + name)

    def take(self, name: str, default: Any = None) -> Any:
        """A field of any type."""
        self._known.add(name)
        value = self._fields.pop(name, None)
        return default if value is None else value

    def integer(self, name: str, low: int, high: int | None = None, default: int | None = None) -> int | None:
        """An integer from low to high; a number like 3.0 is one."""
        value = self.take(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        fits = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (fits and low <= value <= (math.inf if high is None else high)):
            expected = f"an integer of {low} or more" if high is None else f"an integer from {low} to {high}"
            self.refuse(name, f"is {short(value)}, expected {expected}")
        return None if value is None else int(value)

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float | None:
        """A number from low to high."""
        value = self.take(name, default)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (fits and low <= value <= high):
            self.refuse(name, f"is {short(value)}, expected a number from {low:g} to {high:g}")
        return None if value is None else float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            self.refuse(name, f"is {short(value)}, expected true or false")
        return bool(value)

    def string(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            self.refuse(name, f"is {short(value)}, expected a string")
        return None if value is None else str(value)

    def strings(self, name: str, most: int) -> list[str]:
        """A list of strings that are not empty, or one string."""
        value = self.take(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or len(values) > most or not all(isinstance(v, str) and v for v in values):
            self.refuse(name, f"is {short(value)}, expected a string or a list of up to {most}, none of them empty")
        return list(values)

    def choice(self, name: str, *choices: str, default: str | None = None) -> str | None:
        """One of some strings."""
        value = self.take(name, default)
        if value is not None and value not in choices:
            self.refuse(name, f"is {short(value)}, expected {' or '.join(map(repr, choices))}")
        return None if value is None else str(value)

    def object(self, name: str) -> Body | None:
        """An object, as a Body of its own."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            self.refuse(name, f"is {short(value)}, expected an object")
        return None if value is None else Body(value, f"{self._where}{name}.")

    def objects(self, name: str, default: list[Any] | None = None) -> list[Body]:
        """A list of objects, each as a Body of its own."""
        value = self.take(name, default)
        if not isinstance(value, list):
            self.refuse(name, f"is {short(value)}, expected a list of objects")
        bodies = []
        for i, item in enumerate(value):
            if not isinstance(item, dict):
                self.refuse(f"{name}[{i}]", f"is {short(item)}, expected an object")
            bodies.append(Body(item, f"{self._where}{name}[{i}]."))
        return bodies

    def same(self, values: Mapping[str, T | None]) -> T | None:
        """The value of a field that has several names; two that differ are refused."""
        given = {name: value for name, value in values.items() if value is not None}
        first = next(iter(given), None)
        for name, value in given.items():
            if value != given[first]:  # type: ignore[index]  # there is one
                self.refuse(name, f"is {short(value)} beside another {first}, which means the same; leave one out")
        return None if first is None else given[first]

    def only(self, name: str, *values: Any) -> None:
        """A field that this server knows with certain values alone, those that ask for nothing."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(v) and value == v for v in values):
            self.refuse(name, f"is {short(value)}, which this server does not do; leave it out")

    def done(self) -> None:
        """Refuses fields that were not taken."""
        left = next((name for name, value in self._fields.items() if value is not None), None)
        if left is None:
            return
        near = difflib.get_close_matches(left[:80], self._known, 1, 0.6)
        fix = f"; did you mean {near[0]!r}?" if near else "."
        name = self._where + left[:80]
        raise RequestError(400, f"{name} is not a field that this server knows{fix}", name, "unknown_field")


def short(value: Any) -> str:
    """A value as JSON, for a sentence."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(data: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(data), "a number")


def _depth(data: Any) -> int:
    depth, level = 0, [data]
    while level and depth <= DEEPEST:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
    return depth


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
