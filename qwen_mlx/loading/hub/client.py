"""The Hugging Face Hub through its own client, and what every download needs: room on the disk, a progress bar."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ...errors import QwenMLXError

HUB_SECONDS = 5.0  # the whole wait for the Hub's first answer: name look-up, every address, every retry
T = TypeVar("T")


class Unreachable(Exception):
    """The Hub gave no usable answer; says why. What is cached, or another source, may still do."""


def remote_files(repo: str) -> tuple[str, dict[str, tuple[int, str | None]]]:
    """The repository's true name and, by file name, size and sha256 (None for small files), asked within HUB_SECONDS.

    Raises Unreachable without a usable answer, QwenMLXError if the Hub says that there is no such repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        info = _within(HUB_SECONDS, lambda: HfApi().model_info(repo, files_metadata=True, timeout=HUB_SECONDS))
        files = {
            file.rfilename: (int(file.size or 0), getattr(file.lfs, "sha256", None)) for file in info.siblings or []
        }
        return info.id or repo, files
    except OfflineModeIsEnabled:
        raise Unreachable("HF_HUB_OFFLINE forbids to ask the Hugging Face Hub") from None
    except HFValidationError:
        raise QwenMLXError(f"{repo}: no such file or folder, and not a valid hub id (org/repo).") from None
    except GatedRepoError:
        raise QwenMLXError(
            f"{repo}: the Hugging Face Hub gives it to members only; accept its terms there, then `hf auth login`."
        ) from None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403, 404):
            raise QwenMLXError(
                f"{repo}: no such file or folder, and the Hugging Face Hub has no such public model "
                f"(HTTP {error.response.status_code}); a private one, or an expired token, needs `hf auth login`."
            ) from None
        raise Unreachable(f"the Hugging Face Hub failed ({first_line(error)})") from None
    except Exception as error:  # its HTTP library's own errors, which change from version to version
        raise Unreachable(f"the Hugging Face Hub is out of reach ({first_line(error)})") from None


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result, or TimeoutError: a client's own timeout counts anew for every address and every retry."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def fetch(repo: str, stages: list[list[str]], needed: int) -> Path:
    """Fetches files of a repository, stage by stage, into huggingface_hub's cache; returns their folder.

    needed: bytes that are not in the cache yet. Raises QwenMLXError if the disk is too small or a download fails.
    """
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    check_room(cache, needed)
    say(f"downloading {repo} ({needed / 1e6:.0f} MB) from the Hugging Face Hub to {cache}")
    for files in stages:
        try:
            with _bars_where_they_are_read():
                folder = Path(snapshot_download(repo, allow_patterns=files))
        except Exception as error:  # OSError, its HTTP library's errors, RuntimeError of its transfer library
            raise full_disk(error, cache, needed) or QwenMLXError(
                f"{repo}: the download from the Hugging Face Hub failed ({first_line(error)}); run again to go on."
            ) from None
        # Some versions hand back what they have when the Hub stops answering.
        if lost := [file for file in files if not (folder / file).is_file()]:
            raise QwenMLXError(f"{repo}: the Hub did not give {lost[0]}; run again to go on.")
    return folder


def check_digests(repo: str, folder: Path, expected: Mapping[str, str | None]) -> None:
    """Raises QwenMLXError for a file that was fetched and is not what the Hub says, and removes it."""
    for file, sha256 in expected.items():
        path = folder / file
        if sha256 is None or (actual := digest(path)) == sha256:
            continue
        os.remove(os.path.realpath(path))  # the cache's file, then the link to it
        path.unlink(missing_ok=True)
        raise QwenMLXError(
            f"{repo}: {file} has sha256 {actual}, and the Hub says {sha256!s:.64}; it was removed, run again."
        )


def digest(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
    return sha256.hexdigest()


@contextlib.contextmanager
def _bars_where_they_are_read() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shows_bars() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def snapshots(repo: str | None = None) -> list[tuple[str, Path]]:
    """(name, folder) of every repository's main revision in huggingface_hub's cache, or of the one named.

    The cache's layout is documented: models--ORG--REPO/refs/main names a folder in models--ORG--REPO/snapshots.
    """
    from huggingface_hub import constants

    cached = []
    for entry in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        name = entry.name.removeprefix("models--").replace("--", "/", 1)
        if repo is None or name.lower() == repo.lower():
            with contextlib.suppress(OSError):
                snapshot = entry / "snapshots" / (entry / "refs" / "main").read_text().strip()
                if snapshot.is_dir():
                    cached.append((name, snapshot))
    return cached


def first_line(error: BaseException) -> str:
    """An error's first line, without full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def check_room(folder: Path, needed: int) -> None:
    """Raises QwenMLXError, before a download begins, if it cannot fit."""
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


def shows_bars() -> bool:
    """True where a line that is drawn again is read by a person: on a terminal and in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def progress_bar(total: int, done: int) -> Any:
    """A bar over `total` bytes, where shows_bars()."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=not shows_bars())


def say(text: str) -> None:
    """Prints one line for a person; standard output is for the model's words alone."""
    print(f"qwen_mlx: {text}", file=sys.stderr, flush=True)
