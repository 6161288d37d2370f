"""The folder that a conversion writes: it appears complete or not at all, whatever ends the work."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import QwenMLXError


def target_folder(output: str | os.PathLike[str], source: Path, force: bool) -> Path:
    """The folder to write, its links followed; QwenMLXError if it may not be written there."""
    try:
        target = Path(output).expanduser().resolve()
        sources = [source.resolve(), source.absolute().parent.resolve() / source.name]  # the file, and the link to it
        sources += [file.resolve() for file in (source.iterdir() if source.is_dir() else ())]  # its files' links too
        if any(target == path or target in path.parents for path in sources):
            raise QwenMLXError(f"{target}: holds the model to convert; give another folder for the output.")
        _check_replaceable(target, force)
    except QwenMLXError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a loop of links, a zero byte
        reason = getattr(error, "strerror", None) or error
        raise QwenMLXError(f"{os.fspath(output)}: cannot be written ({reason}); give another name.") from None
    return target


@contextlib.contextmanager
def replaced_folder(target: Path, nbytes: int, force: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it at the end, or is removed, whatever ends the work. The next
    conversion removes what a killed process left behind."""
    folder = old = None
    prefix = temporary_prefix(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target, prefix)
        _check_replaceable(target, force)  # _clear may have brought back a model that a killed conversion had put aside
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise QwenMLXError(f"{target}: needs {nbytes / 1e6:.1f} MB, but {free / 1e6:.1f} MB are free on its disk.")
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target.parent))
        yield folder
        folder.chmod(0o777 & ~_umask())
        _check_replaceable(target, force)  # it may have appeared meanwhile
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target.parent))
            target.rename(old / "model")
        folder.rename(target)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
        raise QwenMLXError(f"{target}: cannot be written ({reason}); nothing was left behind.") from None
    finally:
        if old is not None and not target.exists():
            (old / "model").rename(target)  # the new folder did not replace it
        for path in (folder, old):
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)


def temporary_prefix(target: Path) -> str:
    """The start of temporary folders' names: the target's and this machine's, a process's number follows."""
    host = re.sub(r"\W", "_", platform.node()) or "host"
    return f".{target.name}.{host}-"


def _check_replaceable(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise QwenMLXError(f"{target}: is not a folder; give another name for the output.")
    if not force:
        raise QwenMLXError(f"{target}: exists already; give another name, or --force to replace it.")
    if any(target.iterdir()) and not (target / "config.json").exists():
        raise QwenMLXError(f"{target}: is not a model folder (no config.json), so --force does not replace it.")


def _clear(target: Path, prefix: str) -> None:
    """Removes temporary folders of this machine's dead processes; a model that one had put aside returns."""
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        pid = path.name.removeprefix(prefix).partition("-")[0]
        if not pid.isdigit() or _is_running(int(pid)):
            continue
        if not target.exists() and (path / "model").is_dir():
            (path / "model").rename(target)
        shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
