"""Gradients of every operation against torch's."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest
import torch

from qwen_mlx import ops
from tests.helpers.cases import each

RNG = np.random.default_rng(0)
EPS = 1e-6
ROTARY = ops.Rotary.plain(32, 1e4)


def torch_norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def torch_rope(x, offset=7):
    angles = (offset + torch.arange(x.shape[1]))[:, None].double() * torch.tensor(ROTARY.inv_freq).double()
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def torch_qkv(qkv, bias):
    heads = (qkv + bias).unflatten(-1, (4, 32))
    turned = torch_rope(heads[:, :, :3])
    return turned[:, :, :2], torch.stack([turned[:, :, 2:], heads[:, :, 3:]], 2)


def torch_swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


OPERATIONS = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, EPS), torch_norm, [(3, 96), (96,)]),
    "add_rms_norm": (
        lambda x, y, w: ops.add_rms_norm(x, y, w, EPS),
        lambda x, y, w: (x + y, torch_norm(x + y, w)),
        [(3, 96), (3, 96), (96,)],
    ),
    "swiglu": (ops.swiglu, torch_swiglu, [(3, 40), (3, 40)]),
    "swiglu biases": (
        ops.swiglu,
        lambda g, u, gb, ub: torch_swiglu(g + gb, u + ub),
        [(3, 40), (3, 40), (40,), (40,)],
    ),
    "swiglu_joined": (ops.swiglu_joined, lambda x, b: torch_swiglu(*(x + b).chunk(2, -1)), [(3, 40), (40,)]),
    "rope": (lambda x: ops.rope(x, ROTARY.table(7, 3)), torch_rope, [(2, 3, 2, 32)]),
    "rope by sequence": (
        lambda x: ops.rope(x, ROTARY.table(np.array([7, 7]), 3)),
        torch_rope,
        [(2, 3, 2, 32)],
    ),
    "qkv_rope": (lambda x, b: ops.qkv_rope(x, b, ROTARY.table(7, 3), 2, 1), torch_qkv, [(2, 3, 128), (128,)]),
}


@each("name", OPERATIONS)
def test_gradients_are_those_of_torch(executor, name):
    ours, theirs, shapes = OPERATIONS[name]
    inputs = [RNG.standard_normal(shape).astype(np.float32) for shape in shapes]
    tensors = [torch.tensor(x).double().requires_grad_() for x in inputs]
    outputs = theirs(*tensors)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    weights = [RNG.standard_normal(y.shape).astype(np.float32) for y in outputs]
    sum((y * torch.tensor(w)).sum() for y, w in zip(outputs, weights)).backward()

    def loss(*x):
        y = ours(*x)
        y = [y] if isinstance(y, mx.array) else y
        return sum((a * mx.array(w)).sum() for a, w in zip(y, weights))

    value, gradients = mx.value_and_grad(loss, argnums=tuple(range(len(inputs))))(*map(mx.array, inputs))
    assert np.isfinite(value.item())
    gradients = [gradients] if isinstance(gradients, mx.array) else gradients
    for got, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(np.array(got), tensor.grad.numpy(), rtol=1e-4, atol=2e-5)


def test_gradients_of_large_gates_are_those_of_torch(executor):
    """1 + e^-x is at most 3.4e38, its square overflows from -44 on. atol: below the smallest normal number."""
    gates = [-103.0, -100.0, -88.5, -80.0, -60.0, -45.0, -44.0, -20.0, 0.0, 20.0, 60.0, 100.0, 3e38]
    tensor = torch.tensor(gates).requires_grad_()
    torch.nn.functional.silu(tensor).sum().backward()
    got = mx.grad(lambda gate: ops.swiglu(gate, mx.ones_like(gate)).sum())(mx.array(gates))
    np.testing.assert_allclose(np.array(got), tensor.grad.numpy(), rtol=1e-5, atol=1e-38)
    joined = mx.grad(lambda both: ops.swiglu_joined(both).sum())(mx.array(gates + [1.0] * len(gates)))
    np.testing.assert_allclose(np.array(joined)[: len(gates)], tensor.grad.numpy(), rtol=1e-5, atol=1e-38)
    if executor == "reference":  # kernels have no derivative forwards
        ones = mx.ones_like(got)
        forward = mx.jvp(lambda gate: ops.swiglu(gate, ones), [mx.array(gates)], [ones])[1][0]
        np.testing.assert_allclose(np.array(forward), tensor.grad.numpy(), rtol=1e-5, atol=1e-38)


def test_no_grad_leaves_gradients_out_in_its_thread_only():
    from reference.emulator import emulate

    calls = []
    x, weight = mx.zeros((2, 32)), mx.ones((32,))
    with emulate(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "custom_function", lambda f, real=mx.custom_function: calls.append(f) or real(f))
        with ops.no_grad():
            ops.rms_norm(x, weight, EPS)
            assert not calls
            other = threading.Thread(target=lambda: ops.rms_norm(x, weight, EPS))
            other.start()
            other.join()
            assert len(calls) == 1
        ops.rms_norm(x, weight, EPS)
        assert len(calls) == 2
