"""Reading text that people name, and writing files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import QwenMLXError

LEFTOVER = ".qwen_mlx."  # what the names of temporary files begin with
LARGEST_JSON = 1 << 25  # bytes: three times the largest tokenizer.json; Python may need 20 for each
LARGEST = 1 << 28  # bytes: text beyond that is a mistake, or a device without an end


def read(path: str | os.PathLike[str], largest: int | None = None) -> bytes:
    """A file's bytes, standard input's for "-". Raises QwenMLXError for more than `largest`, 256 MB, and for what is no
    name, else OSError."""
    largest = LARGEST if largest is None else largest
    if path == "-":
        data = sys.stdin.buffer.read(largest + 1)
    else:
        try:
            with open(path, "rb") as file:
                data = file.read(largest + 1)
        except ValueError:
            raise QwenMLXError(f"{str(path)!r}: no file can have this name.") from None
    if len(data) > largest:
        where = "standard input" if path == "-" else path
        raise QwenMLXError(f"{where}: has more than {largest >> 20} MB, which is no text for a model.")
    return data


def read_text(path: str, what: str = "", largest: int | None = None) -> str:
    """The text of a file, or of standard input for "-". Raises QwenMLXError, beginning with `what`, if it cannot be
    read, is not UTF-8, or has more than `largest` bytes, 256 MB."""
    where = f"{what} standard input".strip() if path == "-" else f"{what} {path}".strip()
    try:
        return decoded(read(path, largest), where)
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
    try:
        decoded(text.encode("utf-8", "surrogateescape"), where)
    except UnicodeEncodeError as error:  # half of a character, from a program
        raise QwenMLXError(f"{where}: not valid Unicode ({text[error.start]!r} at {error.start}).") from None


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
        clear_leftovers(target.parent)
        with _locked_temporary(target.parent, suffix) as (temporary, descriptor):
            yield temporary
            sync(descriptor)  # or a power cut could leave the name without the bytes
            os.replace(temporary, target)
            sync_folder(target.parent)
    except (OSError, RuntimeError, UnicodeEncodeError) as error:  # MLX raises a RuntimeError
        raise QwenMLXError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}).") from None


@contextlib.contextmanager
def _locked_temporary(folder: Path, suffix: str) -> Iterator[tuple[Path, int]]:
    """A new file, removed at the end if it is still there, and its descriptor. It is locked, which ends with the
    process: so others see whether its writer is alive."""
    path, descriptor = folder / f"{LEFTOVER}{secrets.token_hex(8)}{suffix}", None
    try:
        while descriptor is None or not path.exists():  # another process may have removed it before it was locked
            if descriptor is not None:
                os.close(descriptor)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path, descriptor
    finally:
        path.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def clear_leftovers(folder: Path) -> None:
    """Removes the temporary files of atomic_write whose process was killed."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{LEFTOVER}*"):
            if path.is_file() and is_unlocked(path):
                path.unlink(missing_ok=True)


def is_unlocked(path: Path) -> bool:
    """True if no process holds a lock on the file or folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Waits until what was written to a file, or the names in a folder, are on the disk."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS's fsync stops at the disk's own memory
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """sync() of a folder, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            sync(descriptor)
        finally:
            os.close(descriptor)


def check_folder(path: str | os.PathLike[str], what: str) -> None:
    """Raises QwenMLXError, beginning with `what`, if atomic_write could not write `path`: before long work."""
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise QwenMLXError(f"{what} {path}: is not a regular file; give another name.")
    if not os.access(os.path.dirname(target), os.W_OK):
        raise QwenMLXError(f"{what} {path}: its folder does not exist, or is read-only.")
    clear_leftovers(Path(target).parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; QwenMLXError, naming the file, for anything else."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, a device read without end
        raise QwenMLXError(f"{path}: is not a regular file.")
    try:
        value = json.loads(read(path, LARGEST_JSON).decode("utf-8"))
    except QwenMLXError:
        raise
    except OSError as error:
        raise QwenMLXError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise QwenMLXError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise QwenMLXError(f"{path}: holds {type(value).__name__}, expected a JSON object.")
    return value
