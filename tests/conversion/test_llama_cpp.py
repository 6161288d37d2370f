"""Exported files and quantized blocks beside llama.cpp's own, where llama-cpp-python is installed (it is built on
installation, in minutes, and is in no extra)."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qwen_mlx import export, load
from qwen_mlx.conversion.mixes import MIXES
from qwen_mlx.generation.engine import generate_tokens
from qwen_mlx.generation.settings import GenerationSettings
from qwen_mlx.gguf.blocks import BLOCK_TYPES, BlockType, dequantize
from qwen_mlx.gguf.quantize import quantize
from qwen_mlx.gguf.reader import GGUFFile
from reference.small_models import RandomModel, write_gguf

pytestmark = pytest.mark.slow
TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}


@pytest.fixture(scope="module")
def llama_cpp() -> ModuleType:
    return pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def theirs(llama_cpp: ModuleType) -> Callable[[np.ndarray, BlockType], np.ndarray]:
    """ggml's quantizer, without an importance matrix."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    function = ctypes.CDLL(str(next(folder.glob("libggml-base.*")))).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def quantized(x: np.ndarray, kind: BlockType) -> np.ndarray:
        rows, columns = x.shape
        out = np.empty((rows, columns // kind.block_size * kind.type_size), np.uint8)
        assert function(kind.type_id, x.ctypes.data, out.ctypes.data, 0, rows, columns, None) == out.nbytes
        return out

    return quantized


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.parametrize("tensor", ["blk.0.ffn_down.weight", "blk.11.ffn_down.weight", "output.weight"])
def test_errors_on_the_real_models_tensors(real_gguf: Path, theirs: Callable, tensor: str):
    """At most 1.02 times llama.cpp's root mean square error, for all types that export() chooses, but for the tensor's
    own: that is copied."""
    file = GGUFFile(real_gguf)
    values = dequantize(file.raw(tensor)[:4096], file.tensors[tensor].type)
    values = np.ascontiguousarray(values[:, : values.shape[1] // 256 * 256])
    for name in ("Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q5_0", "Q5_1", "Q8_0"):
        kind = TYPES[name]
        if kind is file.tensors[tensor].type:
            continue
        ours = rms(dequantize(quantize(values, kind), kind) - values)
        assert ours <= 1.02 * rms(dequantize(theirs(values, kind), kind) - values), name


@pytest.mark.parametrize("name", ["q4_k_m", "q5_k_m", "q6_k", "q4_0", "q8_0"])
def test_the_types_are_llama_cpps(tmp_path: Path, llama_cpp: ModuleType, name: str):
    """llama.cpp quantizes the same float32 file into the same types, tensor by tensor."""
    model = RandomModel(hidden_size=256, intermediate_size=320, num_hidden_layers=17)
    source = write_gguf(tmp_path / "source.gguf", model)
    export(source, tmp_path / "ours.gguf", name)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = MIXES[name].file_type
    paths = [str(tmp_path / file).encode() for file in ("source.gguf", "theirs.gguf")]
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(settings)) == 0
    ours, expected = GGUFFile(tmp_path / "ours.gguf").tensors, GGUFFile(tmp_path / "theirs.gguf").tensors
    assert {n: info.type.name for n, info in ours.items()} == {n: info.type.name for n, info in expected.items()}


@pytest.mark.parametrize("name", ["f16", "q4_k_m"])
def test_llama_cpp_generates_the_same_tokens(tmp_path: Path, real_gguf: Path, llama_cpp: ModuleType, name: str):
    """24 greedy tokens after a prompt of the real model, exported in another type."""
    out = tmp_path / "out.gguf"
    export(real_gguf, out, name)
    model, tokenizer = load(out, dtype="float32")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Write a haiku about the sea."}])
    other = llama_cpp.Llama(str(out), n_ctx=256, n_batch=1, n_ubatch=1, verbose=False)
    rendered = tokenizer.decode(ids, skip_special=False).encode()
    assert other.tokenize(rendered, add_bos=False, special=True) == ids
    expected = list(itertools.islice(other.generate(ids, temp=0.0, repeat_penalty=1.0, top_k=1), 24))
    settings = GenerationSettings()
    assert [token.id for token in itertools.islice(generate_tokens(model, ids, settings), 24)] == expected
