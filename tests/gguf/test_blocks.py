"""The block formats against gguf-py (values bit for bit), ggml's own quantizers, and MLX's arithmetic."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx.errors import GGUFError
from qwen_mlx.gguf import blocks
from qwen_mlx.gguf.blocks import BLOCK_TYPES, BlockType
from qwen_mlx.gguf.packing import DENSE
from qwen_mlx.gguf.reader import GGUFFile
from tests.helpers.blocks import HALVES, ROUNDED_DATA, SCALES, assert_same_numbers, gguf_py, random_rows
from tests.helpers.cases import each

KINDS = list(BLOCK_TYPES.values())
BY_NAME = {kind.name: kind for kind in KINDS}
BLOCKED = [kind for kind in KINDS if kind.block_size > 1]
AFFINE = [kind for kind in KINDS if kind.packing.kind == "affine"]

AFFINE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8, "IQ4_NL": 8, "IQ4_XS": 8}


def ids(kinds: list[BlockType]) -> list[str]:
    return [kind.name for kind in kinds]


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, signs of zeros included; any NaN equals any NaN, since IEEE 754 leaves their payload open."""
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    found_bits, expected_bits = found.view(np.uint32), expected.view(np.uint32)
    if not np.array_equal(found_bits, expected_bits):
        same = (found_bits == expected_bits) | (np.isnan(found) & np.isnan(expected))
        assert same.all(), f"{(~same).sum()} of {same.size} values differ, first at {np.argwhere(~same)[0]}"


def in_mlx(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, kind: BlockType) -> np.ndarray:
    """mx.dequantize in float32."""
    wide = [mx.array(array).astype(mx.float32) for array in (scales, biases)]
    with mx.stream(mx.cpu):
        return np.array(
            mx.dequantize(mx.array(codes), *wide, group_size=kind.packing.group_size, bits=kind.packing.bits)
        )


def test_table_is_gguf_pys():
    can = {int(kind) for kind in gguf.quants._type_traits} | {0, 1}
    assert can - set(BLOCK_TYPES) == set(), "gguf-py dequantizes a type that the table lacks"
    for type_id, kind in BLOCK_TYPES.items():
        assert type_id == kind.type_id
        theirs = gguf.GGMLQuantizationType(type_id)
        assert (kind.name, (kind.block_size, kind.type_size)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])
        assert kind.packing == DENSE or (kind.exact and kind.block_size % kind.packing.group_size == 0)
    assert {kind.name: kind.packing.bits for kind in AFFINE} == AFFINE_BITS


@each("kind", KINDS, ids=ids(KINDS))
def test_values_of_random_blocks(kind: BlockType):
    raw = random_rows(kind, 61, 2 if kind.block_size > 1 else 96)
    found = blocks.dequantize(raw, kind)
    assert found.shape == (61, raw.shape[1] // kind.type_size * kind.block_size)
    assert_same_bits(found, gguf_py(raw, kind))


@each("scales", SCALES)
@each("kind", [BY_NAME[name] for name in HALVES], ids=list(HALVES))
def test_values_with_extreme_scales(kind: BlockType, scales: str):
    raw = random_rows(kind, 31, 3, SCALES[scales])
    assert_same_bits(blocks.dequantize(raw, kind), gguf_py(raw, kind))


def test_values_of_every_mxfp4_exponent():
    raw = random_rows(BY_NAME["MXFP4"], 256, 1)
    raw[:, 0] = np.arange(256)
    assert_same_bits(blocks.dequantize(raw, BY_NAME["MXFP4"]), gguf_py(raw, BY_NAME["MXFP4"]))


def test_values_of_blocks_from_ggmls_quantizers():
    """ggml_blocks.npz: normal weights, their blocks from ggml's C quantizers and the SHA-256 of the float32 values that
    ggml's C code gives back (both through the package libgguf 0.2.2); independent of gguf-py."""
    stored = np.load(Path(__file__).with_name("ggml_blocks.npz"))
    weights = stored["weights"].astype(np.float32)
    for kind in BLOCKED:
        values = blocks.dequantize(stored[kind.name], kind)
        assert hashlib.sha256(values.tobytes()).digest() == stored[f"{kind.name}.sha256"].tobytes(), kind.name
        error = np.linalg.norm(values - weights) / np.linalg.norm(weights)
        assert error < min(0.9, 4 * 2 ** (-8 * kind.type_size / kind.block_size)), (kind.name, error)


@each("name", ["Q4_1", "Q6_K", "F16", "BF16", "I8", "IQ4_XS", "IQ3_S"])
def test_chunks_threads_and_out(name: str, monkeypatch: pytest.MonkeyPatch):
    kind = BY_NAME[name]
    raw = random_rows(kind, 7, 37 if kind.block_size > 1 else 999)
    monkeypatch.setattr(blocks, "CHUNK_WEIGHTS", 2 * kind.block_size)
    out = np.full((7, raw.shape[1] // kind.type_size * kind.block_size), 7, np.float32)
    assert blocks.dequantize(raw, kind, out=out) is out
    assert_same_bits(out, gguf_py(raw, kind))
    assert_same_bits(blocks.dequantize(raw[3:5], kind), out[3:5])
    assert blocks.dequantize(raw[:0], kind).shape == (0, out.shape[1])


def test_writes_into_an_mlx_array():
    kind = BY_NAME["Q5_0"]
    raw = random_rows(kind, 4, 2)
    array = mx.zeros((4, 64))
    mx.eval(array)
    blocks.dequantize(raw, kind, out=np.array(array, copy=False))
    assert_same_numbers(np.array(array), gguf_py(raw, kind))


def test_temporary_memory_is_small():
    kind = BY_NAME["Q5_K"]
    raw = random_rows(kind, 128, 200)  # 26 MB of values, 7 chunks
    out = np.empty((128, 200 * 256), np.float32)
    blocks.dequantize(raw, kind, out=out)  # the first call imports and starts threads
    tracemalloc.start()
    blocks.dequantize(raw, kind, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < blocks.threads() * (4 << 20), peak


@pytest.mark.slow
def test_real_file_values_and_mlx_forms(real_gguf: Path):
    """All 291 tensors: values equal gguf-py's, and MLX's from the packed form equal them."""
    file = GGUFFile(real_gguf)

    def check(name: str) -> bool:
        raw, kind = file.raw(name), file.tensors[name].type
        step = max(1, (1 << 21) // file.tensors[name].shape[-1])  # rows in pieces: the embedding's values are 545 MB
        for piece in (raw[start : start + step] for start in range(0, len(raw), step)):
            values = blocks.dequantize(piece, kind)
            assert_same_bits(values, gguf_py(piece, kind).reshape(values.shape))
            if kind.packing.kind == "affine":
                codes, scales, biases = blocks.affine(piece, kind)
                assert str(scales.dtype) == str(biases.dtype) == kind.scale_dtype, name
                assert_same_numbers(in_mlx(codes, scales, biases, kind), values)

        return kind.packing.kind == "affine"

    with ThreadPoolExecutor(2) as pool:  # MLX's dequantize on the CPU uses one core
        packed = list(pool.map(check, file.tensors))
    assert (len(packed), sum(packed)) == (291, 158)


@each("scales", ["random", "zero", "subnormal", "largest", "negative"])
@each("kind", AFFINE, ids=ids(AFFINE))
def test_affine_is_exact(kind: BlockType, scales: str):
    raw = random_rows(kind, 24, 4, SCALES.get(scales))
    expected = gguf_py(raw, kind)
    codes, scale, bias = blocks.affine(raw, kind)
    assert codes.dtype == np.uint32
    assert codes.shape == (24, expected.shape[1] * kind.packing.bits // 32)
    assert scale.shape == bias.shape == (24, expected.shape[1] // 32)
    # float16 wherever the format allows it and no bias overflows, which -8d, -16d and -128d of large d do
    fits = kind.scale_dtype == "float16" and (scales not in ("random", "largest") or kind.name in ("Q4_1", "Q5_1"))
    assert scale.dtype == bias.dtype == (np.float16 if fits else np.float32)
    assert_same_numbers(in_mlx(codes, scale, bias, kind), expected)


@each("kind", AFFINE, ids=ids(AFFINE))
def test_quantized_matmul_is_x_times_w_transposed(kind: BlockType):
    """A square matrix, so that only values can tell W from its transpose."""
    raw = random_rows(kind, 256, 256 // kind.block_size, [0x1C00, 0x2000, 0x9D55])
    x = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
    weights = blocks.dequantize(raw, kind)
    codes, scales, biases = blocks.affine(raw, kind)
    wide = [mx.array(array).astype(mx.float32) for array in (scales, biases)]
    with mx.stream(mx.cpu):
        found = mx.quantized_matmul(
            mx.array(x), mx.array(codes), *wide, transpose=True, group_size=32, bits=kind.packing.bits
        )
        found = np.array(found)
    expected = x.astype(np.float64) @ weights.T.astype(np.float64)
    # MLX may sum x * scale * code and x * bias apart: the error is relative to those terms, not to their difference.
    terms = np.abs(x) @ (2 * np.abs(np.repeat(biases, 32, 1).astype(np.float64)) + np.abs(weights)).T
    assert (np.abs(found - expected) < 1e-6 * terms).all()
    transposed = x.astype(np.float64) @ weights.astype(np.float64)
    assert (np.abs(found - transposed) > 1e-5 * terms).mean() > 0.9


def test_mxfp4_is_exact():
    kind = BY_NAME["MXFP4"]
    raw = random_rows(kind, 255, 4)
    raw.reshape(255, 4, 17)[:, :, 0] = np.arange(255)[:, None]
    codes, scales = blocks.mxfp4(raw)
    with mx.stream(mx.cpu):
        found = np.array(mx.dequantize(mx.array(codes), mx.array(scales), mode="mxfp4", dtype=mx.float32))
    assert_same_numbers(found, gguf_py(raw, kind))
    raw.reshape(255, 4, 17)[7, 2, 0] = 255
    with pytest.raises(GGUFError, match=r"MXFP4: a scale is NaN \(exponent 255\)"):
        blocks.mxfp4(raw)


def test_float16_scales_up_to_the_largest():
    kind = BY_NAME["Q8_0"]
    for scale, dtype in ((511.75, np.float16), (512, np.float32)):  # the bias is -128 times that: 65504 and 65536
        raw = random_rows(kind, 2, 2, np.array([scale], np.float16).view(np.uint16))
        codes, scales, biases = blocks.affine(raw, kind)
        assert scales.dtype == biases.dtype == dtype
        assert_same_numbers(in_mlx(codes, scales, biases, kind), gguf_py(raw, kind))


def test_asked_for_scale_dtypes():
    kind = BY_NAME["Q4_K"]
    raw = random_rows(kind, 8, 1, [0x1C00, 0x2000])
    exact = blocks.affine(raw, kind, np.float32)
    rounded = blocks.affine(raw, kind, np.float16)
    assert rounded[1].dtype == rounded[2].dtype == np.float16
    np.testing.assert_array_equal(rounded[0], exact[0])
    for narrow, wide in zip(rounded[1:], exact[1:]):
        np.testing.assert_array_equal(narrow, wide.astype(np.float16))
    assert (
        blocks.affine(random_rows(BY_NAME["Q4_0"], 8, 1, [0x1C00]), BY_NAME["Q4_0"], np.float32)[1].dtype == np.float32
    )


@each("scales", ["infinite", "nan"])
@each("kind", AFFINE, ids=ids(AFFINE))
def test_affine_refuses_scales_that_are_not_numbers(kind: BlockType, scales: str):
    raw = random_rows(kind, 3, 2)
    raw[1, HALVES[kind.name][-1] :][:2] = np.array(SCALES[scales][:1], np.uint16).view(np.uint8)
    with pytest.raises(GGUFError, match=rf"{kind.name}: a scale is inf or NaN"):
        blocks.affine(raw, kind)


def test_bad_input():
    q4_0 = BY_NAME["Q4_0"]
    raw = random_rows(q4_0, 2, 2)
    for bad in (raw[:, :-1], raw.view(np.int8), raw[0]):
        with pytest.raises(GGUFError, match=r"Q4_0: the bytes are .*expected uint8 rows of n \* 18 bytes"):
            blocks.dequantize(bad, q4_0)
    for out in (np.empty((2, 65), np.float32), np.empty((2, 64)), np.empty((2, 128), np.float32)[:, ::2]):
        with pytest.raises(GGUFError, match=r"expected contiguous writable float32 \(2, 64\)"):
            blocks.dequantize(raw, q4_0, out=out)
    for name in ("Q6_K", "F16", "MXFP4"):
        with pytest.raises(GGUFError, match=f"{name} has no exact affine form in MLX"):
            blocks.affine(random_rows(BY_NAME[name], 1, 1), BY_NAME[name])
    with pytest.raises(GGUFError, match=r"scale_dtype is <class 'numpy.float64'>, expected np.float16"):
        blocks.affine(raw, q4_0, np.float64)
    with pytest.raises(GGUFError, match=r"too large for float16; use float32 scales"):
        blocks.affine(random_rows(q4_0, 2, 2, SCALES["largest"]), q4_0, np.float16)


def test_markdown_table():
    lines = blocks.markdown_table().splitlines()
    assert len(lines) == 2 + len(KINDS)
    assert {line.count("|") for line in lines} == {9}
    assert "| Q5_0 | 6 | 32 / 22 | 5.5 | d(q - 16); d fp16 | affine, 5 bits, groups of 32 | float16 | yes |" in lines
    assert any(line.startswith("| Q6_K |") and "| dense |" in line for line in lines)


def test_exact_says_what_float32_holds():
    for name, dtype in ROUNDED_DATA.items():
        raw = np.random.default_rng(2).integers(0, 256, (4, 64), np.uint8)
        values = raw.view(dtype).astype(np.float64)
        with np.errstate(all="ignore"):
            held = np.array_equal(blocks.dequantize(raw, BY_NAME[name]).astype(np.float64), values)
        assert held == BY_NAME[name].exact, name


def test_neither_mlx_nor_gguf_py_is_imported():
    """Opening a file must stay fast."""
    code = (
        "import sys, numpy as np; from qwen_mlx.gguf import blocks; k = blocks.BLOCK_TYPES[12];"
        "raw = np.zeros((1, 144), np.uint8); blocks.dequantize(raw, k); blocks.affine(raw, k);"
        "sys.exit('mlx' in sys.modules or 'gguf' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
