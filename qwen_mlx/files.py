"""Files that people ask for: they appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .errors import QwenMLXError


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], suffix: str = "") -> Iterator[Path]:
    """A new, empty file beside `path` to write to, its name ending in `suffix`; it takes the place of `path` when the
    block ends, and goes if that raises.

    It has the mode that the umask gives, and a link's target is what is replaced. Raises QwenMLXError, naming `path`,
    if that is anything but a file (replacing /dev/null would break the machine) or cannot be written.
    """
    if "\0" in str(path):
        raise QwenMLXError(f"{str(path)!r}: no file can have this name.")
    try:
        where = Path(os.path.realpath(path))
        if where.exists() and not where.is_file():
            raise QwenMLXError(f"{path}: is not a regular file; give another name.")
        made = where.parent / f".qwen_mlx.{secrets.token_hex(8)}{suffix}"
        made.touch(exist_ok=False)
        try:
            yield made
            os.replace(made, where)
        finally:
            made.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # MLX raises the latter
        raise QwenMLXError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}).") from None


def check_folder(path: str | os.PathLike[str], what: str) -> None:
    """Raises QwenMLXError, beginning with `what`, where `whole` could not write `path`: known before long work."""
    where = os.path.realpath(path)
    if os.path.exists(where) and not os.path.isfile(where):
        raise QwenMLXError(f"{what} {path}: is not a regular file; give another name.")
    if not os.access(os.path.dirname(where), os.W_OK):
        raise QwenMLXError(f"{what} {path}: its folder does not exist, or is read-only.")
