"""Kernels that mlx-lm publishes, unmodified and launched by its own code: no false alarms, and its own numbers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from reference.emulator import DataRace, emulate
from tests.helpers.mlx_lm_kernels import module


def random(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape).astype(dtype) * 0.3


@pytest.mark.parametrize("order", ["forward", "random"])
def test_rwkv7(order):
    mx.random.seed(0)
    r, w, k, v, a, b = (random(2, 3, 2, 64) for _ in range(6))
    state = random(2, 2, 64, 64)
    with emulate(order=order):
        rwkv7 = module("rwkv7")
        y, after = rwkv7.wkv7_kernel(r, w, k, v, a, b, state)
    steps = []
    for t in range(3):
        step, state = rwkv7._wkv7_step_ops(*(x[:, t] for x in (r, w, k, v, a, b)), state)
        steps.append(step.reshape(2, 2, 64))
    np.testing.assert_allclose(np.array(y), np.array(mx.stack(steps, axis=1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(after), np.array(state), rtol=1e-4, atol=1e-5)


def test_ssm():
    mx.random.seed(1)
    x, a_log, b, c, d = random(2, 1, 4, 16), random(4), random(2, 1, 2, 64), random(2, 1, 2, 64), random(4)
    dt, bias, state = random(2, 1, 4), random(4), random(2, 4, 16, 64)
    with emulate():
        ssm = module("ssm")
        y, after = ssm.ssm_update_kernel(x, a_log, b, c, d, dt, bias, state, (0.001, 100.0))
    want, want_state = ssm.ssm_attn(x, a_log, b, c, d, dt, bias, state)
    np.testing.assert_allclose(np.array(y), np.array(want), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.array(after), np.array(want_state), rtol=1e-4, atol=1e-5)


def gated_delta_inputs() -> list[mx.array]:
    mx.random.seed(2)
    q, k, v = random(1, 3, 1, 128), random(1, 3, 1, 128), random(1, 3, 2, 16)
    return [q, k, v, mx.sigmoid(random(1, 3, 2)), mx.sigmoid(random(1, 3, 2)), random(1, 2, 16, 128), mx.array(3)]


def launch_gated_delta(kernel, inputs: list, rows: int, threadgroup: tuple[int, int, int]) -> list[mx.array]:
    template = [("InT", mx.float32), ("StT", mx.float32), ("Dk", 128), ("Dv", 16), ("Hk", 1), ("Hv", 2)]
    outputs = {"output_shapes": [(1, 3, 2, 16), (1, 2, 16, 128)], "output_dtypes": [mx.float32] * 2}
    return kernel(inputs=inputs, template=template, grid=(32, rows, 2), threadgroup=threadgroup, **outputs)


def test_gated_delta_s_three_kernels_agree_bit_for_bit_as_mlx_lm_says():
    """simd_sum, five shuffles, and two shuffles with the rest of the tree in one lane."""
    with emulate():
        gated_delta = module("gated_delta")
        inputs = gated_delta_inputs()
        plain = launch_gated_delta(gated_delta._gated_delta_kernel, inputs, 16, (32, 4, 1))
        tree = launch_gated_delta(gated_delta._gated_delta_kernel_xtree, inputs, 16, (32, 4, 1))
        packed = launch_gated_delta(gated_delta._gated_delta_kernel_packed, inputs, 2, (32, 1, 1))
    want, _ = gated_delta.gated_delta_ops(*inputs[:6])
    for y, other, third in zip(plain, tree, packed):
        assert mx.array_equal(y, other)
        assert mx.array_equal(y, third)
    np.testing.assert_allclose(np.array(plain[0]), np.array(want), rtol=1e-4, atol=1e-5)


def test_a_race_in_a_published_kernel_is_told():
    """All 32 lanes store the same zero where a mask hides a token: harmless on today's GPUs, and a race."""
    mask = mx.array([[True, False, True]])
    with emulate():
        kernel = module("gated_delta")._gated_delta_kernel_masked
        with pytest.raises(DataRace, match=r"`y\[dv_idx\] = static_cast<InT>\(0\);`"):
            launch_gated_delta(kernel, [*gated_delta_inputs(), mask], 16, (32, 4, 1))


def test_bitlinear():
    mx.random.seed(3)
    ternary = np.random.default_rng(0).integers(-1, 2, (8, 256))
    packed = sum((ternary[2 * i : 2 * i + 2] + 1) << (2 * i) for i in range(4)).astype(np.uint8)
    x = random(3, 256)
    with emulate():
        layer = module("bitlinear_layers").BitLinear(256, 8, bias=False)
        layer.weight_scale = mx.array([0.5])
        y = layer.execute_matmul_kernel(x, mx.array(packed))
    np.testing.assert_allclose(np.array(y), np.array(x) @ ternary.T * 0.5, rtol=1e-4, atol=1e-5)


def test_attention_residual_of_kimi():
    mx.random.seed(4)
    raw, partial, weight = random(3, 2, 96), random(2, 96), random(96)
    inv_rms = mx.rsqrt(mx.mean(raw * raw, axis=-1) + 1e-6)
    with emulate():
        kimi = module("kimi_k3")
        (y,) = kimi._attn_res_kernel(
            inputs=[raw, inv_rms, partial, weight, mx.array([1e-6]), 2],
            template=[("InT", mx.float32), ("K", 3), ("D", 96), ("THREADS", 128)],
            grid=(128, 2, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[(2, 96)],
            output_dtypes=[mx.float32],
        )
    want = kimi._attn_res_combine(raw, inv_rms, partial, weight, 1e-6)
    np.testing.assert_allclose(np.array(y), np.array(want), rtol=1e-4, atol=1e-5)


def test_sinkhorn_of_deepseek(monkeypatch):
    mx.random.seed(5)
    comb, eps = mx.exp(random(40, 4, 4)), mx.array([1e-6])
    with emulate():
        deepseek = module("deepseek_v41")
        gpu = mx.Device(mx.gpu)
        monkeypatch.setattr(mx, "default_device", lambda: gpu)
        y = deepseek._sinkhorn(comb, iters=5, eps=eps)
        monkeypatch.undo()
    np.testing.assert_allclose(np.array(y), np.array(deepseek._sinkhorn(comb, iters=5, eps=eps)), rtol=1e-5)
