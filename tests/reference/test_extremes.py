"""Extreme values: what torch defines is what we do; the rest is defined, and a NaN in the logits is an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwen_mlx import ops
from qwen_mlx.backend import mx
from tests.helpers.cases import each

ATTENTION = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def on_cpu():
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def both(values) -> tuple[mx.array, torch.Tensor]:
    array = np.array(values, np.float32)
    return mx.array(array), torch.tensor(array)


@each("gate", [1e4, -1e4, 80.0, -80.0, 100.0, -100.0, 0.0, np.inf, 3e38, -3e38])
def test_silu(gate: float):
    mine, theirs = both([gate, 1.0])
    out = np.array(ops.swiglu(mine, mx.ones_like(mine)))
    assert out == pytest.approx(torch.nn.functional.silu(theirs).numpy(), rel=1e-6)
    joined = np.array(ops.swiglu_joined(mx.concatenate([mine, mx.ones_like(mine)])))
    assert np.array_equal(out, joined)


def test_silu_of_nan_is_nan():
    assert np.isnan(np.array(ops.swiglu(mx.array([float("nan")]), mx.array([1.0])))).all()


@each("value", [0.0, 1e-30, 1e-3, 1e18, 1e38, np.nan])
def test_rms_norm(value: float):
    """Zeros give zero; the square of 1e38 overflows and both give zero; a NaN stays one."""
    mine, theirs = both([[value] * 64])
    weight = np.linspace(0.5, 1.5, 64, dtype=np.float32)
    out = np.array(ops.rms_norm(mine, mx.array(weight), 1e-6))
    expected = torch.nn.functional.rms_norm(theirs, (64,), torch.tensor(weight), 1e-6).numpy()
    assert np.allclose(out, expected, rtol=1e-5, atol=0, equal_nan=True)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask) -> tuple[np.ndarray, np.ndarray]:
    """Ours and torch's, (B, L, H, D)."""
    mine = ops.attention(mx.array(q), mx.array(k), mx.array(v), 0.25, None if mask is None else mx.array(mask))
    theirs = ATTENTION(
        torch.tensor(q).transpose(1, 2),
        *(torch.tensor(x).repeat_interleave(q.shape[2] // k.shape[1], 1) for x in (k, v)),
        attn_mask=None if mask is None else torch.tensor(mask),
        scale=0.25,
    ).transpose(1, 2)
    return np.array(mine), theirs.numpy()


@pytest.mark.parametrize("size", [1.0, 1e4, 1e15])
def test_attention_of_large_scores(size: float):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((1, 5, 4, 16), (1, 2, 5, 16), (1, 2, 5, 16)))
    mine, theirs = attention(q * np.float32(size), k, v, np.tril(np.ones((5, 5), bool)))
    assert np.isfinite(mine).all()
    assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_attention_of_infinite_and_nan_scores_is_nan_there_only():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((1, 5, 2, 16), (1, 2, 5, 16), (1, 2, 5, 16)))
    for bad in (np.inf, np.nan):
        broken = q.copy()
        broken[0, 2, 1, 3] = bad
        mine, theirs = attention(broken, k, v, np.tril(np.ones((5, 5), bool)))
        assert np.array_equal(np.isnan(mine), np.isnan(theirs))
        assert np.isnan(mine[0, 2, 1]).all()
        assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=["float32", "bfloat16", "float16"])
def test_a_fully_masked_row_is_nan(dtype: mx.Dtype, on_cpu: None):
    """Never met by the model, whose every query sees itself, padding included. On a CPU it is NaN as torch.softmax's,
    so that it would be seen; transformers' eager attention gives the mean of the values.
    """
    q = mx.ones((1, 2, 2, 16), dtype)
    k = v = mx.ones((1, 1, 2, 16), dtype)
    mine = np.array(ops.attention(q, k, v, 0.25, mx.array([[True, False], [False, False]])).astype(mx.float32))
    assert np.array_equal(mine[:, 0], np.ones((1, 2, 16)))
    assert np.isnan(mine[:, 1]).all()
    assert torch.softmax(torch.full((2,), -np.inf), 0).isnan().all()


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_attention_rounds_its_result_only(dtype: torch.dtype, length: int, on_cpu: None):
    """Scores around 1,200, as in Qwen2.5's first layer: bfloat16 would round them by up to 4."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((1, length, 4, 64), (1, 2, 5, 64), (1, 2, 5, 64)))
    q, k = q + 9, k + 17
    q, k, v = (x.to(dtype) for x in (q, k, v))
    seen = torch.arange(5) <= torch.arange(5 - length, 5)[:, None]
    exact = ATTENTION(
        q.double().transpose(1, 2), *(x.double().repeat_interleave(2, 1) for x in (k, v)), attn_mask=seen
    ).transpose(1, 2)
    as_mx = {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}[dtype]
    arrays = (mx.array(x.float().numpy()).astype(as_mx) for x in (q, k, v))
    mine = ops.attention(*arrays, 0.125, "causal" if length > 1 else None)
    assert mine.dtype == as_mx
    error = np.linalg.norm(np.array(mine.astype(mx.float32)) - exact.numpy())
    assert error <= 1.2 * (exact.to(dtype).double() - exact).norm()  # what rounding the exact result costs
