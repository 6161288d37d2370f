"""Packed folders and encoders, damaged anywhere: read, or refused in a sentence that names the file and the place."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx import QwenMLXError, load_encoder
from qwen_mlx.loading.checkpoint import open_checkpoint
from tests.helpers import foreign
from tests.helpers.encoders import encoder_folder
from tests.helpers.foreign import Stored, packed_folder, replace_bytes, write_safetensors

MODULE = "model.layers.1.mlp.down_proj"
CT = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
KINDS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, foreign.awq, {}),
    "gptq": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, foreign.gptq, {"order": True}),
    "w4a16": (CT | {"format": "pack-quantized"}, foreign.pack_quantized, {"symmetric": False}),
    "w8a8": (CT | {"format": "int-quantized"}, foreign.int_quantized, {"input_scale": True}),
    "nvfp4": (CT | {"format": "nvfp4-pack-quantized"}, foreign.fp4, {}),
    "mxfp4": (CT | {"format": "mxfp4-pack-quantized"}, foreign.fp4, {"kind": "mxfp4"}),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 48]}, foreign.float_quantized, {"scales": "block"}),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, foreign.nf4, {"nested": True}),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, foreign.llm_int8, {}),
}
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32, "I8": np.int8}
NUMPY |= {"U8": np.uint8, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8, "F64": np.float64, "BOOL": np.bool_}
ODD = st.sampled_from([None, 0, -1, 3, 2**70, 1.5, float("nan"), True, "", "x", [], [0], [[1]], {}, {"x": 1}])


@functools.cache
def intact(kind: str) -> tuple[Path, dict[str, Stored]]:
    """A packed folder and its tensors."""
    method, pack, arguments = KINDS[kind]
    folder, _ = packed_folder(Path(tempfile.mkdtemp()) / kind, method, pack, **arguments)
    return folder, stored(folder / "model.safetensors")


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file of any dtype."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8:start]).items() if name != "__metadata__"}
    tensors: dict[str, Stored] = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        array = np.frombuffer(data[start + first : start + last], NUMPY[entry["dtype"]])
        tensors[name] = entry["dtype"], array.reshape(entry["shape"])
    return tensors


@st.composite
def damaged_tensor(draw: st.DrawFn, tensor: Stored) -> Stored | None:
    """A tensor of another dtype, shape or contents; None for one that is missing."""
    dtype, array = tensor
    what = draw(st.sampled_from(["missing", "dtype", "shape", "rows", "bytes"]))
    if what == "missing":
        return None
    if what == "dtype":
        other = draw(st.sampled_from(sorted(NUMPY.keys() - {dtype})))
        return other, np.zeros(array.shape, NUMPY[other])
    if what == "shape":
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        return dtype, np.zeros(shape, array.dtype)
    if what == "rows":
        turned = [
            array.T,
            array.ravel(),
            array[None],
            array[:-1] if array.ndim else array,
            np.concatenate([array.ravel()] * 2),
        ]
        return dtype, draw(st.sampled_from(turned))
    size = array.nbytes
    raw = np.frombuffer(array.tobytes(), np.uint8).copy()
    start = draw(st.integers(0, max(0, size - 1)))
    raw[start : start + draw(st.integers(1, 64))] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    return dtype, raw.view(array.dtype).reshape(array.shape)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in JSON."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> Any:
    """JSON with one value replaced or left out."""
    value = copy.deepcopy(value)
    *outer, last = draw(st.sampled_from(list(places(value))))
    owner = functools.reduce(lambda inner, key: inner[key], outer, value)
    if draw(st.booleans()):
        owner[last] = draw(ODD)
    else:
        del owner[last]
    return value


@contextlib.contextmanager
def replaced(path: Path, write: Callable[[], object]) -> Iterator[None]:
    """A file that write() has damaged; it is as it was at the end."""
    data = path.read_bytes()
    try:
        write()
        yield
    finally:
        replace_bytes(path, data)


def check(read: Any, folder: Path, names: tuple[str, ...] = ()) -> None:
    """Asserts that read() works, or raises a sentence that some check foresaw, with one of `names`."""
    try:
        read()
    except QwenMLXError as error:
        message = str(error)
        assert str(folder) in message
        assert "nonsense" not in message, message
        assert "\n" not in message
        assert not names or any(name in message for name in names), message


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_tensor(kind: str, data: st.DataObject):
    folder, tensors = intact(kind)
    name = data.draw(st.sampled_from(sorted(name for name in tensors if name.startswith(f"{MODULE}."))))
    changed = data.draw(damaged_tensor(tensors[name]))
    spoiled = {n: t for n, t in tensors.items() if n != name} | ({} if changed is None else {name: changed})

    def read() -> None:
        with np.errstate(all="ignore"):
            open_checkpoint(folder).parameters[f"{MODULE}.weight"].values()

    path = folder / "model.safetensors"
    with replaced(path, lambda: write_safetensors(path, spoiled)):
        check(read, folder, (MODULE,))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_damaged_settings(kind: str, data: st.DataObject):
    folder, _ = intact(kind)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = data.draw(damaged_json(config["quantization_config"]))
    with replaced(path, lambda: path.write_text(json.dumps(config))):
        check(lambda: open_checkpoint(folder).parameters[f"{MODULE}.weight"].values(), folder)


@functools.cache
def encoder() -> Path:
    """An embedding model with each of sentence-transformers' files, and a classification head."""
    folder = encoder_folder(Path(tempfile.mkdtemp()) / "m", {"score.weight": np.ones((2, 64), np.float32)}, bare=False)
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [
        {"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "include_prompt": True},
        "2_Dense/config.json": {
            "in_features": 64,
            "out_features": 8,
            "bias": True,
            "activation_function": "torch.nn.Tanh",
        },
        "sentence_bert_config.json": {"max_seq_length": 100},
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    arrays: dict[str, Stored] = {
        "linear.weight": ("F32", np.ones((8, 64), np.float32)),
        "linear.bias": ("F32", np.ones(8, np.float32)),
    }
    write_safetensors(folder / "2_Dense" / "model.safetensors", arrays)
    return folder


FILES = ["modules.json", "1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json"]


@pytest.mark.parametrize("name", [*FILES, "config_sentence_transformers.json"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_damaged_files_of_an_encoder(name: str, data: st.DataObject):
    path = encoder() / name
    damaged = data.draw(damaged_json(json.loads(path.read_text())))
    with replaced(path, lambda: path.write_text(json.dumps(damaged))):
        check(lambda: load_encoder(encoder()).token_ids("hello"), encoder())


@pytest.mark.parametrize(("file", "tensor"), [("model", "score.weight"), ("2_Dense/model", "linear.weight")])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_damaged_head(file: str, tensor: str, data: st.DataObject):
    path = encoder() / f"{file}.safetensors"
    tensors = stored(path)
    changed = data.draw(damaged_tensor(tensors[tensor]))
    spoiled = {n: t for n, t in tensors.items() if n != tensor} | ({tensor: changed} if changed else {})
    with replaced(path, lambda: write_safetensors(path, spoiled)):
        check(lambda: load_encoder(encoder()), encoder(), (tensor.removesuffix(".weight"),))
