"""Derivatives of what a CPU's own functions compute, beside those of plain MLX."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest

from qwen_mlx import ops
from qwen_mlx.backend import mx
from qwen_mlx.ops import DENSE, Matrix, cpu
from tests.helpers.cases import each

pytestmark = pytest.mark.skipif(not ops.dispatch.have_numba(), reason="needs numba")

Function = Callable[..., mx.array]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def derivatives(function: Function, arrays: tuple[mx.array, ...], executor: str) -> list[mx.array]:
    """The value, gradients, gradients of their squares, and the change along the arrays themselves."""

    def loss(*arrays: mx.array) -> mx.array:
        return mx.sin(function(*arrays)).sum()

    every = tuple(range(len(arrays)))
    first = mx.grad(loss, argnums=every)
    with ops.forced(executor):
        second = mx.grad(lambda *x: sum((gradient**2).sum() for gradient in first(*x)), argnums=every)
        along = mx.jvp(lambda *x: [function(*x)], list(arrays), list(arrays))[1]
        found = [function(*arrays), *first(*arrays), *second(*arrays), *along]
        mx.eval(found)
        return found


def assert_same(found: list[mx.array], expected: list[mx.array]) -> None:
    """Equal within 2^-16 of the largest element: sums of some hundred products in float32, in another order."""
    for a, b in zip(found, expected, strict=True):
        assert float(mx.abs(a - b).max()) <= 2**-16 * float(mx.abs(b).max())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the CPU's own functions that are called from now on."""
    called: list[str] = []
    for name in ("matmul", "multiply_all", "multiply_transposed", "attention"):
        own = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *args, name=name, own=own, **kw: (called.append(name), own(*args, **kw))[1], raising=False
        )
    return called


@pytest.mark.parametrize("rows", [(3,), (2, 5)])
def test_products(rows: tuple[int, ...], calls: list[str]):
    arrays = normal(*rows, 64), normal(40, 64, seed=1)
    found = derivatives(ops.matmul, arrays, "cpu")
    assert len(calls) >= 3  # of the value and of the gradients of x, first and second
    assert_same(found, derivatives(lambda x, w: x @ w.T, arrays, "reference"))


def test_a_product_with_one_gradient_asked_for():
    x, w = normal(3, 64), normal(40, 64, seed=1)
    with ops.forced("cpu"):
        found = [mx.grad(lambda x: ops.matmul(x, w).sum())(x), mx.grad(lambda w: ops.matmul(x, w).sum())(w)]
        found += mx.jvp(lambda w: [ops.matmul(x, w)], [w], [w])[1]
    assert_same(found, [mx.broadcast_to(w.sum(0), x.shape), mx.broadcast_to(x.sum(0), w.shape), x @ w.T])


@each("kind, n_bytes", [("q5_0", 22), ("q6_k", 210)])
def test_a_packed_matrix_passes_gradients_on(kind: str, n_bytes: int, calls: list[str]):
    """Rows and columns are more than a thread takes at a time; sums as long as the rows are many."""
    rng = np.random.default_rng(0)
    n_blocks = 768 * n_bytes // (32 if kind == "q5_0" else 256)
    raw = rng.integers(0, 60, (70, n_blocks)).astype(np.uint8)
    matrix, x, cotangent = ops.raw_matrix(raw, kind), normal(2, 5, 768), normal(2, 5, 70, seed=1)
    with ops.forced("cpu"):
        found = mx.grad(lambda x: (ops.multiply(x, matrix) * cotangent).sum())(x)
        values = np.array(ops.unpack(matrix, mx.float32), np.float64)
    assert calls[-2:] == ["multiply_all", "multiply_transposed"]
    exact, sizes = (function(np.array(cotangent, np.float64)) @ function(values) for function in (np.array, np.abs))
    assert np.all(np.abs(np.array(found) - exact) <= 70 * 2.0**-24 * sizes)


def test_the_values_of_packed_matrices_are_not_kept_for_the_gradient():
    """A graph that keeps them holds the model twice. Memory is MLX's own, beside what one matrix's values take."""
    matrices = [ops.raw_matrix(np.full((512, 1088), 60, np.uint8), "q8_0") for _ in range(8)]
    one, kept = 512 * 1024 * 4, []

    def loss(x: mx.array) -> mx.array:
        for matrix in matrices:
            y = ops.multiply(x, matrix)
            x = mx.tanh(mx.concatenate([y, y], axis=-1))
            mx.eval(x)
            kept.append(mx.get_active_memory())
        return x.sum()

    with ops.forced("cpu"):
        gradient = mx.grad(loss)(normal(8, 1024))
        mx.eval(gradient)
    assert kept[-1] - kept[0] < one


def test_products_where_mlx_traces(calls: list[str]):
    x, w = normal(2, 5, 64), normal(40, 64, seed=1)
    with ops.forced("cpu"):
        found = [mx.vmap(lambda x: ops.matmul(x, w))(x), mx.compile(ops.matmul)(x, w)]
        mx.eval(found)
    assert not calls
    assert_same(found, [x @ w.T] * 2)


@pytest.mark.parametrize("mask", ["causal", None, "array"])
def test_attention(mask: str | None, calls: list[str], monkeypatch: pytest.MonkeyPatch):
    arrays = normal(2, 9, 4, 16), normal(2, 2, 9, 16, seed=1), normal(2, 2, 9, 16, seed=2)
    seen = (
        mx.array(np.random.default_rng(3).random((9, 9)) < 0.7) | mx.eye(9, dtype=mx.bool_) if mask == "array" else mask
    )

    def attend(*arrays: mx.array) -> mx.array:
        return ops.attention(*arrays, 0.25, seen)

    with monkeypatch.context() as context:
        context.setattr(sys.modules["qwen_mlx.ops.attention"], "SCORES", 8)
        found = derivatives(attend, arrays, "cpu")
    assert "attention" in calls
    assert_same(found, derivatives(attend, arrays, "reference"))


def test_a_dense_matrix_of_the_model(calls: list[str]):
    w, x = normal(8, 32), normal(1, 32, seed=1)
    with ops.forced("cpu"):
        found = mx.grad(lambda x: ops.multiply(x, Matrix(DENSE, 8, 32, (w,))).sum())(x)
    assert calls
    assert_same([found], [w.sum(0)[None]])
