"""The meaning of a model's name: a path, the default model, or a model of the Hub that is cached or fetched."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from ...errors import QwenMLXError
from .client import Unreachable, check_digests, fetch, remote_files, say, snapshots
from .default import DEFAULT, cache_folder, verified
from .download import default_model


def resolve(name: str | os.PathLike[str] | None = None) -> Path:
    """The local path of a model, fetched first if need be.

    name: a .gguf file or a folder (what exists as a path is taken as one); a hub id "org/repo", "org/repo:quant" or
    "org/repo:file.gguf", in any case, or its address, see hub_id; None, for the default model. Returns the .gguf file
    (the first part, if split) or the folder. What is cached in full is used as it is, without any network.
    Raises QwenMLXError if there is no such thing, it cannot be fetched, its digest is wrong, or the disk is full.
    """
    if name is None:
        return default_model()
    if not isinstance(name, str | os.PathLike):
        raise QwenMLXError(f"The model is {name!r:.80}, expected the name of a .gguf file, a folder or a hub id.")
    text = os.fspath(name)
    if not text:
        raise QwenMLXError(
            "the model is named by an empty text; give a .gguf file, a folder or a hub id (org/repo:q4_k_m)."
        )
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return Path(path)
    meant = hub_id(text) if isinstance(name, str) else None
    if meant is not None:
        repo, choice = meant
        if f"{repo}:{choice}".lower() == DEFAULT.name.lower():
            return default_model()
        return _from_hub(repo, choice)
    raise QwenMLXError(
        f"{text}: no such file or folder{_nearest(path)}; it is not a hub id (org/repo or org/repo:q4_k_m) either"
        f"{_published(text) or '.'}"
    )


def hub_id(text: str) -> tuple[str, str | None] | None:
    """The repository of the Hub that a name means, and the choice in it.

    text: "org/repo" or "org/repo:q4_k_m", alone or after "hf.co/", "hf://" or "https://huggingface.co/", or the address
    of a page or file of a repository, percent-encoded or not, with ".git" or "@main" after the repository. Returns None
    for another name. Raises QwenMLXError for an address of another site, of another revision than main, or of a page
    that is no model's.
    """
    site = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://", text, re.IGNORECASE)
    if site is None and re.match(r"[a-z]\w*://", text, re.IGNORECASE):
        raise QwenMLXError(f"{text}: only models of huggingface.co are fetched; download the file and give its path.")
    path = unquote(re.split("[?#]", text[site.end() :])[0].strip("/")).removesuffix(".git") if site else text
    revision = re.match(r"([\w-][\w.-]*/[\w-][\w.-]*)@([^/:]+)", path)
    if revision and revision[2] != "main":
        raise QwenMLXError(f"{text}: names the revision {revision[2]}; only main is fetched: give {revision[1]}.")
    path = revision[1] + path[revision.end() :] if revision else path
    meant = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?::([^:]+))?", path)
    if meant and not meant[1].lower().endswith((".gguf", ".safetensors")):
        return meant[1], meant[2]
    if site is None:
        return None
    page = re.fullmatch(r"([^/:]+/[^/:]+)(?:/(?:resolve|blob|raw|tree)/([^/]+))?(?:/(.+))?", path)
    file = page[3] or "" if page else ""
    if page is None or page[1].startswith(("datasets/", "spaces/")) or (file and not page[2] and ".gguf" not in file):
        raise QwenMLXError(f"{text}: is no model's address; give org/repo, org/repo:q4_k_m or a .gguf file's address.")
    if page[2] not in (None, "main"):
        raise QwenMLXError(f"{text}: names the revision {page[2]}; only main is fetched: give {page[1]}.")
    return page[1], file if file.lower().endswith(".gguf") else None


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
    similar = [
        (difflib.SequenceMatcher(None, asked.lower(), name.lower()).ratio(), hint) for asked, name, hint in candidates
    ]
    ratio, hint = max(similar, default=(0, ""))
    return f" (the nearest is {hint})" if ratio > 0.6 else ""


def _published(asked: str) -> str:
    """A question after one of Qwen's own repositories, the first that has all words of `asked`; or nothing."""
    sizes = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
    names = [f"Qwen/Qwen2.5-{size}-Instruct-GGUF:q4_k_m" for size in sizes]
    names += [f"Qwen/Qwen2.5-Coder-{size}-Instruct-GGUF:q4_k_m" for size in sizes[:-1]]
    names += [f"Qwen/Qwen2.5-Math-{size}-Instruct" for size in ("1.5B", "7B", "72B")]
    words = set(re.split("[-_:/]", asked.lower().removesuffix(".gguf")))
    meant = [name for name in names if words <= set(re.split("[-_:/]", name.lower()))]
    return f"; did you mean {meant[0]}?" if meant and "qwen2.5" in words else ""


def _from_hub(repo: str, choice: str | None) -> Path:
    """A model of the Hub: what is cached in full is used as it is; else it is fetched, or the rest of it."""
    title = f"{repo}:{choice}" if choice else repo
    cached = next((snapshot for _, snapshot in snapshots(repo)), None)
    local = _local_files(cached) if cached else []
    groups = _gguf_models(repo, local)
    if cached:
        # Without a choice, safetensors come first; only a repository that is all GGUF surely has none.
        quant = choice or ("q4_k_m" if repo.lower().endswith("gguf") else None)
        if quant and (group := _choose(groups, quant)):
            return cached / group[0]
        if not choice and _is_usable_folder(local) and "generation_config.json" in local:
            return cached  # with sampling defaults: the Hub could add nothing that would change what is generated
        if not choice and _is_adapter(local):
            return cached
    try:
        repo, remote = remote_files(repo)
    except Unreachable as error:
        if cached and not choice and _is_usable_folder(local):
            return cached
        if not choice and len(groups) == 1:
            choice = next(iter(groups))
        if cached and choice and (group := _choose(groups, choice, loose=True)):
            say(f"{error}; using the cached {group[0]}")
            return cached / group[0]
        hint = f" (cached of it: {', '.join(groups)})" if groups else ""
        raise QwenMLXError(
            f"{title}: no such file or folder, not a cached model{hint}, and {error}; try again when it answers."
        ) from None
    except QwenMLXError as error:
        raise QwenMLXError(f"{str(error).rstrip('.')}{_nearest(title)}.") from None
    stages = _wanted(title, repo, choice, remote)
    needed = sum(remote[file][0] for files in stages for file in files if file not in local)
    fetched = [file for files in stages for file in files if file not in local]
    folder = cached if cached and not needed else fetch(repo, stages, needed)
    check_digests(repo, folder, {file: remote[file][1] for file in fetched})
    return folder / stages[0][0] if stages[0][0].lower().endswith(".gguf") else folder


def _wanted(title: str, repo: str, choice: str | None, remote: Iterable[str]) -> list[list[str]]:
    """The files to fetch of a repository, in stages: a GGUF's, or a folder's, whose weights come last, so that once
    they are complete the rest is too. Raises QwenMLXError where it is not clear which model is meant."""
    groups = _gguf_models(repo, remote)
    top = [file for file in remote if "/" not in file]
    weights = [file for file in top if file.endswith(".safetensors")]
    if choice is None and weights:
        return [[file for file in top if file.endswith((".json", ".jinja", "merges.txt"))], weights]
    if not groups and choice and weights:
        raise QwenMLXError(f"{title}: {repo} holds safetensors, no .gguf file; leave out :{choice}.")
    if not groups:
        raise QwenMLXError(f"{title}: {repo} holds no complete .gguf or .safetensors model; choose another repository.")
    group = _choose(groups, choice or "q4_k_m", loose=True)
    if group is None and choice is None and len(groups) == 1:
        group = next(iter(groups.values()))
    if group is None:
        near = difflib.get_close_matches((choice or "q4_k_m").lower(), [name.lower() for name in groups], 1)
        wrong = f"no .gguf file is meant by :{choice} alone" if choice else "it holds several .gguf models"
        hint = f" (the nearest is :{near[0]})" if near else ""
        raise QwenMLXError(f"{title}: {wrong}{hint}; add one of :{', :'.join(groups)} to {repo}.")
    return [group]


def _local_files(folder: Path) -> list[str]:
    """Names of the files under a folder, without links whose file is gone."""
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def _complete(files: Iterable[str], suffix: str) -> dict[str, list[str]]:
    """Files of a kind by stem: single files, and files split into parts (NAME-00001-of-00003) if none is missing."""
    groups: dict[tuple[str, int], list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(suffix):
            stem = file[: -len(suffix)]
            part = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})", stem)
            groups.setdefault((part[1], int(part[2])) if part else (stem, 1), []).append(file)
    return {stem: names for (stem, n_parts), names in groups.items() if len(names) == n_parts}


def _gguf_models(repo: str, files: Iterable[str]) -> dict[str, list[str]]:
    """The files of each .gguf model, by what its name adds to the repository's ("q4_k_m"), else by its full stem."""
    base = re.sub(r"[-_.]gguf$", "", repo.split("/")[-1].lower())
    models: dict[str, list[str]] = {}
    for stem, names in _complete(files, ".gguf").items():
        last = stem.rsplit("/", 1)[-1]
        if re.search(r"^mmproj|(^|[-_.])(mmproj|imatrix)([-_.]|$)", last.lower()):
            continue  # belongs to a model, and is none
        short = last[len(base) :].lstrip("-._") if last.lower().startswith(base) else ""
        models[short if short and short not in models else stem] = names
    return models


def _choose(groups: dict[str, list[str]], choice: str, *, loose: bool = False) -> list[str] | None:
    """The files of the model that is meant by its file's name or its short name; loose: else by the end of the short
    name, if only one model's has it."""
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
    """True for files with a configuration, a tokenizer and all weights."""
    files = set(files)
    parts = {name for name in files if re.search(r"-\d{5}-of-\d{5}\.safetensors$", name)}
    weights = _complete(files, ".safetensors")
    tokenizer = "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files
    return bool(weights) and "config.json" in files and tokenizer and parts <= set().union(*weights.values())


def _is_adapter(files: Iterable[str]) -> bool:
    """True for the files of an adapter, peft's or mlx-lm's."""
    files = set(files)
    return "adapter_config.json" in files and not files.isdisjoint(
        {"adapter_model.safetensors", "adapters.safetensors"}
    )


@dataclass(frozen=True)
class CachedModel:
    """A model on this machine: `name` is what resolve() takes, `path` is None while the default is not fetched yet.

    size: bytes on disk, or for a model not fetched yet the bytes to fetch.
    """

    name: str
    path: Path | None
    size: int

    def __str__(self) -> str:
        path = "not downloaded yet" if self.path is None else str(self.path)
        default = " (default)" if self.name == DEFAULT.name else ""
        return f"{self.size / 1e6:>9,.0f} MB  {self.name}{default}  {path}"


def cached_models() -> list[CachedModel]:
    """The default model, fetched or not; other .gguf files of the cache folder; complete Qwen2.5 models in the Hub's
    cache."""
    own = cache_folder() / DEFAULT.file
    default = verified() or (own if own.is_file() else None)
    models = [CachedModel(DEFAULT.name, default, DEFAULT.size)]
    for path in sorted(cache_folder().glob("*.gguf")):
        if path.name != DEFAULT.file and path.is_file():  # not a link to what is gone
            models.append(CachedModel(str(path), path, path.stat().st_size))

    def add(name: str, path: Path, snapshot: Path, files: Iterable[str]) -> None:
        models.append(CachedModel(name, path, sum((snapshot / file).stat().st_size for file in files)))

    for repo, snapshot in snapshots():
        if "qwen2.5" in repo.lower():
            files = _local_files(snapshot)
            for short, group in _gguf_models(repo, files).items():
                if f"{repo}:{short}".lower() != DEFAULT.name.lower():
                    add(f"{repo}:{short}", snapshot / group[0], snapshot, group)
            if _is_usable_folder(files):
                add(repo, snapshot, snapshot, files)
    return models
