"""A command in this process, for tests of what it says: starting one takes a second."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

from qwen_mlx.cli import command

SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


def run_here(main: Callable[[], Any]) -> subprocess.CompletedProcess[bytes]:
    """What a process that runs this command would give; the signal handlers stay those of this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    handlers = [signal.getsignal(number) for number in SIGNALS]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("default")
            command.run(main)
    except SystemExit as end:
        out.flush(), err.flush()
        return subprocess.CompletedProcess((), end.code or 0, out.buffer.getvalue(), err.buffer.getvalue())
    finally:
        for number, handler in zip(SIGNALS, handlers):
            signal.signal(number, handler)
