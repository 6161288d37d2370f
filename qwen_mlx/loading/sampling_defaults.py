"""A model's own sampling settings: from its GGUF, from generation_config.json, or as its family publishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import QwenMLXError
from ..generation.sampling import SamplingSettings
from ..gguf.reader import GGUFFile
from ..text.files import read_json

# Qwen's settings for its instruction-tuned models (generation_config.json of Qwen2.5-*-Instruct; 1.05 is the value of
# the sizes from 3B on and of Qwen's own documentation), for files without settings of their own.
INSTRUCT_SETTINGS = SamplingSettings(0.7, 20, 0.8, 0.0, 1.05, source="Qwen2.5-Instruct's published settings")
# DeepSeek's settings for DeepSeek-R1 and its distillations (README of DeepSeek-R1, usage recommendations).
R1_SETTINGS = SamplingSettings(0.6, top_p=0.95, source="DeepSeek-R1's published settings")
GREEDY_SETTINGS = SamplingSettings(source="greedy: no settings in the file and not an instruction-tuned model")


def gguf_defaults(file: GGUFFile) -> SamplingSettings:
    """The file's `general.sampling.*`, else the family's for an instruction-tuned model, else greedy."""
    keys = {
        "temp": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "penalty_repeat": "repetition_penalty",
    }
    own = {ours: file.metadata.get(f"general.sampling.{key}") for key, ours in keys.items()}
    own = {name: value for name, value in own.items() if value is not None}
    if own:
        return _settings(own, f"general.sampling of {file.path.name}", file.path)
    finetune = f"{file.metadata.get('general.finetune', '')} {file.metadata.get('general.name', '')} {file.path.name}"
    if "deepseek-r1" in finetune.lower().replace(" ", "-"):
        return R1_SETTINGS
    return INSTRUCT_SETTINGS if "instruct" in finetune.lower() else GREEDY_SETTINGS


def folder_defaults(folder: Path) -> SamplingSettings:
    """The settings of generation_config.json, else greedy."""
    path = folder / "generation_config.json"
    if not path.exists():
        return GREEDY_SETTINGS
    raw = read_json(path)
    own = {
        name: raw[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") if raw.get(name)
    }
    if not raw.get("do_sample", False):
        own = {name: value for name, value in own.items() if name == "repetition_penalty"}
    return _settings(own, path.name, path)


def _settings(values: dict[str, Any], source: str, path: Path) -> SamplingSettings:
    try:
        return SamplingSettings(**values, source=source)
    except QwenMLXError as error:
        raise QwenMLXError(f"{path}: {error}") from None
