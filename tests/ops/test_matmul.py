"""Products of few rows with a dense matrix, against float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx import ops
from qwen_mlx.cli.selftest_decoding import matrix
from qwen_mlx.ops.unpack import unpack_fallback
from tests.helpers.cases import each
from tests.helpers.decoding_calls import tiles

MODULE = sys.modules["qwen_mlx.ops.matmul"]
ULP = {mx.float16: 2**-10, mx.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def on_every_executor() -> Iterator[None]:
    with tiles():
        yield


def random(*shape: int, dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def wide(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


def assert_right(x: mx.array, w: mx.array, y: mx.array) -> None:
    """Half an ulp for the rounding, and float32's error of the sum (Higham 2002, section 3.1, with 64 terms)."""
    exact, size = wide(x) @ wide(w).T, np.abs(wide(x)) @ np.abs(wide(w)).T
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    assert (np.abs(wide(y) - exact) <= np.abs(exact) * ULP[x.dtype] / 2 * 1.001 + 64 * 2**-24 * size).all()


@each("dtype", ULP, ids=str)
@each(("shape", "outputs"), [((2, 1, 896), 40), ((9, 64), 16), ((4, 8, 160), 37), ((33, 96), 1), ((64, 1, 512), 24)])
def test_products(executor: str, shape: tuple[int, ...], outputs: int, dtype: mx.Dtype):
    x, w = random(*shape, dtype=dtype, seed=1), random(outputs, shape[-1], dtype=dtype, seed=2)
    assert (executor == "emulated") == MODULE.supports(x, w)
    with ops.no_grad():
        assert_right(x, w, ops.matmul(x, w))


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 64), outputs=st.integers(1, 50), steps=st.integers(1, 9), cut=st.booleans())
def test_products_of_any_size(rows: int, outputs: int, steps: int, cut: bool):
    from reference.emulator import emulate

    x = random(rows, 32 * steps, dtype=mx.bfloat16, seed=rows)
    w = random(outputs + cut, 32 * steps, dtype=mx.bfloat16, seed=outputs)[int(cut) :]  # a slice of an array
    with emulate(), ops.no_grad():
        assert MODULE.supports(x, w)
        assert_right(x, w, ops.matmul(x, w))


@pytest.mark.emulator
@each(
    ("count", "outputs", "blocks", "groups", "kind", "dtype"),
    [
        (2, 37, 9, 3, "q4_k", mx.float16),
        (17, 21, 3, 3, "q6_k", mx.bfloat16),
        (9, 133, 3, 1, "q4_k", mx.bfloat16),
        (11, 70, 5, 1, "q6_k", mx.float16),
        (32, 40, 2, 3, "q4_k", mx.bfloat16),
    ],
)
def test_packed_products(
    count: int, outputs: int, blocks: int, groups: int, kind: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
):
    """The float32 error is that of sums with 128, or 160 at most, added to each code."""
    from reference.emulator import emulate

    monkeypatch.setattr(MODULE, "GROUPS", groups)  # of one matrix, or each of a part of it
    packed = matrix(kind, outputs, 256 * blocks, dtype)
    x = random(count, 1, 256 * blocks, dtype=dtype, seed=count)
    w = wide(unpack_fallback(packed, mx.float32))
    with emulate(), ops.no_grad():
        assert MODULE.reads_packed(packed, count, dtype)
        y = ops.multiply(x, packed)
    exact, size = wide(x) @ w.T, np.abs(wide(x)) @ np.broadcast_to(16 * np.abs(w).max(axis=-1), w.T.shape)
    assert y.shape == exact.shape
    assert (np.abs(wide(y) - exact) <= np.abs(exact) * ULP[dtype] / 2 * 1.001 + 8 * 2**-24 * size).all()


@pytest.mark.emulator
@each("kind", ["q4_k", "q6_k"])
def test_few_vectors_read_the_blocks_where_there_are_no_tiles(kind: str, monkeypatch: pytest.MonkeyPatch):
    """As on Apple's GPUs: one by one, and with a gradient."""
    from reference.emulator import emulate

    monkeypatch.setattr(MODULE, "ON", ())
    packed, x = matrix(kind, 21, 512, mx.float32), random(1, 3, 512, dtype=mx.float32, seed=7)
    w = wide(unpack_fallback(packed, mx.float32))
    with emulate(), monkeypatch.context() as patch:
        assert not ops.unpacks(packed, 3, mx.float32)
        assert ops.unpacks(packed, 6, mx.float32)
        gradient = mx.grad(lambda x: ops.multiply(x, packed).sum())(x)
        patch.setattr(sys.modules["qwen_mlx.ops.multiply"], "unpack", None)
        y = ops.multiply(x, packed)
    np.testing.assert_allclose(wide(y), wide(x) @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(wide(gradient)[0], np.tile(w.sum(axis=0), (3, 1)), rtol=1e-4, atol=1e-5)


def test_a_row_that_is_not_finite_stays_alone(executor: str):
    x = random(3, 64, dtype=mx.bfloat16, seed=3)
    x[1, 5] = float("inf")
    w = mx.abs(random(20, 64, dtype=mx.bfloat16, seed=4)) + 1
    y = ops.matmul(x, w)
    assert mx.isfinite(y[0::2]).all()
    assert mx.isposinf(y[1]).all()


def test_gradients(executor: str):
    x, w = random(3, 64, dtype=mx.float16, seed=5), random(7, 64, dtype=mx.float16, seed=6)
    got = mx.grad(lambda x, w: (ops.matmul(x, w) ** 2).sum(), argnums=(0, 1))(x, w)
    want = mx.grad(lambda x, w: ((x @ w.T) ** 2).sum(), argnums=(0, 1))(x, w)
    for a, b in zip(got, want):
        assert np.abs(wide(a) - wide(b)).max() <= 4 * ULP[mx.float16] * np.abs(wide(b)).max()


@each(
    ("x", "w"),
    [
        (mx.zeros((1, 64), mx.bfloat16), mx.zeros((8, 64), mx.bfloat16)),  # one row is matvec's
        (mx.zeros((65, 64), mx.bfloat16), mx.zeros((8, 64), mx.bfloat16)),
        (mx.zeros((2, 48), mx.bfloat16), mx.zeros((8, 48), mx.bfloat16)),
        (mx.zeros((2, 64)), mx.zeros((8, 64))),
        (mx.zeros((2, 8192), mx.bfloat16), mx.zeros((4097, 8192), mx.bfloat16)),  # 64 MiB and a row
        (mx.zeros((2, 0), mx.bfloat16), mx.zeros((8, 0), mx.bfloat16)),
        (mx.zeros((2, 64), mx.bfloat16), mx.zeros((0, 64), mx.bfloat16)),
        (mx.zeros((0, 64), mx.bfloat16), mx.zeros((8, 64), mx.bfloat16)),
    ],
)
def test_what_the_kernel_does_not_support_is_mlx_own_product(x: mx.array, w: mx.array):
    with ops.forced("cuda"):  # there is none here: a launch would raise
        assert ops.matmul(x, w).tolist() == (x @ w.T).tolist()


@each(
    ("x", "w"),
    [
        (mx.zeros((2, 64)), mx.zeros((8, 32))),
        (mx.zeros((2, 64)), mx.zeros((8, 64), mx.float16)),
        (mx.zeros((2, 64)), mx.zeros((64,))),
        (mx.array(1.0), mx.zeros((8, 64))),
        (mx.zeros((2, 64)), None),
        (mx.zeros((2, 64), mx.int32), mx.zeros((8, 64), mx.int32)),
    ],
)
def test_wrong_arguments_are_refused(x: mx.array, w: mx.array):
    with pytest.raises(ValueError, match=r"^x has shape .*expected"):
        ops.matmul(x, w)
