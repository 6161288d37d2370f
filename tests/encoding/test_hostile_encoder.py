"""Folders of embedding models that somebody made to do harm."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import QwenMLXError, embed, load_encoder
from qwen_mlx.text import limits
from tests.helpers.cases import each
from tests.helpers.encoders import encoder_folder
from tests.helpers.foreign import write_safetensors

POOLING, DENSE = "sentence_transformers.models.Pooling", "sentence_transformers.models.Dense"


def with_modules(path: Path, modules: object) -> Path:
    folder = encoder_folder(path)
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@each("name", ["../secret", "a/../../secret", "{absolute}", "a\0b", "..\\secret", "/"])
def test_a_module_outside_of_the_folder_is_not_read(tmp_path: Path, name: str):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    folder = with_modules(tmp_path / "m", [{"type": POOLING, "path": name.format(absolute=secret)}])
    with pytest.raises(QwenMLXError, match="expected a folder within the model's"):
        load_encoder(folder)


def test_a_module_whose_folder_is_a_link_is_read(tmp_path: Path):
    """A hub's cache keeps files as links."""
    (tmp_path / "blob").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    folder = with_modules(tmp_path / "m", [{"type": POOLING, "path": "1_Pooling"}])
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").symlink_to(tmp_path / "blob")
    assert load_encoder(folder).settings.pooling == "mean"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        (json.dumps([{"type": "sentence_transformers.models.Normalize", "path": ""}] * 65), "has 65 modules"),
    ],
)
def test_modules_json_is_bounded(tmp_path: Path, text: str, message: str):
    folder = encoder_folder(tmp_path / "m")
    (folder / "modules.json").write_text(text)
    with pytest.raises(QwenMLXError, match=message):
        load_encoder(folder)


@pytest.mark.parametrize("name", ["modules.json", "additional_chat_templates/x.jinja"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str):
    folder = encoder_folder(tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(QwenMLXError, match="is not a regular file"):
        load_encoder(folder)


@pytest.mark.parametrize("sizes", [(64, 2**40), (2**40, 8), (32, 8)])
def test_sizes_of_a_projection(tmp_path: Path, sizes: tuple[int, int]):
    folder = with_modules(tmp_path / "m", [{"type": DENSE, "path": "d"}])
    (folder / "d").mkdir()
    config = {"in_features": sizes[0], "out_features": sizes[1], "bias": False}
    (folder / "d" / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "d" / "model.safetensors", {"linear.weight": ("F32", np.ones((8, 32), np.float32))})
    with pytest.raises(QwenMLXError):
        load_encoder(folder)


def test_a_default_prompt_that_is_no_name(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"default_prompt_name": ["x"]}))
    with pytest.raises(QwenMLXError, match="'default_prompt_name' is"):
        load_encoder(folder)


def test_the_library_s_own_errors_are_sentences(tmp_path: Path):
    folder = encoder_folder(tmp_path / "m")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": {"type": "None"}}))
    with pytest.raises(QwenMLXError, match="tokenizer"):
        load_encoder(folder)


def test_of_a_long_text_only_the_beginning_is_given_to_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = encoder_folder(tmp_path / "m")
    text = "hello " * 500
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40}))
    expected = embed(load_encoder(folder), [text])
    given: list[int] = []
    original = limits.pieces
    monkeypatch.setattr(limits, "PIECE", 60)
    monkeypatch.setattr("qwen_mlx.loading.encoder.PIECE", 60)
    monkeypatch.setattr(limits, "splits_after_lines", lambda library: True)
    monkeypatch.setattr(limits, "pieces", lambda text: (given.append(len(p)) or p for p in original(text)))
    np.testing.assert_array_equal(embed(load_encoder(folder), [text]), expected)
    assert sum(given) < len(text) / 2
