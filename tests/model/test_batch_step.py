"""A token of every row of a batch as one graph, in the emulator, against the plain layers."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qwen_mlx import Qwen2, ops
from qwen_mlx.model.batch_cache import BatchKVCache, Padding, join, select
from qwen_mlx.model.batch_step import serves
from reference.emulator import emulate
from tests.helpers.small_qwen import leaves_no_memory, model_of, nbytes, same


def read(model: Qwen2, pads: list[int], length: int) -> list[BatchKVCache]:
    """Caches of rows that hold `length` columns, padding included."""
    padding = Padding(pads)
    cache = [BatchKVCache(padding) for _ in range(model.config.num_hidden_layers)]
    ids = mx.array([[(7 * row + 3 * i) % 300 for i in range(length)] for row in range(len(pads))])
    with ops.no_grad():
        mx.eval(model.model(ids, cache))
    return cache


def tokens(step: int, rows: int) -> mx.array:
    return mx.array([[(31 * step + 5 * row) % 300] for row in range(rows)])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["dense", "affine", "q4_k", "mixed"])
def test_rows_get_the_logits_of_the_plain_layers(form: str, tied: bool):
    model, pads = model_of(form, tied), [2, 0, 5]
    plain, fused = read(model, pads, 6), read(model, pads, 6)
    with ops.no_grad():
        expected = [model(tokens(i, 3), plain, 1) for i in range(2)]
        with emulate():
            assert serves(model, tokens(0, 3), fused)
            found = [model(tokens(i, 3), fused, 1) for i in range(2)]
    for a, b in zip(found, expected):
        same(a, b)
    assert fused[0].offset == 8


def test_rows_that_leave_and_join_between_steps():
    """Past a tail's end, with every other use of a batch's cache in between."""
    model = model_of("dense", True)
    plain, fused = read(model, [1, 0, 3, 4], 9), read(model, [1, 0, 3, 4], 9)

    def feed(count: int) -> None:
        for i in range(count):
            ids = tokens(i, len(plain[0].padding.columns))
            expected = model(ids, plain, 1)
            with emulate():
                same(model(ids, fused, 1), expected)

    with ops.no_grad():
        feed(18)
        same(fused[1].state[0], plain[1].state[0])  # one layer alone
        feed(2)
        plain, fused = select(plain, [0, 2]), select(fused, [0, 2])
        feed(2)
        plain, fused = join(plain, read(model, [0, 6], 12)), join(fused, read(model, [0, 6], 12))
        feed(2)
    for mine, theirs in zip(fused, plain):
        for found, expected in zip(mine.state, theirs.state):
            same(found, expected)


def test_what_it_does_not_serve():
    model = model_of("dense", True)
    cache, one = read(model, [0, 2], 4), tokens(0, 2)
    with emulate():
        assert not serves(model, one, cache), "gradients are wanted"
        with ops.no_grad():
            assert serves(model, one, cache)
            assert not serves(model, mx.array([[1, 2], [3, 4]]), cache)
            assert not serves(model, one, [BatchKVCache(Padding([0, 2])) for _ in cache]), "there is no buffer yet"
            assert not serves(model, one, model.make_cache()), "rows of a plain cache have no padding"
    with ops.no_grad():
        assert not serves(model, one, cache), "the CPU computes in plain MLX"


@pytest.mark.parametrize("owner", ["norm", "body"])
def test_it_is_made_anew_when_a_weight_is_replaced(owner: str):
    model = model_of("dense", True)
    cache = read(model, [0, 2], 4)
    with ops.no_grad(), emulate():
        before = model(tokens(0, 2), cache, 1)
        for layer in cache:
            layer.trim(1)
        if owner == "norm":
            model.model.norm.weight = model.model.norm.weight * 2
        else:
            other = model_of("dense", True)
            other.model.norm.weight = other.model.norm.weight * 2
            model.model = other.model
        after = model(tokens(0, 2), cache, 1)
    same(after, 2 * before)


def test_a_deleted_model_leaves_no_memory_behind():
    model = model_of("dense", tied=True)
    cache = read(model, [0, 2], 4)
    with ops.no_grad(), emulate():
        mx.eval(model(tokens(0, 2), cache, 1))
    held, size = [model, cache], nbytes(model)
    del model, cache
    leaves_no_memory(held, size)
