"""A command in this process, for tests of what it says: starting one takes a second."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

from qwen_mlx.cli import command

SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


def run_here(main: Callable[[], Any], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The result of a process that runs this command; the signal handlers stay those of this process."""
    given, out, err = (io.TextIOWrapper(io.BytesIO(data), encoding="utf-8") for data in (stdin, b"", b""))
    handlers = [signal.getsignal(number) for number in SIGNALS]
    try:
        with (
            mock.patch.object(sys, "stdin", given),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("default")
            command.run(main)
    except SystemExit as end:
        out.flush(), err.flush()
        return subprocess.CompletedProcess((), end.code or 0, out.buffer.getvalue(), err.buffer.getvalue())
    finally:
        for number, handler in zip(SIGNALS, handlers):
            signal.signal(number, handler)
