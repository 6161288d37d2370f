"""Arguments of the benchmarks' commands: mistakes are one sentence, and are found before anything is measured."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

from qwen_mlx.cli import command
from qwen_mlx.errors import QwenMLXError

MOST = 10_000_000


class Parser(command.Parser):
    """The parser of `python -m benchmarks.NAME`, whose help opens with the script's docstring."""

    def __init__(self, name: str, docstring: str | None) -> None:
        super().__init__(
            prog=f"python -m benchmarks.{name}",
            description=docstring,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is an integer from `least` to MOST."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= MOST:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number from {least} to {MOST:,}")
        return int(text)

    return number


positive = at_least(1)


def to_write(text: str) -> Path:
    """The type of an argument that names a file to write, in a folder that exists."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: expected a file in a folder that exists")
    return path


def require_module(name: str, remedy: str) -> None:
    """Raises QwenMLXError unless the module is there."""
    if importlib.util.find_spec(name) is None:
        raise QwenMLXError(f"{name} is not installed: {remedy}.")
