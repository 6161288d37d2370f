"""Folders of small random models without a language head, as Hugging Face writes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from reference.small_models import RandomModel, save_folder
from tests.helpers.foreign import Stored, write_safetensors

TEXTS = ["hello", "a much longer text, of which the tokens are many", "x", "hello hello", "hellx"]


def close_to_exact(ours: np.ndarray, float32: np.ndarray, float64: np.ndarray) -> None:
    """Asserts that `ours` is as near to the values in float64 as four times the largest error of another library's
    float32, the noise floor of this comparison."""
    assert float32.dtype == np.float32
    assert float64.dtype == np.float64
    noise = float(np.abs(float32 - float64).max())
    assert 0 < noise < 1e-4 * np.abs(float64).max()
    np.testing.assert_allclose(ours, float64, rtol=0, atol=4 * noise)


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


def classifier(path: Path, labels: int = 3, head: np.ndarray | None = None, **config) -> Path:
    if head is None:
        head = np.random.default_rng(1).standard_normal((labels, 64)).astype(np.float32)
    names = {str(i): f"label {i}" for i in range(labels)}
    settings = {"architectures": ["Qwen2ForSequenceClassification"], "id2label": names}
    settings["label2id"] = {name: int(i) for i, name in names.items()}
    return encoder_folder(path, {"score.weight": head}, bare=False, **settings | config)
