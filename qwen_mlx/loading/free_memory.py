"""Free memory, looked at before a model is read: a sentence instead of a process that is killed."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import QwenMLXError

_CGROUP = Path("/sys/fs/cgroup")  # a container sees its own limit here


def require_memory(needed: int, path: Path, packed: bool) -> None:
    """Raises QwenMLXError if `needed` bytes for the weights of `path` are more than what is free. packed: as loaded."""
    free = available()
    if free is None or needed <= free:
        return
    remedy = (
        "choose a smaller model or quantization" if packed else "leave the weights packed, or choose a smaller model"
    )
    raise QwenMLXError(
        f"{path}: the weights take {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; close other "
        f"programs, or {remedy}."
    )


def available() -> int | None:
    """Bytes that this process can still use: what Linux says is available, at most what a container's limit leaves; all
    memory on macOS, which compresses and swaps; None where the system does not say."""
    try:
        free = _meminfo()["MemAvailable"]
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):
            return None
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, max(0, int(limit) - int(used))) if limit != "max" else free
    except (OSError, ValueError):
        return free


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(value.split()[0]) * 1024 for name, value in (line.split(":", 1) for line in lines)}
