"""An adapter by its name: a path or a hub id, perhaps with a scale, opened by what it is."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import QwenMLXError
from ...text.files import read_json
from .. import hub
from . import mlx_lm, peft
from .change import Change
from .gguf import read_gguf

Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


def parse(names: Names) -> list[tuple[str, float]]:
    """Names and scales of adapters, each "PATH" or "PATH:SCALE"; PATH is a folder, a .gguf file or a hub id.

    Raises QwenMLXError for what is none.
    """
    if names is None:
        return []
    if isinstance(names, str | os.PathLike):
        names = [names]
    if not isinstance(names, Sequence) or not all(isinstance(name, str | os.PathLike) for name in names):
        raise QwenMLXError(f"adapter is {names!r:.80}, expected PATH or PATH:SCALE, or a list of these.")
    return [_with_scale(os.fspath(name)) for name in names]


def _with_scale(text: str) -> tuple[str, float]:
    path, colon, number = text.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(text)):
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:  # of the Hub's org/repo:file.gguf
        return text, 1.0
    if not path or not math.isfinite(scale) or abs(scale) > 1e6:
        raise QwenMLXError(f"adapter is {text!r}, expected PATH or PATH:SCALE with a number such as 0.5.")
    return path, scale


def read(path: Path, shapes: Mapping[str, tuple[int, ...]], head: Mapping[str, tuple[int, ...]]) -> Change:
    """The change that an adapter makes to a model with parameters of these shapes; `head`: with that of a head, which a
    tied model has only by another name.

    Raises QwenMLXError (GGUFError for a GGUF) naming the file, the field or tensor, what it is and what was expected.
    """
    if not path.is_dir():
        if path.suffix.lower() != ".gguf":
            raise QwenMLXError(f"{path}: is no adapter; give the folder that holds adapter_config.json, or a .gguf.")
        return read_gguf(path, _digest([path]), head)
    settings = path / "adapter_config.json"
    if not settings.exists():
        ggufs = sorted(path.glob("*.gguf"))
        remedy = f"give a file of it, such as {ggufs[0]}" if ggufs else "give the folder that an adapter was saved in"
        raise QwenMLXError(f"{path}: has no adapter_config.json; {remedy}.")
    config = read_json(settings)
    if "peft_type" in config:
        _require_weights(path, peft.WEIGHTS, "adapter_model.bin")
        return peft.read_peft(path, config, _digest([settings, path / peft.WEIGHTS]), head)
    if "fine_tune_type" in config or "lora_parameters" in config:
        _require_weights(path, mlx_lm.WEIGHTS, "adapters.npz")
        return mlx_lm.read_mlx_lm(path, config, _digest([settings, path / mlx_lm.WEIGHTS]), shapes)
    raise QwenMLXError(f"{settings}: has neither peft's peft_type nor mlx-lm's lora_parameters; it is no adapter's.")


def resolve(name: str) -> Path:
    """The local path of an adapter, fetched first if need be. Raises QwenMLXError as hub.resolve."""
    return hub.resolve(name)


def _require_weights(folder: Path, name: str, older: str) -> None:
    if (folder / name).is_file():
        return
    if (folder / older).exists():
        raise QwenMLXError(
            f"{folder}: holds {older}, which can hold programs or is of an old form, and no {name}; load it with the "
            "library that wrote it and save it again as safetensors."
        )
    raise QwenMLXError(f"{folder}: {name} is missing; download the adapter again.")


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
