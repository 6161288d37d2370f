"""The Hugging Face Hub, through its own client: what a repository holds, its download, and the client's cache."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ...errors import QwenMLXError
from .transfer import check_room, full_disk, say

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
        raise Unreachable(f"the Hugging Face Hub failed ({short(error)})") from None
    except Exception as error:  # its HTTP library's own errors, which change from version to version
        raise Unreachable(f"the Hugging Face Hub is out of reach ({short(error)})") from None
    files = {file.rfilename: (file.size or 0, getattr(file.lfs, "sha256", None)) for file in info.siblings or []}
    return info.id, files


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result, or TimeoutError: a client's own timeout counts anew for every address and every retry."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answers[0]


def fetch(
    repo: str, remote: dict[str, tuple[int, str | None]], steps: list[list[str]], cached: Path | None, here: list[str]
) -> Path:
    """Fetches files of a repository, step by step, into huggingface_hub's cache; returns their folder."""
    missing = sum(remote[file][0] for step in steps for file in step if file not in here)
    if cached and missing == 0:
        return cached
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    check_room(cache, missing)
    say(f"downloading {repo} ({missing / 1e6:.0f} MB) from the Hugging Face Hub to {cache}")
    for step in steps:
        with _plain_errors(repo, cache, missing):
            folder = Path(snapshot_download(repo, allow_patterns=step))
        # Where the Hub stops answering, some versions hand back what they have.
        if lost := [file for file in step if not (folder / file).is_file()]:
            raise QwenMLXError(f"{repo}: the Hub did not give {lost[0]}; run again to go on.")
    return folder


@contextlib.contextmanager
def _plain_errors(repo: str, folder: Path, needed: int) -> Iterator[None]:
    """For one of the client's downloads: its bars on a terminal only, its errors as one sentence."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    except Exception as error:  # OSError, its HTTP library's errors, RuntimeError of its transfer library
        raise full_disk(error, folder, needed) or QwenMLXError(
            f"{repo}: the download from the Hugging Face Hub failed ({short(error)}); run again to go on."
        ) from None
    finally:
        if quiet:
            enable_progress_bars()


def short(error: BaseException) -> str:
    """An error's first line, without full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def snapshots(repo: str | None = None) -> list[tuple[str, Path]]:
    """(name, folder) of every repository's main revision in huggingface_hub's cache, or of the one named.

    The cache's layout is documented: models--ORG--REPO/refs/main names a folder in models--ORG--REPO/snapshots.
    """
    from huggingface_hub import constants

    found = []
    for entry in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        name = entry.name.removeprefix("models--").replace("--", "/", 1)
        if repo is not None and name.lower() != repo.lower():
            continue
        with contextlib.suppress(OSError):
            snapshot = entry / "snapshots" / (entry / "refs" / "main").read_text().strip()
            if snapshot.is_dir():
                found.append((name, snapshot))
    return found
