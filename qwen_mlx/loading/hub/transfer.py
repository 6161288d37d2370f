"""What every download needs: room on the disk, a sentence where it is full, a progress bar."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import QwenMLXError


def check_room(folder: Path, needed: int) -> None:
    """Refuses to begin a download that cannot fit."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise QwenMLXError(
            f"{folder}: the disk is too full, {needed:,} bytes are needed and {free:,} are free; make room, or set "
            "QWEN_MLX_CACHE (for hub ids HF_HOME) to a folder on another disk."
        )


def full_disk(error: BaseException, folder: Path, needed: int) -> QwenMLXError | None:
    """The sentence for an error that says the disk is full, or a limit on it reached; else None."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    free = shutil.disk_usage(folder).free
    return QwenMLXError(
        f"{folder}: the disk is full or a limit on it is reached ({error.strerror}), {free:,} bytes are free and "
        f"{needed:,} needed in all; make room and run again, or set QWEN_MLX_CACHE (for hub ids HF_HOME) to a "
        "folder on another disk."
    )


def cut(file: BinaryIO, count: int) -> int:
    """Cuts a file opened for appending to its first `count` bytes."""
    file.flush()
    file.truncate(count)
    return count


def progress_bar(total: int, done: int) -> Any:
    """A bar over `total` bytes, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=not sys.stderr.isatty())


def say(text: str) -> None:
    """One line for a person; standard output is for the model's words alone."""
    print(f"qwen_mlx: {text}", file=sys.stderr, flush=True)
