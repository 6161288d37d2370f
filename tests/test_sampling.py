"""Sampling functions against transformers' processors and warpers, value by value, and at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen_mlx import QwenMLXError, SamplingSettings
from qwen_mlx.backend import mx
from qwen_mlx.sampling import min_p, repetition_penalty, sample, top_k_candidates, top_p

RNG = np.random.default_rng(3)
LOGITS = (RNG.standard_normal((4, 500)) * 4).astype(np.float32)
IDS = RNG.integers(0, 500, (4, 30))


def same(ours: mx.array, theirs: torch.Tensor) -> None:
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8, 0.95, 0.9999])
def test_top_p(p: float):
    same(top_p(mx.array(LOGITS), p), TopPLogitsWarper(p)(None, torch.from_numpy(LOGITS)))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.3, 0.99])
def test_min_p(p: float):
    same(min_p(mx.array(LOGITS), p), MinPLogitsWarper(p)(None, torch.from_numpy(LOGITS)))


@pytest.mark.parametrize("penalty", [0.5, 1.05, 1.3])
def test_repetition_penalty(penalty: float):
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(IDS), torch.from_numpy(LOGITS.copy()))
    same(repetition_penalty(mx.array(LOGITS), mx.array(IDS), penalty), theirs)


@pytest.mark.parametrize("k", [1, 2, 20, 499, 500])
def test_top_k(k: int):
    values, ids = top_k_candidates(mx.array(LOGITS), k)
    ours = np.full(LOGITS.shape, -np.inf, np.float32)
    np.put_along_axis(ours, np.array(ids).astype(np.int64), np.array(values), -1)
    same(mx.array(ours), TopKLogitsWarper(k)(None, torch.from_numpy(LOGITS)))
    assert (np.diff(np.array(values)) <= 0).all()


def test_draws_follow_the_probabilities_of_the_chain():
    """20,000 draws of the whole chain against transformers' probabilities: chi-squared below its 99.99 % quantile."""
    logits = np.tile(LOGITS[:1], (20000, 1))
    settings = SamplingSettings(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02)
    drawn = np.array(sample(mx.array(logits), settings, key=mx.random.key(11)))
    theirs = torch.from_numpy(LOGITS[:1] / np.float32(1.3))
    for warper in (TopKLogitsWarper(12), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)):
        theirs = warper(None, theirs)
    expected = torch.softmax(theirs, -1)[0].numpy() * 20000
    counts = np.bincount(drawn, minlength=500)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert 5 < kept.sum() <= 12
    assert statistic < 40  # the quantile for 11 degrees of freedom is 37.4


def test_greedy_is_argmax_and_ignores_the_rest():
    np.testing.assert_array_equal(np.array(sample(mx.array(LOGITS), SamplingSettings())), LOGITS.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
def test_tiny_temperature_is_greedy_not_nan(temperature: float):
    drawn = sample(mx.array(LOGITS), SamplingSettings(temperature=temperature), key=mx.random.key(0))
    np.testing.assert_array_equal(np.array(drawn), LOGITS.argmax(-1))


def test_one_key_one_draw():
    settings = SamplingSettings(temperature=1.0)
    first, again, other = (np.array(sample(mx.array(LOGITS), settings, key=mx.random.key(k))) for k in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_bfloat16_logits_are_sampled_in_float32():
    ids = sample(
        mx.array(LOGITS).astype(mx.bfloat16), SamplingSettings(temperature=0.7, top_p=0.8), key=mx.random.key(0)
    )
    assert ids.shape == (4,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", True),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: object):
    with pytest.raises(QwenMLXError, match=name):
        SamplingSettings(**{name: value})


def test_override():
    own = SamplingSettings(0.7, 20, 0.8, 0.0, 1.05, "the file")
    assert own.override(temperature=None) is own
    assert own.override(temperature=0.3) == SamplingSettings(
        0.3, 20, 0.8, 0.0, 1.05, "temperature given, the rest the file"
    )
    assert own.override(temperature=0) == SamplingSettings(source="greedy, as given")
    assert own.override(temperature=0, repetition_penalty=1.2).repetition_penalty == 1.2
