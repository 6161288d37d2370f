"""A function of operations whose compiled calls are recorded once and repeated, without Python's work between them.

A tape is a list of calls on arrays of its own. Arguments are copied into these, or looked up by the calls that read
them where they are large; results are copied out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ...backend import mx

COPIED = 1 << 14  # elements of an argument that is copied; a larger one is read where it lies

Function = Callable[..., list[mx.array]]


class Unknown(Exception):
    """An array is read that no recorded call makes, or a compiled function is called beside the recorded calls."""


class Tape:
    """The calls of one function, and the arrays that they read and write."""

    def __init__(self, arguments: Sequence[mx.array], constants: Iterable[mx.array]) -> None:
        self._constants = {id(array): array for array in constants}
        self._arrays: list[mx.array] = list(arguments)  # kept, so that no other array gets one of their ids
        self._values: dict[int, np.ndarray] = {}
        self._places: dict[int, int] = {}
        self._calls: list[Callable[[], None]] = []
        self._given = [np.asarray(array) for array in arguments]
        for place, (array, given) in enumerate(zip(arguments, self._given)):
            self._places[id(array)] = place
            if array.size <= COPIED:
                self._values[id(array)] = given.copy()
        self._copies = [(i, self._values[id(a)]) for i, a in enumerate(arguments) if id(a) in self._values]
        self._results: list[np.ndarray] = []

    def values(self, array: mx.array) -> np.ndarray:
        """An array's elements: of a copied argument, of a call's result or of a constant."""
        known = self._values.get(id(array))
        if known is not None:
            return known
        if id(array) not in self._constants:
            raise Unknown
        return np.ascontiguousarray(np.asarray(array))

    def later(self, array: mx.array) -> Callable[[], np.ndarray]:
        """A function that gives an array's elements at each repetition, an argument's too."""
        place = self._places.get(id(array))
        if place is None or id(array) in self._values:
            elements = self.values(array)
            return lambda: elements
        return lambda: self._given[place]

    def add(self, array: mx.array, values: np.ndarray) -> None:
        """Notes that `array` stands for `values`, which a call writes."""
        self._arrays.append(array)
        self._values[id(array)] = values

    def note(self, call: Callable[[], None]) -> None:
        """Adds a call."""
        self._calls.append(call)

    def end(self, results: Sequence[mx.array]) -> None:
        """Takes the function's results. Raises Unknown where no call makes them."""
        self._results = [self.values(array) for array in results]
        self._arrays.clear()
        self._constants.clear()

    def repeat(self, arguments: Sequence[mx.array]) -> list[mx.array]:
        """The function's results for other arguments."""
        self._given[:] = map(np.asarray, arguments)
        for place, copy in self._copies:
            copy[...] = self._given[place]
        for call in self._calls:
            call()
        return [mx.array(values) for values in self._results]


class _Current(threading.local):
    tape: Tape | None = None


_current = _Current()


def current() -> Tape | None:
    """The tape on which this thread's operations are being recorded."""
    return _current.tape


def perform(call: Callable[[], None]) -> None:
    """Calls a function without arguments, which a tape repeats."""
    tape, _current.tape = _current.tape, None
    try:
        call()
    finally:
        _current.tape = tape
    if tape is not None:
        tape.note(call)


class Replayed:
    """function(*arrays), recorded at the first call and again when the arguments' shapes change; a large one, a
    cache's buffer, may grow.

    constants: gives the arrays that the function reads beside its arguments. A function that computes anything by MLX's
    own operations is called each time.
    """

    def __init__(self, function: Function, constants: Callable[[], Iterable[mx.array]]) -> None:
        self._function, self._constants = function, constants
        self._tape: Tape | None = None
        self._shapes: list[tuple[int, ...]] = []  # of arguments that are copied
        self._possible = True
        self._lock = threading.Lock()  # a tape's arrays serve one call at a time

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        shapes = [array.shape if array.size <= COPIED else () for array in arrays]
        with self._lock:
            if self._tape is not None and shapes == self._shapes:
                return self._tape.repeat(arrays)
            if self._possible:
                self._shapes = shapes
                try:
                    return self._record(arrays)
                except Unknown:
                    self._possible, self._tape = False, None
        return self._function(*arrays)

    def _record(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        self._tape = None  # whatever happens below
        tape = _current.tape = Tape(arrays, self._constants())
        try:
            results = self._function(*arrays)
            tape.end(results)
        finally:
            _current.tape = None
        self._tape = tape
        return results
