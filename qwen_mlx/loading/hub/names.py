"""What a model's name stands for: a path, the default model, or a model of the Hub that is cached or fetched."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...errors import QwenMLXError
from .client import Unreachable, fetch, remote_files, snapshots
from .default import DEFAULT, cache_folder, verified
from .download import default_model
from .repository import choose, gguf_choices, is_complete_folder, is_usable_folder, local_files
from .transfer import say


def resolve(name: str | os.PathLike[str] | None = None) -> Path:
    """The local path of a model, fetched first if need be.

    name: a .gguf file or a folder (what exists as a path is taken as one); a hub id "org/repo", "org/repo:quant" or
    "org/repo:file.gguf", in any case; None, for the default model. Returns the .gguf file (the first part, if split) or
    the folder. What is cached in full is used as it is, without any network.
    Raises QwenMLXError if there is no such thing, it cannot be fetched, its digest is wrong, or the disk is full.
    """
    if name is None:
        return default_model()
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
            return default_model()
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


def _from_hub(repo: str, choice: str | None) -> Path:
    """A model of the Hub: what is cached in full is used as it is; else it is fetched, or the rest of it."""
    title = f"{repo}:{choice}" if choice else repo
    cached = next((snapshot for _, snapshot in snapshots(repo)), None)
    here = local_files(cached) if cached else []
    groups = gguf_choices(repo, here)
    if cached:
        # Without a choice, safetensors come first; only a repository that is all GGUF surely has none.
        quant = choice or ("q4_k_m" if repo.lower().endswith("gguf") else None)
        if quant and (group := choose(groups, quant)):
            return cached / group[0]
        if not choice and is_complete_folder(here):
            return cached
    try:
        repo, remote = remote_files(repo)
    except Unreachable as error:
        if cached and not choice and is_usable_folder(here):
            return cached
        if not choice and len(groups) == 1:
            choice = next(iter(groups))
        if cached and choice and (group := choose(groups, choice, loose=True)):
            say(f"{error}; using the cached {group[0]}")
            return cached / group[0]
        hint = f" (cached of it: {', '.join(groups)})" if groups else ""
        raise QwenMLXError(
            f"{title}: no such file or folder, not a cached model{hint}, and {error}; try again when it answers."
        ) from None
    except QwenMLXError as error:
        raise QwenMLXError(f"{str(error).rstrip('.')}{_nearest(title)}.") from None
    groups = gguf_choices(repo, remote)
    top = [file for file in remote if "/" not in file]
    weights = [file for file in top if file.endswith(".safetensors")]
    if choice is None and weights:
        # Weights last: once they are complete, so is the rest.
        small = [file for file in top if file.endswith((".json", ".jinja", "merges.txt"))]
        return fetch(repo, remote, [small, weights], cached, here)
    if not groups:
        if choice and weights:
            raise QwenMLXError(f"{title}: {repo} holds safetensors, no .gguf file; leave out :{choice}.")
        raise QwenMLXError(f"{title}: {repo} holds no complete .gguf or .safetensors model; choose another repository.")
    group = choose(groups, choice or "q4_k_m", loose=True)
    if group is None and choice is None and len(groups) == 1:
        group = next(iter(groups.values()))
    if group is None:
        near = difflib.get_close_matches((choice or "q4_k_m").lower(), [short.lower() for short in groups], 1)
        wrong = f"no .gguf file is meant by :{choice} alone" if choice else "it holds several .gguf models"
        hint = f" (the nearest is :{near[0]})" if near else ""
        raise QwenMLXError(f"{title}: {wrong}{hint}; add one of :{', :'.join(groups)} to {repo}.")
    return fetch(repo, remote, [group], cached, here) / group[0]


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


def cached_models() -> list[CachedModel]:
    """The default model, fetched or not; other .gguf files of the cache folder; Qwen2.5 models in the Hub's cache that
    are whole."""
    own = cache_folder() / DEFAULT.file
    default = verified() or (own if own.is_file() else None)
    models = [CachedModel(DEFAULT.name, default, DEFAULT.size)]
    for path in sorted(cache_folder().glob("*.gguf")):
        if path.name != DEFAULT.file and path.is_file():  # not a link to what is gone
            models.append(CachedModel(str(path), path, path.stat().st_size))
    for repo, snapshot in snapshots():
        if "qwen2.5" not in repo.lower():
            continue
        files = local_files(snapshot)
        for short, group in gguf_choices(repo, files).items():
            model = CachedModel(f"{repo}:{short}", snapshot / group[0], _size(snapshot, group))
            if model.name.lower() != DEFAULT.name.lower():
                models.append(model)
        if is_usable_folder(files):
            models.append(CachedModel(repo, snapshot, _size(snapshot, files)))
    return models


def _size(folder: Path, files: Iterable[str]) -> int:
    return sum((folder / file).stat().st_size for file in files)
