"""Reading text that people name, and writing files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import QwenMLXError

LARGEST = 1 << 28  # bytes: text beyond that is a mistake, or a device without an end


def read(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes, standard input's for "-". Raises QwenMLXError for more than 256 MB, else OSError."""
    if path == "-":
        data = sys.stdin.buffer.read(LARGEST + 1)
    else:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        where = "standard input" if path == "-" else path
        raise QwenMLXError(f"{where}: has more than {LARGEST >> 20} MB, which is no text for a model.")
    return data


def read_text(path: str, what: str = "") -> str:
    """The text of a file, or of standard input for "-". Raises QwenMLXError, beginning with `what`, if it cannot be
    read, is not UTF-8, or has more than 256 MB."""
    where = f"{what} standard input".strip() if path == "-" else f"{what} {path}".strip()
    try:
        return decoded(read(path), where)
    except OSError as error:
        raise QwenMLXError(f"{where}: cannot be read ({error.strerror}).") from None


def decoded(data: bytes, where: str) -> str:
    """`data` as text. Raises QwenMLXError, naming the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise QwenMLXError(f"{where}: not valid UTF-8 (byte {data[error.start]:#04x} at {error.start}).") from None


def check_utf8(text: str, where: str) -> None:
    """Raises QwenMLXError for a command line's argument that was not UTF-8."""
    decoded(text.encode("utf-8", "surrogateescape"), where)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], suffix: str = "") -> Iterator[Path]:
    """A new, empty file beside `path` to write to, its name ending in `suffix`; it replaces `path` when the block ends,
    and is removed if that raises.

    It has the mode that the umask gives, and of a symbolic link the target is replaced. Raises QwenMLXError, naming
    `path`, if that is anything but a file (replacing /dev/null would break the machine) or cannot be written.
    """
    if "\0" in str(path):
        raise QwenMLXError(f"{str(path)!r}: no file can have this name.")
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise QwenMLXError(f"{path}: is not a regular file; give another name.")
        temporary = target.parent / f".qwen_mlx.{secrets.token_hex(8)}{suffix}"
        try:
            temporary.touch(exist_ok=False)
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # MLX raises a RuntimeError
        raise QwenMLXError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}).") from None


def check_folder(path: str | os.PathLike[str], what: str) -> None:
    """Raises QwenMLXError, beginning with `what`, if atomic_write could not write `path`: before long work."""
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise QwenMLXError(f"{what} {path}: is not a regular file; give another name.")
    if not os.access(os.path.dirname(target), os.W_OK):
        raise QwenMLXError(f"{what} {path}: its folder does not exist, or is read-only.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; QwenMLXError, naming the file, for anything else."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device read without end
        raise QwenMLXError(f"{path}: is not a regular file.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QwenMLXError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise QwenMLXError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise QwenMLXError(f"{path}: holds {type(value).__name__}, expected a JSON object.")
    return value
