"""A trial's verdict, and the file that keeps it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...backend import mx
from ...errors import QwenMLXError
from ...text.files import atomic_write
from .. import dispatch, tunings
from .cases import Spec

LARGEST = 1 << 20  # bytes of a verdict's file


@dataclass(frozen=True)
class Verdict:
    """A trial's findings. refused: parts of the model, each with the reason; choices: the cut of each product, see
    tunings; speedup: of the kernels that a token takes against plain MLX, None where none was timed; times: the
    seconds of each case, of its kernel and of plain MLX; seconds: of the trial."""

    proven: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, tunings.Choice] = field(default_factory=dict)
    speedup: float | None = None
    times: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def adopt(self) -> None:
        """Lets dispatch and tunings follow it."""
        tunings.choose(self.choices)
        dispatch.adopt(self.proven, self.refused)

    def __str__(self) -> str:
        """In a sentence's second half."""
        if not self.proven:
            reasons = ", ".join(sorted(set(self.refused.values())))
            return f"none in use ({reasons})" if reasons else "none in use"
        speed = "" if self.speedup is None else f", {self.speedup:.1f} times plain MLX"
        if not self.refused:
            return f"in use{speed}"
        return f"in use{speed}, but plain MLX for " + ", ".join(f"{p} ({r})" for p, r in sorted(self.refused.items()))


def system() -> str:
    """ "macOS 15.5", or "Linux 6.1.0"."""
    version = platform.mac_ver()[0]
    return f"macOS {version}" if version else f"{platform.system()} {platform.release()}"


def machine() -> str:
    """The GPU and the system, "Apple M2 Pro, macOS 15.5"."""
    return f"{mx.device_info().get('device_name', 'a GPU')}, {system()}"


def identity(spec: Spec) -> dict[str, Any]:
    """Everything that a verdict depends on."""
    info = mx.device_info()
    names = ("device_name", "architecture", "memory_size", "total_memory", "compute_capability_major")
    return {
        "device": {name: str(info[name]) for name in names if name in info},
        "system": system(),
        "mlx": str(mx.__version__),  # type: ignore[attr-defined]  # not in its stub
        "sources": _digest(),
        "spec": spec.as_json(),
    }


def _digest() -> str:
    """The digest of the kernels, and of what launches them."""
    digest = hashlib.sha256()
    files = [*dispatch.SOURCES.rglob("*.h"), *dispatch.SOURCES.rglob("*.metal")]
    for path in sorted([*files, *Path(__file__).parents[1].rglob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def file_of(folder: Path, known: Mapping[str, Any]) -> Path:
    """The verdict's file of an identity."""
    text = json.dumps(known, sort_keys=True)
    return folder / "kernels" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read(path: Path, known: Mapping[str, Any]) -> Verdict | None:
    """The verdict that stands in a file, None unless it is a whole one of this identity."""
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(LARGEST))
        return _verdict(data["verdict"]) if data["identity"] == known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _verdict(data: Mapping[str, Any]) -> Verdict:
    """Raises ValueError, KeyError, TypeError or AttributeError for what no trial has written."""
    proven, refused, speedup = tuple(data["proven"]), dict(data["refused"]), data["speedup"]
    reasons_are_text = all(isinstance(reason, str) for reason in refused.values())
    if not reasons_are_text or {*proven, *refused} - {*dispatch.PARTS} or {*proven} & {*refused}:
        raise ValueError("A verdict has parts that are not known, or twice.")
    times = {name: (kernel, plain) for name, (kernel, plain) in data["times"].items()}
    if not all(map(is_time, [speedup or 0.0, data["seconds"], *(x for pair in times.values() for x in pair)])):
        raise ValueError("A time of a verdict is no number.")
    return Verdict(proven, refused, read_choices(data["choices"]), speedup, times, data["seconds"])


def read_choices(data: Mapping[str, Any]) -> dict[str, tunings.Choice]:
    """Raises ValueError unless these are choices that the kernels know."""
    choices = {key: (cut, groups) for key, (cut, groups) in data.items()}
    if not all(cut in tunings.CANDIDATES and groups in tunings.GROUPS for cut, groups in choices.values()):
        raise ValueError("A choice is none of the candidates.")
    return choices


def is_time(value: Any) -> bool:
    """True for a number from 0 on."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def write(path: Path, known: Mapping[str, Any], verdict: Verdict) -> None:
    """Keeps a verdict; where the folder cannot be written the next start asks again."""
    with contextlib.suppress(OSError, QwenMLXError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write_text(json.dumps({"identity": known, "verdict": asdict(verdict)}, indent=1))
