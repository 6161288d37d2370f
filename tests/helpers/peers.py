"""Logits of transformers' models and the noise that a comparison with them allows."""

from __future__ import annotations

import copy

import numpy as np

from qwen_mlx.backend import mx
from reference.lazy import torch

IDS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50]]


def torch_logits(model, ids=IDS) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def in_float64(model):
    """The same model with every step in float64, the rotary angles too (transformers forms those in float32 always)."""
    exact = copy.deepcopy(model).double()
    rotary = getattr(exact, "model", exact).rotary_emb

    def forward(x, position_ids):
        angles = position_ids[..., None].double() * rotary.inv_freq.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    rotary.forward = forward
    return exact


def tolerance(model, ids=IDS) -> float:
    """Four times the noise floor of this model on these ids, as a largest absolute difference of logits."""
    float32 = torch_logits(model, ids)
    float64 = torch_logits(in_float64(model), ids)
    noise = float(np.abs(float32 - float64).max())
    assert 0 < noise < 1e-4 * np.abs(float64).max()
    return 4 * noise


def distance(ours: mx.array, theirs: np.ndarray) -> float:
    """Largest absolute difference; NaN or a shape that differs is infinitely far."""
    ours = np.array(ours.astype(mx.float32))
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max())
