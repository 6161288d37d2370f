"""The number of threads that the compiled functions run on, and how these wait for one another."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading

import numba
import numba.core.config

# Turns of a loop, about 50 microseconds, that an idle thread waits before it sleeps: longer than Python needs between
# two functions, and no more, because a thread that waits keeps others from the core. libgomp's own choice is 300,000.
_SPINS = "2000"
_MOST: int = vars(numba.core.config)["NUMBA_NUM_THREADS"]  # all cores that the process may use, unless the user says


class _Limits(threading.local):
    """Numba keeps a number of threads for each of Python's threads."""

    set = False


_limits = _Limits()


def limit() -> None:
    """Lets this thread's calls run on as many threads as OMP_NUM_THREADS allows."""
    if not _limits.set:
        _limits.set = True
        numba.set_num_threads(count())


def count() -> int:
    """The threads that are used: one for each core that this process may use, at most OMP_NUM_THREADS."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(_MOST, int(wanted)) if wanted.isdecimal() and int(wanted) > 0 else _MOST


def _load_openmp() -> None:
    """Loads GNU's OpenMP, which reads its settings once, with a bound on waiting unless the user has set one."""
    if any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        return
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        with contextlib.suppress(ImportError):  # numba then has threads of its own
            importlib.import_module("numba.np.ufunc.omppool")
    finally:
        del os.environ["GOMP_SPINCOUNT"]


_load_openmp()
