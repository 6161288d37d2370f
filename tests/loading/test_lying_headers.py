"""Safetensors whose header lies: refused by load and by the conversion, where wrong weights would be called exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_mlx import QwenMLXError
from qwen_mlx.conversion.convert import check
from qwen_mlx.loading.checkpoint import open_checkpoint
from reference.small_models import RandomModel, save_folder

NAME, OTHER = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
Header = dict[str, Any]


def shifted(header: Header, by: int) -> None:
    header[NAME]["data_offsets"] = [offset + by for offset in header[NAME]["data_offsets"]]


def with_shape(header: Header, change: Callable[[int], Any]) -> None:
    header[NAME]["shape"] = [change(size) for size in header[NAME]["shape"]]


LIES: dict[str, Callable[[Header], None]] = {
    "two tensors on the same bytes": lambda header: header[NAME].update(data_offsets=header[OTHER]["data_offsets"]),
    "offsets shifted by 4": lambda header: shifted(header, 4),
    "offsets shifted by 1": lambda header: shifted(header, 1),
    "shapes and 2^32": lambda header: with_shape(header, lambda size: size + 2**32),
    "fractions": lambda header: with_shape(header, lambda size: size + 0.5),
    "negative": lambda header: with_shape(header, lambda size: -size),
    "another dtype": lambda header: header[NAME].update(dtype="F16"),
    "offsets that end before they begin": lambda header: header[NAME]["data_offsets"].reverse(),
}


def rewrite(path: Path, edit: Callable[[str], str], tail: bytes = b"") -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = edit(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + tail)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "m", RandomModel())


def refused(folder: Path) -> None:
    for read in (open_checkpoint, check):
        with pytest.raises(QwenMLXError, match="safetensors"):
            read(folder)


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_header_that_lies(folder: Path, lie: Callable[[Header], None]):
    def edit(text: str) -> str:
        header = json.loads(text)
        lie(header)
        return json.dumps(header)

    rewrite(folder / "model.safetensors", edit)
    refused(folder)


def test_bytes_after_the_last_tensor(folder: Path):
    rewrite(folder / "model.safetensors", str, b"more")
    refused(folder)


def test_a_name_twice(folder: Path):
    def edit(text: str) -> str:
        header = json.loads(text)
        entry = json.dumps(header.pop(NAME))
        return (
            f"{json.dumps(header)[:-1]}, {json.dumps(NAME)}: {json.dumps(header[OTHER])}, {json.dumps(NAME)}: {entry}}}"
        )

    rewrite(folder / "model.safetensors", edit)
    refused(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}\0", "", "{", "[]", "nonsense", '{"a": 1}'])
def test_a_header_that_is_none(folder: Path, text: str):
    rewrite(folder / "model.safetensors", lambda _: text)
    refused(folder)


def test_a_header_without_end(folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(QwenMLXError, match="more than 32 MB"):
        open_checkpoint(folder)
