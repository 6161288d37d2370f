"""Folders of small random models without a language head, as Hugging Face writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from reference.small_models import RandomModel, save_folder
from tests.helpers.foreign import Stored, write_safetensors

TEXTS = ["hello", "a much longer text, of which the tokens are many", "x", "hello hello", "hellx"]


def encoder_folder(path: Path, head: dict[str, np.ndarray] | None = None, bare: bool = True, **config) -> Path:
    """A folder of a Qwen2Model, or of one with a head: no lm_head, and the names of the bare model."""
    model = RandomModel(tie_word_embeddings=False)
    save_folder(path, model)
    tensors: dict[str, Stored] = {}
    for name, array in model.state_dict().items():
        if name != "lm_head.weight":
            tensors[name.removeprefix("model.") if bare else name] = "F32", array
    for name, array in (head or {}).items():
        tensors[name] = "F32", array
    write_safetensors(path / "model.safetensors", tensors)
    settings = json.loads((path / "config.json").read_text()) | {"architectures": ["Qwen2Model"]} | config
    (path / "config.json").write_text(json.dumps(settings))
    return path


def classifier(path: Path, labels: int = 3, **config) -> Path:
    head = np.random.default_rng(1).standard_normal((labels, 64)).astype(np.float32)
    names = {str(i): f"label {i}" for i in range(labels)}
    return encoder_folder(
        path,
        {"score.weight": head},
        bare=False,
        architectures=["Qwen2ForSequenceClassification"],
        id2label=names,
        label2id={name: int(i) for i, name in names.items()},
        **config,
    )
