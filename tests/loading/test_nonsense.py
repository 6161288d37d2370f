"""Numbers, types and functions that no check foresaw: a sentence from every door, and the right one to blame."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_mlx import QwenMLXError, convert, load
from qwen_mlx.conversion.convert import check
from qwen_mlx.loading.hub import default
from reference.small_models import RandomModel, save_folder, write_gguf
from tests.helpers.cases import each

YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64, "rope_theta": 1e4}
NUMBERS: list[dict[str, Any]] = [
    {"rope_parameters": YARN | {"factor": 1e308}},
    {"rope_parameters": YARN | {"factor": 1e-300}},
    {"rope_parameters": YARN | {"factor": 4.0, "attention_factor": 1e300}},
    {"rope_parameters": YARN | {"factor": 4.0, "beta_fast": 1e-320, "beta_slow": 1e308}},
    {"rms_norm_eps": 1e308},
    {"rope_theta": 1e-300, "rope_parameters": None},
    {"max_position_embeddings": 10**400},
    {"num_hidden_layers": 10**12},
    {"hidden_size": 2**63, "num_attention_heads": 2**57},
    {"vocab_size": 1e30},
]


@each("read", [load, check], ids=["load", "check"])
@each("changes", NUMBERS, ids=lambda changes: ",".join(changes) + str(len(str(changes))))
def test_numbers_of_a_configuration(tmp_path: Path, changes: dict[str, Any], read: Callable[[Path], Any]):
    path = save_folder(tmp_path / "m", RandomModel()) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with contextlib.suppress(QwenMLXError):  # no other error
        read(path.parent)


def test_the_caller_s_own_error_is_not_the_file_s(tmp_path: Path):
    def broken(*_: int) -> None:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        load(write_gguf(tmp_path / "m.gguf", RandomModel()), progress=broken)


@each("name", [5, ["a"], b"m.gguf", 1.5])
def test_names_of_models_that_are_none(name: Any, tmp_path: Path):
    for read in (load, lambda name: convert(name, tmp_path / "out")):
        with pytest.raises(QwenMLXError, match="expected the name of"):
            read(name)


def test_arguments_of_a_tokenizer(tmp_path: Path):
    _, tokenizer = load(write_gguf(tmp_path / "m.gguf", RandomModel()))
    for wrong in (5, None, b"a", ["a"]):
        with pytest.raises(QwenMLXError, match="expected a string"):
            tokenizer.encode(wrong)  # type: ignore[arg-type]
    for wrong in (5, None, "a", [None], ["1"], [1.5]):
        with pytest.raises(QwenMLXError, match="expected a list of integers"):
            tokenizer.decode(wrong)  # type: ignore[arg-type]


def test_the_proof_of_the_default_model_ends_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Other bytes with the old size and time are not taken for what was hashed."""
    monkeypatch.setenv("QWEN_MLX_CACHE", str(tmp_path))
    path = tmp_path / default.DEFAULT.file
    path.write_bytes(b"right")
    default.mark(path)
    assert default.verified() == path
    times = path.stat()
    path.write_bytes(b"wrong")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert default.verified() is None
