"""Which files of a repository make a model, and which of its models is meant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


def local_files(folder: Path) -> list[str]:
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


def gguf_choices(repo: str, files: Iterable[str]) -> dict[str, list[str]]:
    """The files of each .gguf model, by what its name adds to the repository's ("q4_k_m"), else by its whole stem."""
    base = re.sub(r"[-_.]gguf$", "", repo.split("/")[-1].lower())
    choices: dict[str, list[str]] = {}
    for stem, names in _whole(files, ".gguf").items():
        last = stem.rsplit("/", 1)[-1]
        short = last[len(base) :].lstrip("-._") if last.lower().startswith(base) else ""
        choices[short if short and short not in choices else stem] = names
    return choices


def choose(groups: dict[str, list[str]], choice: str, *, loose: bool = False) -> list[str] | None:
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


def is_usable_folder(files: Iterable[str]) -> bool:
    """Has configuration, tokenizer and all weights."""
    files = set(files)
    parts = {name for name in files if re.search(r"-\d{5}-of-\d{5}\.safetensors$", name)}
    weights = _whole(files, ".safetensors")
    return bool(weights) and {"config.json", "tokenizer.json"} <= files and parts <= set().union(*weights.values())


def is_complete_folder(files: Iterable[str]) -> bool:
    """Usable, and brings its sampling defaults too: nothing that the Hub could add would change what is generated."""
    return is_usable_folder(files) and "generation_config.json" in set(files)
