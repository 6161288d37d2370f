"""One token at a time through the fused launches, in the emulator, against the model's own equations."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import launches
from qwen_mlx import ops
from qwen_mlx.model import fused_step as step
from reference.emulator import emulate
from tests.helpers.small_qwen import leaves_no_memory, model_of, nbytes, same


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["dense", "affine", "q4_k", "q6_k", "mixed"])
def test_a_token_gets_the_logits_of_the_plain_equations(form: str, tied: bool):
    model = model_of(form, tied)
    prompt, more = mx.array([[5, 17, 200, 3]]), [9, 250]
    plain, fused = model.make_cache(), model.make_cache()
    with ops.no_grad():
        model(prompt, plain)
        model(prompt, fused)
        expected = [model(mx.array([[token]]), plain) for token in more]
        with emulate():
            assert step.serves(model, mx.array([[9]]), fused)
            found = [model(mx.array([[token]]), fused) for token in more]
    for a, b in zip(found, expected):
        assert b.shape == (1, 1, 300)
        same(a, b)
    assert fused[0].offset == 6


def test_caches_looked_into_taken_back_and_continued_between_steps():
    """Forty steps, past two tails, with every other use of a cache in between: as without steps."""
    model = model_of("dense", True)
    plain, fused = model.make_cache(), model.make_cache()

    def feed(ids: list[int]) -> None:
        expected = model(mx.array([ids]), plain)
        with emulate():
            same(model(mx.array([ids]), fused), expected)

    with ops.no_grad():
        feed([5, 17, 200, 3])
        for token in range(20):
            feed([token])
        same(fused[1].state[0], plain[1].state[0])  # one layer alone
        feed([30])
        for cache in (plain, fused):
            for layer in cache:
                layer.trim(3)
        feed([31])
        feed([40, 41, 42])
        for token in range(17):
            feed([50 + token])
        for cache in (plain, fused):
            for layer in cache:
                layer.trim(25)
        feed([60])
        for mine, theirs in zip(fused, plain):
            same(mx.concatenate(mine.state), mx.concatenate(theirs.state))


def test_what_a_step_does_not_serve():
    model = model_of("dense", True)
    one, two = mx.array([[1]]), mx.array([[1, 2]])
    cache = model.make_cache()
    model(two, cache)
    with emulate():
        assert not step.serves(model, one, cache), "gradients are wanted"
        with ops.no_grad():
            assert step.serves(model, one, cache)
            assert not step.serves(model, two, cache)
            assert not step.serves(model, one, model.make_cache()), "there is no buffer yet"
    with ops.no_grad():
        assert not step.serves(model, one, cache), "the CPU computes in plain MLX"


def test_a_step_is_made_anew_when_a_weight_is_replaced():
    model = model_of("dense", True)
    cache = model.make_cache()
    with ops.no_grad(), emulate():
        model(mx.array([[1, 2]]), cache)
        before = model(mx.array([[3]]), cache)
        cache[0].trim(1), cache[1].trim(1)
        model.model.norm.weight = model.model.norm.weight * 2
        after = model(mx.array([[3]]), cache)
    np.testing.assert_allclose(np.array(after), 2 * np.array(before), rtol=1e-5, atol=1e-5)


def test_a_deleted_model_leaves_no_memory_behind():
    model = model_of("dense", tied=True)
    cache = model.make_cache()
    with ops.no_grad():
        model(mx.array([[5, 17]]), cache)
        with emulate():
            mx.eval(model(mx.array([[9]]), cache))
    held, size = [model, cache], nbytes(model)
    del model, cache
    leaves_no_memory(held, size)


def test_a_decoded_token_takes_five_primitives_a_layer_and_no_view():
    mine, theirs = (launches.per_layer(count) for count in (launches.ours, launches.theirs))
    assert mine == {"CustomKernel": 5}
    assert sum(count for name, count in theirs.items() if name not in launches.VIEWS) > 3 * mine.total()
