"""Errors that a person can act on: one sentence that says what, where, expected, found and the fix."""

from __future__ import annotations

import difflib
import numbers
import operator
from collections.abc import Collection, Iterable
from typing import Any

LONGEST_SENTENCE = 2000  # characters: a file's words, which a sentence may quote, can be of any length


def shortened(text: str, length: int = 300) -> str:
    """`text`, cut where it is longer than `length`, for a sentence that quotes it."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


class QwenMLXError(ValueError):
    """A mistake in what the user gave. Command lines print its sentence on standard error and exit with 2."""

    def __init__(self, sentence: object = "") -> None:
        text, most = str(sentence), LONGEST_SENTENCE // 2
        if len(text) > 2 * most:
            text = f"{text[:most]} ... {text[-most:]} ({len(text):,} characters)"
        super().__init__(text)


class Stopped(BaseException):
    """The process was asked to end (SIGTERM), or its terminal is gone (SIGHUP): its argument is the signal."""


class GGUFError(QwenMLXError):
    """A GGUF file that cannot be read, or does not hold what it should; names the file and the field or tensor."""


def refuse_unknown(given: Iterable[str], known: Collection[str], kind: str = "argument") -> None:
    """Raises QwenMLXError for the first name that is not known, with the one that it may have been meant for."""
    for name in given:
        if name not in known:
            near = [other for other in known if name and other.startswith(name)]
            near = near or difflib.get_close_matches(name, known, 1, 0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(known))}."
            raise QwenMLXError(f"There is no {kind} {name!r}: {fix}")


def check_integer(name: str, value: Any, low: int, high: float, expected: str) -> int:
    """Returns an integer, NumPy's too, as an int. Raises QwenMLXError unless it is one from `low` to `high`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= operator.index(value) <= high:
        raise QwenMLXError(f"{name} is {value!r}, expected {expected}.")
    return operator.index(value)
