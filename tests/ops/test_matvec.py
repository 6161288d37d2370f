"""Matrix-vector products on every format, against float64 on gguf-py's own values."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from qwen_mlx import ops
from qwen_mlx.ops import Matrix, Packing
from tests.helpers.cases import each
from tests.helpers.packed import raw_blocks

FORMATS = ["dense", *(f"affine{bits}" for bits in (2, 3, 4, 5, 6, 8)), "q4_k", "q6_k"]
ULP = {mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7}


def matrix_of(form: str, rows: int, columns: int, dtype: mx.Dtype, seed: int = 0) -> tuple[Matrix, np.ndarray]:
    """A matrix in the format and its values in float64."""
    if form in ("q4_k", "q6_k"):
        raw, values = raw_blocks(rows, columns, form, seed)
        return ops.raw_matrix(raw, form), values.astype(np.float64)
    w = mx.random.normal((rows, columns), key=mx.random.key(seed)) * 0.05
    if form == "dense":
        w = w.astype(dtype)
        return Matrix(Packing("dense"), rows, columns, (w,)), np.array(w.astype(mx.float32), np.float64)
    bits = int(form[-1])
    arrays = mx.quantize(w.astype(dtype), group_size=32, bits=bits)
    values = mx.dequantize(arrays[0], *(a.astype(mx.float32) for a in arrays[1:]), group_size=32, bits=bits)
    return Matrix(Packing("affine", bits, 32), rows, columns, arrays), np.array(values, np.float64)


def vector(columns: int, dtype: mx.Dtype, seed: int = 1) -> mx.array:
    return mx.random.normal((1, 1, columns), key=mx.random.key(seed)).astype(dtype)


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64).reshape(-1)


def limit(values: np.ndarray, x: np.ndarray, y: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Half an ulp for the last rounding, and float32's error of the sum (Higham 2002, section 3.1, with 64 terms)."""
    return np.abs(y) * ULP[dtype] + 64 * 2**-24 * (np.abs(values) @ np.abs(x))


# Each is a kernel of its own: every pair of a format, a dtype and a number of rows, not every three of them.
@each(
    ("form", "dtype", "rows"),
    [(form, dtype, (1, 37)[(i + j) % 2]) for i, form in enumerate(FORMATS) for j, dtype in enumerate(ULP)],
)
def test_matvec(executor: str, form: str, dtype: mx.Dtype, rows: int):
    matrix, values = matrix_of(form, rows, 768, dtype)
    x = vector(768, dtype)
    with ops.no_grad():
        y = ops.matvec(x, matrix)
    assert y.shape == (1, 1, rows)
    assert y.dtype == dtype
    exact = values @ wide(x)
    assert (np.abs(wide(y) - exact) <= limit(values, wide(x), exact, dtype)).all()


@each(("form", "dtype"), list(zip(FORMATS, 3 * list(ULP))))
def test_norm_before_and_residual_after(executor: str, form: str, dtype: mx.Dtype):
    is_normed_product(form, dtype, 512)


@each(
    ("form", "dtype", "columns"),
    [
        ("dense", mx.bfloat16, 8192),
        ("affine4", mx.float16, 5120),
        ("q6_k", mx.float32, 2048),
    ],
    ids=str,
)
def test_norm_of_rows_that_a_threadgroup_loads_in_several_goes(executor: str, form: str, dtype, columns: int):
    is_normed_product(form, dtype, columns)


def is_normed_product(form: str, dtype: mx.Dtype, columns: int) -> None:
    """Asserts that matvec norms its vector and adds its residual as the separate operations do."""
    matrix, values = matrix_of(form, 40, columns, dtype)
    x, weight, residual = vector(columns, dtype), vector(columns, dtype, 2).reshape(-1), vector(40, dtype, 3)
    with ops.no_grad():
        y = ops.matvec(x, matrix, (weight, 1e-6), residual)
    normed = ops.rms_norm(x, weight, 1e-6)
    product = mx.array(values @ wide(normed)).astype(dtype)
    expected = wide(product + residual.reshape(-1))
    # The norm may differ by an ulp where its sum is formed in another order.
    slack = np.abs(values) @ np.abs(wide(normed)) * ULP[dtype] / 8 + limit(values, wide(normed), wide(product), dtype)
    assert (np.abs(wide(y) - expected) <= slack + np.abs(expected) * ULP[dtype]).all()


@each("form", FORMATS)
def test_swiglu_is_what_the_separate_operations_give(executor: str, form: str):
    matrix, _ = matrix_of(form, 2 * 19, 512, mx.float32)
    x, weight = vector(512, mx.float32), vector(512, mx.float32, 2).reshape(-1)
    with ops.no_grad():
        y = ops.matvec_swiglu(x, matrix, (weight, 1e-6))
        expected = ops.swiglu_joined(ops.matvec(x, matrix, (weight, 1e-6)))
    assert y.shape == (1, 1, 19)
    np.testing.assert_allclose(wide(y), wide(expected), rtol=1e-5, atol=1e-6)


@each("forms", [*FORMATS, "affine5 affine8", "q4_k q6_k", "dense q4_k", "q6_k affine6"])
@each("factor", [1.0, 1.1386])
def test_qkv_is_what_the_separate_operations_give(executor: str, forms: str, factor: float):
    heads, kv_heads, head_dim = 3, 1, 16
    rows = (heads + 2 * kv_heads) * head_dim
    first, *second = forms.split()
    cut = rows - kv_heads * head_dim if second else rows  # v is stored differently, as in most files of mixed types
    parts = [matrix_of(first, cut, 256, mx.float32)[0]]
    parts += [matrix_of(form, rows - cut, 256, mx.float32, 5)[0] for form in second]
    x, weight, bias = vector(256, mx.float32), vector(256, mx.float32, 2).reshape(-1), vector(rows, mx.float32, 3)
    plain = ops.Rotary.plain(head_dim, 1e6)
    rotary = ops.Rotary(plain.inv_freq, factor)
    recent = vector(2 * kv_heads * 4 * head_dim, mx.float32, 4).reshape(1, 2 * kv_heads, 4, head_dim)
    position = mx.array([100_000, 99_998], mx.int32)
    with ops.no_grad():
        table = rotary.table(100_000, 1)
        q, new_recent = ops.matvec_qkv(x, parts, bias.reshape(-1), (weight, 1e-6), table[0, 0], recent, position, heads)
    with ops.forced("reference"):
        joined = mx.concatenate([ops.matvec(x, part, (weight, 1e-6)) for part in parts], axis=-1)
        q2, kv2 = ops.qkv_rope(joined, bias.reshape(-1), table, heads, kv_heads)
    assert q.shape == (1, heads, 1, head_dim)
    assert new_recent.shape == recent.shape
    np.testing.assert_allclose(wide(q), wide(q2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(wide(new_recent[:, :, 2]), wide(kv2), rtol=1e-5, atol=1e-5)
    for slot in (0, 1, 3):
        assert mx.array_equal(new_recent[:, :, slot], recent[:, :, slot])


@each("kind", ["q4_k", "q6_k"])
def test_unpack_equals_gguf_py_bit_for_bit(executor: str, kind: str):
    raw, values = raw_blocks(7, 768, kind, 5)
    matrix = ops.raw_matrix(raw, kind)
    np.testing.assert_array_equal(np.array(ops.unpack(matrix, mx.float32)), values)
    ids = mx.array([[6, 0], [3, 3]])
    np.testing.assert_array_equal(np.array(ops.unpack(matrix, mx.float32, ids)), values[np.array(ids)])
