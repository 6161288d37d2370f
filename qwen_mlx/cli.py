"""What every command line shares: errors as one sentence, exit codes, a progress line for terminals."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from .errors import QwenMLXError


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help.\n")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and exits: 0, 2 for a mistake of the user's (one sentence, no traceback), 130 for Ctrl-C."""
    code: int | None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the rest of the process)
    try:
        code = main()
        sys.stdout.flush()
    except QwenMLXError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of a pipe went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if sys.stdout.closed or error.filename is not None:
            raise
        print(f"error: standard output cannot be written ({error.strerror}).", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    sys.exit(code)


class ProgressLine:
    """One line on standard error that appears after a second, and never where that is not a terminal."""

    def __init__(self, label: str):
        self.label = label
        self.start = time.monotonic()
        self.shown = False

    def __call__(self, done: int, total: int) -> None:
        if not sys.stderr.isatty() or time.monotonic() - self.start < 1:
            return
        self.shown = True
        print(f"\r{self.label} {done / total:4.0%}", end="", file=sys.stderr, flush=True)
        if done >= total:
            self.clear()

    def clear(self) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self.shown = False
