"""The frame of every command: errors in one sentence, exit codes, signals, a progress line for terminals."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TextIO

from .. import __version__
from ..errors import QwenMLXError, Stopped

# Text of a model or a file must not move a terminal's cursor, nor do anything else to it.
CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
# argparse's words for a value that an option does not take.
WRONG_VALUE = re.compile(
    r"argument (-[\w-]+)\S*: (?:invalid (?P<kind>int|float) value: (.+)|invalid choice: (.+) \(choose from (.+)\))"
)
KINDS = {"int": "an integer", "float": "a number"}
# Options of mlx-lm and llama.cpp, and what stands for them here.
OTHER_PROGRAMS = {
    "--adapter-path": "--adapter",
    "--hf-path": "qwen-mlx convert SOURCE OUTPUT",
    "--ignore-chat-template": "--raw",
    "--lora": "--adapter",
    "--max-new-tokens": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--q-bits": "--quantize",
    "--q-group-size": "--group-size",
    "--system-prompt": "--system",
    "-q": "--quantize",
}
# Errors of writing to standard output, which name no file.
CANNOT_WRITE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def printable(text: str, stream: TextIO) -> str:
    """`text` as it is, or without its control characters where `stream` is a terminal."""
    return text.translate(CONTROLS) if stream.isatty() else text


def program(command: str) -> str:
    """The words that started this command: `qwen-mlx COMMAND` or `python -m qwen_mlx.COMMAND`."""
    module = os.path.basename(sys.argv[0]) == f"{command}.py"
    return f"python -m qwen_mlx.{command}" if module else f"qwen-mlx {command}"


def require_at_least(least: int, option: str, value: int | None, unit: str = "") -> None:
    """Raises QwenMLXError for an option's value below `least`; None stands for an option that is not given."""
    if value is not None and value < least:
        raise QwenMLXError(f"{option} is {value}, expected {least}{unit} or more.")


def counted(tokens: int) -> str:
    """A number of tokens in words."""
    return f"{tokens} token{'s' * (tokens != 1)}"


def cut_at(tokens: int, limit: int) -> str:
    """The words for a text that was cut after so many tokens, by --max-tokens or else by the end of the context."""
    return f"cut off by --max-tokens {limit}" if tokens >= limit else "cut off where the model's context ends"


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, like every other error, and takes no option's beginning for the option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.add_argument("--version", action="version", version=f"qwen-mlx {__version__}")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments. Exits for one that is not known, with the option that it may have been meant for."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = self._nearest(unknown[0])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f'; did you mean {near}?' if near else ''}")
        return parsed

    def _nearest(self, word: str) -> str | None:
        if not word.startswith("-"):
            import shlex

            return f"--prompt {shlex.quote(word)}" if "--prompt" in self._option_string_actions else None
        asked = word.partition("=")[0].replace("_", "-")
        options = {option.lstrip("-"): option for option in self._option_string_actions}
        meant = OTHER_PROGRAMS.get(asked, "")
        if meant in options.values() or meant.startswith(self.prog):
            return meant
        name = asked.lstrip("-")
        begun = [option for option in options if len(name) > 1 and option.startswith(name)]
        near = begun or difflib.get_close_matches(name, options, 1, 0.7)
        return options[near[0]] if near else None

    def error(self, message: str) -> NoReturn:
        if wrong := WRONG_VALUE.match(message):
            option, kind, value, choice, choices = wrong.groups()
            expected = KINDS[kind] if kind else "one of " + choices.replace("'", "")
            message = f"{option} is {value or choice}, expected {expected}"
        self.exit(2, f"error: {message}; see --help.\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)  # argparse's own hides that this failed


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Handles a signal by raising Stopped, once: later ones are ignored, so that the program can tidy up."""
    signal.signal(number, signal.SIG_IGN)
    raise Stopped(number)


def _working_folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def run(main: Callable[[], Any]) -> NoReturn:
    """Runs a command and exits with what it returns. Exits with 2 after a mistake of the user's (one sentence, no
    traceback), 130 after Ctrl-C, 141 where the reader of standard output went away, and 143 after SIGTERM, each time
    when everything is tidied up."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, stop)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for the rest of the process)
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # where it is not UTF-8, ? stands for what it cannot say
    sentence = None
    try:
        try:
            code = main()
        except SystemExit as end:  # argparse ends so, after --help and after a wrong argument
            code = end.code
        sys.stdout.flush()
    except QwenMLXError as error:
        code, sentence = 2, " ".join(str(error).split())
    except KeyboardInterrupt:
        code = 130
    except Stopped as stopped:
        code = 128 + stopped.args[0]
    except (RuntimeError, ValueError) as error:
        code, sentence = 2, kernel_failure(str(error))
        if sentence is None:
            raise
    except ImportError as error:
        if not isinstance(error.__context__, KeyboardInterrupt):  # NumPy's own answer to Ctrl-C
            raise
        code = 130
    except OSError as error:
        if _working_folder_is_gone():
            code, sentence = 2, "the working folder is gone; change to one that is there."
        elif error.filename is not None or error.errno not in CANNOT_WRITE:
            raise
        else:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more at its end
            code = 141
            if not isinstance(error, BrokenPipeError):
                code, sentence = 2, f"standard output cannot be written ({error.strerror})."
    if sentence is not None:
        with contextlib.suppress(OSError):
            print(printable(f"error: {sentence}", sys.stderr), file=sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C, while Python ends, is quiet
    sys.exit(code)


# MLX's words where Metal's or CUDA's compiler, or a GPU, refuses a kernel.
KERNEL_FAILURES = (
    "[metal::Device] Unable to",
    "Thread group size",
    "Failed to compile kernel",
    "Failed to load compiled",
)
# Kernels of each part, by the beginning of their names; rms_norm last, whose header others include.
KERNELS = {
    "matvec": ("matvec",),
    "matmul": ("matmul",),
    "attend": ("decode_attention", "combine"),
    "unpack": ("unpack",),
    "rope": ("rope", "qkv_rope"),
    "swiglu": ("swiglu",),
    "best_token": ("best_",),
    "rms_norm": ("rms_norm", "add_rms_norm"),
}


def kernel_failure(text: str) -> str | None:
    """The sentence for an error of MLX's about one of our kernels: the part that failed, and the way out. None for
    another error."""
    if not any(words in text for words in KERNEL_FAILURES):
        return None
    names = re.findall(r"qwen_(?!mlx)(\w+)|qwen_mlx/metal/(?:nvidia/)?(\w+)\.metal", text)
    found = [kernel or file for kernel, file in names]
    part = next((part for part, starts in KERNELS.items() if any(name.startswith(starts) for name in found)), None)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in lines if "error:" in line), lines[0])[:300]
    what, switch = (f"The kernel of {part!r}", f"-{part}") if part else ("A kernel", "off")
    return (
        f"{what} does not run on this GPU ({said}); set QWEN_MLX_KERNELS={switch} to compute that in plain MLX, and "
        "please report it with the file that qwen-mlx selftest writes."
    )


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """A warning as one line on standard error, without the line of code that gave it."""
    if sys.stderr is not None:
        print(printable(f"warning: {message}", sys.stderr), file=sys.stderr)


class ProgressLine:
    """The name of work that takes long, on standard error. On a terminal it appears after a second with the share done,
    and goes at `clear` or the end of a `with` block; elsewhere it is one line after ten seconds, which stays."""

    def __init__(self, label: str):
        self.label = label
        self.start = time.monotonic()
        self.visible = False
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> ProgressLine:
        # Nothing may call for long, while a first chunk is read for example.
        self._timer = threading.Timer(1 if sys.stderr.isatty() else 10, self._show)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - self.start >= 1:
            self._show(f" {done / total:4.0%}")
            if done >= total:
                self.clear()

    def _show(self, share: str | None = None) -> None:
        with self._lock:
            if share is None and (self._timer is None or self.visible):
                return
            with contextlib.suppress(OSError, ValueError):  # the stream is closed
                if sys.stderr.isatty():
                    self.visible = True
                    print(f"\r{self.label}{share or '...'}", end="", file=sys.stderr, flush=True)
                else:
                    print(f"{self.label}...", file=sys.stderr, flush=True)

    def clear(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self.visible:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
                self.visible = False
