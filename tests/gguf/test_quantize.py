"""Values to GGUF blocks: layouts against the reader's, and errors against bounds and against llama.cpp's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx.gguf.blocks import BLOCK_TYPES, dequantize
from qwen_mlx.gguf.pack import affine_k_blocks, legacy_blocks, mxfp4_blocks, q6_k_blocks, q8_0_blocks
from qwen_mlx.gguf.quantize import quantize
from qwen_mlx.gguf.unpack import FORMATS, mxfp4_codes

TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}
N = 5


@pytest.mark.parametrize("seed", range(3))
def test_what_is_packed_is_unpacked(seed: int):
    """Codes, scales and minima come back from the reader's own unpacking."""
    rng = np.random.default_rng(seed)
    d, m = rng.standard_normal((2, N)).astype(np.float16)

    def check(name: str, blocks: np.ndarray, codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None) -> None:
        assert blocks.dtype == np.uint8
        assert blocks.shape == (N, TYPES[name].type_size)
        out = np.empty(codes.shape, np.uint8)
        own_scale, own_minimum = FORMATS[name].decode(np.ascontiguousarray(blocks), out)
        np.testing.assert_array_equal(out, codes)
        np.testing.assert_array_equal(own_scale, scale.astype(np.float32).reshape(N, -1))
        if minimum is not None:
            np.testing.assert_array_equal(own_minimum, minimum.astype(np.float32).reshape(N, -1))

    for bits in (4, 5):
        codes = rng.integers(0, 2**bits, (N, 32), np.uint8)
        check(f"Q{bits}_0", legacy_blocks(bits, codes, d), codes, d, None)
        check(f"Q{bits}_1", legacy_blocks(bits, codes, d, m), codes, d, m)
        codes = rng.integers(0, 2**bits, (N, 256), np.uint8)
        scales, minima = rng.integers(0, 64, (2, N, 8), np.uint8)
        blocks = affine_k_blocks(bits, codes, d, m, scales, minima)
        products = d[:, None].astype(np.float32) * scales, -m[:, None].astype(np.float32) * minima
        check(f"Q{bits}_K", blocks, codes, *products)
    codes = rng.integers(0, 256, (N, 32), np.uint8)
    check("Q8_0", q8_0_blocks(codes, d), codes, d, None)
    codes, scales = rng.integers(0, 64, (N, 256), np.uint8), rng.integers(-128, 128, (N, 16), np.int8)
    check("Q6_K", q6_k_blocks(codes, d, scales), codes, d[:, None].astype(np.float32) * scales, None)
    codes, exponents = rng.integers(0, 16, (N, 32), np.uint8), rng.integers(0, 255, N, np.uint8)
    own_codes, own_exponents = mxfp4_codes(mxfp4_blocks(codes, exponents))
    np.testing.assert_array_equal(own_codes, codes)
    np.testing.assert_array_equal(own_exponents[:, 0], exponents)


@given(
    st.sampled_from(["Q4_K", "Q5_K", "Q6_K"]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "heavy", "positive", "constant", "zero", "sparse", "one outlier"]),
    st.floats(-1, 2),
)
@settings(max_examples=30, deadline=None)
def test_no_weight_is_far_from_its_value(name: str, seed: int, spread: str, exponent: float):
    """A group's step, and that of the block's scales, bound a weight's error whatever the values are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 512))
    if spread == "heavy":
        x = x**5
    elif spread == "positive":
        x = np.abs(x) + 1
    elif spread == "constant":
        x = np.full_like(x, rng.standard_normal())
    elif spread == "zero":
        x = np.zeros_like(x)
    elif spread == "sparse":
        x *= rng.random(x.shape) < 0.05
    elif spread == "one outlier":
        x[0, 77] = 1000
    x = (x * 10**exponent).astype(np.float32)
    raw = quantize(x, TYPES[name])
    assert raw.shape == (2, 2 * TYPES[name].type_size)
    error = np.abs(dequantize(raw, TYPES[name]) - x).reshape(4, 256)
    blocks = x.reshape(4, 256)
    size = 16 if name == "Q6_K" else 32
    groups = blocks.reshape(4, -1, size)
    levels = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 31}[name]
    span = np.abs(groups).max(-1) if name == "Q6_K" else groups.max(-1) - np.minimum(groups.min(-1), 0)
    largest = np.abs(blocks).max(-1)[:, None]
    bound = 1.6 * span / levels + largest / (100 if name == "Q6_K" else 50)
    assert (error.reshape(groups.shape).max(-1) <= bound + 1e-6).all()


# Root mean square errors of llama.cpp's quantizers (ggml_quantize_chunk of llama-cpp-python 0.3.36) on rows_of(spread).
LLAMA_CPP = {
    "normal": {"Q4_K": 1.416613e-03, "Q5_K": 7.193388e-04, "Q6_K": 3.536943e-04, "Q4_0": 1.711920e-03},
    "heavy": {"Q4_K": 5.418429e-03, "Q5_K": 2.811570e-03, "Q6_K": 1.558719e-03, "Q4_0": 7.138199e-03},
    "shifted": {"Q4_K": 1.605936e-03, "Q5_K": 7.973397e-04, "Q6_K": 6.869558e-04, "Q4_0": 3.276193e-03},
}


def rows_of(spread: str) -> np.ndarray:
    """Seeded rows (64, 1024)."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((64, 1024)) * 0.02
    if spread == "heavy":
        x *= np.exp(rng.standard_normal(x.shape))
    elif spread == "shifted":
        x += 0.05
    return x.astype(np.float32)


@pytest.mark.parametrize("numba", [True, False], ids=["as installed", "NumPy"])
@pytest.mark.parametrize("spread", LLAMA_CPP)
def test_the_error_is_llama_cpps(spread: str, numba: bool, monkeypatch: pytest.MonkeyPatch):
    """At most 1.02 times as large, by the compiled steps and by NumPy's."""
    if not numba:
        monkeypatch.setattr("qwen_mlx.gguf.quantize._numbas", lambda: None)
    x = rows_of(spread)
    for name, theirs in LLAMA_CPP[spread].items():
        error = dequantize(quantize(x, TYPES[name]), TYPES[name]) - x
        assert np.sqrt(np.mean(np.square(error, dtype=np.float64))) <= 1.02 * theirs, name
