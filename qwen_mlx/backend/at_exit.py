"""Threads that still compute when the interpreter ends: stopped before, since one within MLX would abort the process.

A daemon thread that wants to go on after the interpreter's end is unwound by Python, which C++ code does not survive.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable
from typing import TypeVar

SECONDS = 10.0  # to wait for a step at most
F = TypeVar("F", bound=Callable[..., object])
_changed = threading.Condition(threading.RLock())
_under_way = 0
_ending = False


def ends_with_main(function: F) -> F:
    """Lets the interpreter wait for a call that is under way in another thread, and lets such a thread end instead of
    beginning one afterwards."""

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        global _under_way
        if threading.current_thread() is threading.main_thread():
            return function(*args, **kwargs)
        with _changed:
            if _ending:
                raise SystemExit  # which ends a thread without a word
            _under_way += 1
        try:
            return function(*args, **kwargs)
        finally:
            with _changed:
                _under_way -= 1
                _changed.notify_all()

    return call  # type: ignore[return-value]


@atexit.register
def _wait() -> None:
    global _ending
    with _changed:
        _ending = True
        _changed.wait_for(lambda: _under_way == 0, SECONDS)
