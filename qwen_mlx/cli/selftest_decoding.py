"""The self-test's cases of the kernels that decoding one token launches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import ops
from ..backend import mx
from ..ops import Matrix, Packing
from ..ops.matrix import BLOCKS

FORMATS = ("dense", "affine4", "affine5", "affine8", "q4_k", "q6_k")
EPS = 1e-6
SHAPES = {False: (1024, 14, 2, 64, 4864), True: (256, 3, 1, 64, 40)}  # hidden, heads, key/value heads, head_dim, width

Call = Callable[[], list[mx.array]]


def matrix(form: str, rows: int, columns: int, dtype: mx.Dtype) -> Matrix:
    """A random matrix of one of FORMATS whose elements are about 0.05; "affine4/64" has groups of 64, not of 32."""
    rng = np.random.default_rng(rows)
    if form in ("q4_k", "q6_k"):
        size, scale_at = {"q4_k": (144, 0), "q6_k": (210, 208)}[form]
        blocks = rng.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
        blocks[..., scale_at : scale_at + 2] = np.array([1e-4], np.float16).view(np.uint8)
        if form == "q4_k":
            blocks[..., 2:4] = np.array([7e-4], np.float16).view(np.uint8)
        return ops.raw_matrix(blocks.reshape(rows, -1), form)
    w = mx.array((rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)).astype(dtype)
    if form == "dense":
        return Matrix(Packing("dense"), rows, columns, (w,))
    bits, group = int(form[6]), int(form[8:] or 32)
    return Matrix(Packing("affine", bits, group), rows, columns, mx.quantize(w, group_size=group, bits=bits))


def calls(dtype: mx.Dtype, small: bool) -> Iterator[tuple[str, Call]]:
    """(name, call): one token, of about the 0.5B model's shapes or of small ones."""
    rng = np.random.default_rng(13)

    def random(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    hidden, heads, kv_heads, head_dim, width = SHAPES[small]
    rows = (heads + 2 * kv_heads) * head_dim
    x, weight, bias, residual = random(1, 1, hidden), random(hidden), random(rows), random(1, 1, rows)
    norm, table = (weight, EPS), ops.Rotary.plain(head_dim, 1e6).table(300, 1)[0, 0]
    recent, position, scale = random(1, 2 * kv_heads, 16, head_dim), mx.array([300, 290], mx.int32), head_dim**-0.5
    q, short, long = (random(1, n, m, head_dim) for n, m in ((heads, 1), (2 * kv_heads, 512), (2 * kv_heads, 2304)))

    def products(form: str) -> Iterator[tuple[str, Call]]:
        m, joined = matrix(form, rows, hidden, dtype), matrix(form, 2 * width, hidden, dtype)
        ids = mx.array([[rows - 1, 0], [5, 5]])
        yield f"matvec {form}", lambda: [ops.matvec(x, m, None, residual)]
        yield f"matvec {form}, norm", lambda: [ops.matvec(x, m, norm)]
        yield f"matvec_swiglu {form}", lambda: [ops.matvec_swiglu(x, joined, norm)]
        yield f"matvec_qkv {form}", lambda: list(ops.matvec_qkv(x, [m], bias, norm, table, recent, position, heads))
        if form != "dense":
            yield f"unpack {form}", lambda: [ops.unpack(m, dtype)]
            yield f"unpack_rows {form}", lambda: [ops.unpack(m, dtype, ids)]

    def long_rows(form: str, columns: int, normed: bool = False) -> tuple[str, Call]:
        m, wide = matrix(form, 33, columns, dtype), random(1, 1, columns)
        wide_norm = (random(columns), EPS) if normed else None
        return f"matvec {form}{', norm' * normed}, rows of {columns}", lambda: [ops.matvec(wide, m, wide_norm)]

    def packed_rows(form: str, outputs: int, count: int) -> Iterator[tuple[str, Call]]:
        m, x = matrix(form, outputs, 768, dtype), random(count, 1, 768)
        yield f"multiply {form}, {count} rows by {outputs}", lambda: [ops.multiply(x, m)]

    for form in FORMATS:
        yield from products(form)
    for form in ("affine4", "affine4/64", "affine4/128", "q4_k", "q6_k"):
        yield long_rows(form, 4864)
    yield long_rows("affine4/64", 448)  # an odd number of groups, and a stage that ends early
    for form in ("dense", "q4_k"):  # the longest that a kernel norms: the 72B model's in 16 bits
        yield long_rows(form, 16384 // dtype.size, normed=True)
    few, many, w = random(2, 1, hidden), random(33, 1, hidden), matrix("dense", rows, hidden, dtype).arrays[0]
    if dtype != mx.float32:  # which is MLX's own product, in TF32 on NVIDIA
        yield "matmul, 2 rows", lambda: [ops.matmul(few, w)]
        yield "matmul, 33 rows", lambda: [ops.matmul(many, w)]
        for form in BLOCKS:
            for count, outputs in ((3, rows), (9, rows), (32, 20_000 if not small else rows)):
                yield from packed_rows(form, outputs, count)
    q3, short3, recent3 = (mx.concatenate([a, 0.5 * a, a[:, :, ::-1]]) for a in (q, short, recent))
    first = mx.array([0, 70, 296], mx.int32)
    attention: dict[str, tuple[Any, ...]] = {
        "": (q, short, recent, position, scale),
        ", window": (q, short, recent, position, scale, 77),
        ", rows": (q3, short3, recent3, position, scale, None, first),
        ", split": (q, long, recent, position, scale),
    }
    for name, inputs in attention.items():
        yield f"decode_attention{name}", functools.partial(lambda *inputs: [ops.decode_attention(*inputs)], *inputs)
    logits = random(3, 151_936 if not small else 300)
    yield "best_token", lambda: _as_bits(ops.best_token(logits), dtype)


def _as_bits(indices: mx.array, dtype: mx.Dtype) -> list[mx.array]:
    """Integers as their bytes, each of which every dtype holds exactly."""
    return [indices.view(mx.uint8).astype(dtype)]
