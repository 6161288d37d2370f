"""Contexts as files state them: Qwen2.5-1M's dual chunk attention, and a GGUF's rope scaling as llama.cpp reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qwen_mlx import GGUFError, QwenMLXError, convert, load
from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.model.config import ModelConfig, RopeScaling
from reference.small_models import RandomModel, save_folder, write_gguf
from tests.helpers.cases import each

ONE_MILLION = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}


def folder_of(path: Path, **config: object) -> Path:
    save_folder(path, RandomModel())
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


def distances(length: int, chunk_size: int, local_size: int) -> np.ndarray:
    """The distance between each query and each key by dual chunk attention (An et al. 2024, arXiv:2402.17463, with the
    local window of Qwen2.5-1M's technical report, arXiv:2501.15383)."""
    stride = chunk_size - local_size
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    chunks = query // stride - key // stride
    within, successive = query % stride - key % stride, np.minimum(query % stride + stride, chunk_size) - key % stride
    return np.select([chunks == 0, chunks == 1], [within, successive], chunk_size - key % stride)


@each(("chunk_size", "local_size"), [(16, 4), (32, 1), (32, 16), (10, 3)])
def test_dual_chunk_attention_is_plain_attention_up_to_its_chunk(chunk_size: int, local_size: int):
    def equal(length: int) -> bool:
        causal = np.tril(np.ones((length, length), bool))
        plain = np.arange(length)[:, None] - np.arange(length)[None]
        return bool((distances(length, chunk_size, local_size) == plain)[causal].all())

    assert equal(chunk_size)
    assert not equal(chunk_size + 2)


def test_the_context_of_a_folder_ends_where_dual_chunk_attention_begins(tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "m", max_position_embeddings=1010000, dual_chunk_attention_config=ONE_MILLION)
    model, _ = load(folder)
    assert model.config.context_length == 262144
    assert f"{folder}: the context is 262144 tokens and not 1010000" in capsys.readouterr().err
    convert(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 262144


def test_a_folder_or_gguf_that_has_lost_the_setting_is_known_by_its_context(tmp_path: Path, capsys):
    model = RandomModel(max_position_embeddings=1010000)
    for path in (folder_of(tmp_path / "m", max_position_embeddings=1010000), write_gguf(tmp_path / "m.gguf", model)):
        assert load(path)[0].config.context_length == 262144
        assert f"{path}: the context is 262144 tokens" in capsys.readouterr().err


def test_a_context_within_the_chunk_is_not_cut(tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "m", max_position_embeddings=131072, dual_chunk_attention_config=ONE_MILLION)
    assert load(folder)[0].config.context_length == 131072
    assert capsys.readouterr().err == ""


YARN = {"rope_type": "yarn", "rope_theta": 1e7, "factor": 4.0, "original_max_position_embeddings": 262144}


@each(("settings", "said"), [({"dual_chunk_attention_config": ONE_MILLION}, True), ({}, False)])
@each("length", [262144, 1010000])
def test_rope_scaling_beside_dual_chunk_attention_says_the_context_that_it_gives(
    tmp_path: Path, settings: dict, said: bool, length: int, capsys
):
    folder = folder_of(tmp_path / "m", max_position_embeddings=length, rope_parameters=YARN, **settings)
    assert load(folder)[0].config.context_length == 1048576
    error = capsys.readouterr().err
    assert ("the context is 1048576 tokens, by yarn rope scaling alone" in error) == said
    assert "262144 tokens and not" not in error


def test_yarn_that_is_asked_for_after_the_cut_says_the_context_that_it_gives(tmp_path: Path, capsys):
    folder = folder_of(tmp_path / "m", max_position_embeddings=1010000, dual_chunk_attention_config=ONE_MILLION)
    assert load(folder, yarn=2)[0].config.context_length == 524288
    assert capsys.readouterr().err.endswith(f"{folder}: with yarn 2 the context is 524288 tokens\n")


def test_the_model_is_not_told_to_extend_by_yarn_from_where_it_was_not_trained(tmp_path: Path):
    config = load(folder_of(tmp_path / "m", max_position_embeddings=1010000))[0].config
    assert config.suggest_yarn(300000) == "shorten it"
    assert config.with_yarn(4).rope_scaling == RopeScaling("yarn", 4.0, 262144)


@each("dual", [[], {}, {"chunk_size": 0}, {"chunk_size": "262144"}, {"chunk_size": True}], ids=str)
def test_a_dual_chunk_attention_without_its_sizes(tmp_path: Path, dual: object):
    folder = folder_of(tmp_path / "m", dual_chunk_attention_config=dual)
    with pytest.raises(QwenMLXError, match=r"dual_chunk_attention_config is .*, expected an object with"):
        load(folder)


LINEAR = RopeScaling("linear", 4.0, 512)
SCALING = {
    "a factor alone": ({"rope.scaling.factor": 4.0}, LINEAR),
    "the old name": ({"rope.scale_linear": 4.0}, LINEAR),
    "the new name before the old": ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, LINEAR),
    "a type": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
    "none, whatever the factor": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    "linear by nothing": ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None),
    "linear by one": ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
    "linear by no factor": ({"rope.scaling.type": "linear"}, None),
}


@each("case", SCALING)
def test_rope_scaling_of_a_gguf_is_what_llama_cpp_reads(tmp_path: Path, case: str):
    fields, expected = SCALING[case]

    def edit(writer, tensors) -> None:
        for key, value in fields.items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(f"qwen2.{key}", value)

    path = write_gguf(tmp_path / "m.gguf", RandomModel(max_position_embeddings=512), edit=edit)
    assert ModelConfig.from_gguf(GGUFFile(path)).rope_scaling == expected


@each(
    ("fields", "message"),
    [
        ({"rope.scaling.alpha": 1000.0}, r"'qwen2.rope.scaling.alpha' is 1000.0, a rotary setting that no qwen2"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, r"'qwen2.rope.scaling.yarn_ext_factor' is 0.5"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier' is 0.1"),
        ({"rope.scaling.yarn_beta_fast": 1.0, "rope.scaling.yarn_beta_slow": 32.0}, r"beta_fast is 1.0 and its .*swap"),
    ],
)
def test_rotary_settings_of_a_gguf_that_are_not_computed(tmp_path: Path, fields: dict[str, float], message: str):
    def edit(writer, tensors) -> None:
        writer.add_string("qwen2.rope.scaling.type", "yarn")
        writer.add_float32("qwen2.rope.scaling.factor", 4.0)
        for key, value in fields.items():
            writer.add_float32(f"qwen2.{key}", value)

    with pytest.raises(GGUFError, match=message):
        ModelConfig.from_gguf(GGUFFile(write_gguf(tmp_path / "m.gguf", RandomModel(), edit=edit)))
