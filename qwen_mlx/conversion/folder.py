"""The folder that a conversion writes: it appears complete or not at all, whatever ends the work."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import QwenMLXError
from ..text.files import is_unlocked, read_json, sync, sync_folder

AT_FDCWD = -2 if sys.platform == "darwin" else -100
# Names of the files that a conversion, or who saved the tokenizer, writes.
WRITTEN = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|(config|generation_config|conversion|tokenizer|vocab)\.json"
    r"|(tokenizer_config|special_tokens_map|added_tokens)\.json|chat_template\.jinja|merges\.txt|README\.md"
    r"|additional_chat_templates|\.gitattributes|\.DS_Store|LICENSE"
)


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
    folder = old = lock = None
    prefix = temporary_prefix(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target, prefix)
        _check_replaceable(target, force)  # _clear may have brought back a model that a killed conversion had put aside
        _check_is_model(target)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise QwenMLXError(f"{target}: needs {nbytes / 1e6:.1f} MB, but {free / 1e6:.1f} MB are free on its disk.")
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target.parent))
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        folder.chmod(0o777 & ~_umask())
        _sync(folder)
        _check_replaceable(target, force)  # it may have appeared meanwhile
        _check_is_model(target)
        if not target.exists():
            folder.rename(target)
        elif not _exchange(folder, target):
            old = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target.parent))
            target.rename(old / "model")
            folder.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        if folder is not None and isinstance(error.filename, str) and not error.filename.startswith(str(folder)):
            raise QwenMLXError(f"{error.filename}: cannot be read ({error.strerror}).") from None
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else error.strerror
        raise QwenMLXError(f"{target}: cannot be written ({reason}); nothing was left behind.") from None
    finally:
        if old is not None and not target.exists():
            (old / "model").rename(target)  # the new folder did not replace it
        for path in (folder, old):
            if path is not None:
                shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


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


def _check_is_model(target: Path) -> None:
    """Raises QwenMLXError for a folder that holds anything but what a conversion writes."""
    if not target.is_dir():
        return
    names = sorted(path.name for path in target.iterdir())
    folders = ("additional_chat_templates",)
    foreign = [n for n in names if not WRITTEN.fullmatch(n) or (target / n).is_dir() != (n in folders)]
    if foreign:
        raise QwenMLXError(
            f"{target}: holds {foreign[0]!r}, which no conversion writes, so --force does not replace the folder; give "
            "another name, or remove it yourself."
        )
    if names and "conversion.json" not in names and "model_type" not in read_json(target / "config.json"):
        raise QwenMLXError(f"{target}: is not a model folder (its config.json names no model_type); give another name.")


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step, so that neither name is ever without one; False where the system cannot."""
    mac = sys.platform == "darwin"
    call = getattr(ctypes.CDLL(None), "renamex_np" if mac else "renameat2", None)
    if call is None:
        return False
    names = [ctypes.c_char_p(os.fsencode(path)) for path in (first, second)]
    failed: int = call(*names, 2) if mac else call(AT_FDCWD, names[0], AT_FDCWD, names[1], 2)  # 2: exchange
    return failed == 0


def _sync(folder: Path) -> None:
    """Waits until a folder and its files are on the disk."""
    for path in folder.iterdir():
        if path.is_file():
            with open(path, "rb") as file:
                sync(file.fileno())
    sync_folder(folder)


def _clear(target: Path, prefix: str) -> None:
    """Removes temporary folders of this machine's dead processes, also of other conversions into the same folder; a
    model that one had put aside returns."""
    end = prefix.removeprefix(f".{target.name}")
    for path in target.parent.glob(f".*{glob.escape(end)}*"):
        name, _, rest = path.name[1:].rpartition(end)
        pid = rest.partition("-")[0]
        if not pid.isdigit() or not path.is_dir() or not _is_left_over(path, int(pid)):
            continue
        place = target.with_name(name)
        if not place.exists() and (path / "model").is_dir():
            (path / "model").rename(place)
        shutil.rmtree(path, ignore_errors=True)


def _is_left_over(folder: Path, pid: int) -> bool:
    """True if the process that made a temporary folder is gone, even if another has its number now."""
    if not _is_running(pid):
        return True
    return pid != os.getpid() and time.time() - folder.stat().st_mtime > 3600 and is_unlocked(folder)


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
