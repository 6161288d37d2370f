"""What every command line shares: errors as one sentence, exit codes, a progress line for terminals."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, TextIO

from ..errors import QwenMLXError, Stopped

# What a model or a file says is text: on a terminal it must not move the cursor, or more.
CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


def shown(text: str, stream: TextIO) -> str:
    """`text` as `stream` gets it: whole, but without control characters where that is a terminal."""
    return text.translate(CONTROLS) if stream.isatty() else text


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough: what follows tidies up
    raise Stopped(number)


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help.\n")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and exits: 0, 2 for a mistake of the user's (one sentence, no traceback), 130 for Ctrl-C, 143 for
    SIGTERM, after everything is tidied up."""
    code: int | None
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, _stop)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the rest of the process)
    try:
        code = main()
        sys.stdout.flush()
    except QwenMLXError as error:
        print(shown(f"error: {' '.join(str(error).split())}", sys.stderr), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Stopped as stopped:
        code = 128 + stopped.args[0]
    except BrokenPipeError:  # the reader of a pipe went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        if sys.stdout.closed or error.filename is not None:
            raise
        print(f"error: standard output cannot be written ({error.strerror}).", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C, while Python ends, is quiet
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
