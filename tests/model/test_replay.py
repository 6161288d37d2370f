"""A CPU's decoding step, whose compiled calls are recorded once and repeated, against the same calls made anew."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import Qwen2, ops
from qwen_mlx.model.batch_cache import BatchKVCache, join, select
from qwen_mlx.model.fused import FusedModel
from qwen_mlx.model.layers import QuantizedLinear
from qwen_mlx.ops.cpu import replay
from tests.helpers.packed_models import model_of

pytestmark = pytest.mark.skipif(not ops.dispatch.have_numba(), reason="needs numba")


@pytest.fixture(autouse=True)
def on_the_cpu():
    with ops.forced("cpu"):
        yield


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of arguments of each call that was recorded to its end."""
    found: list[int] = []
    record = replay.Replayed._record

    def noted(self: replay.Replayed, arrays: tuple[mx.array, ...]) -> list[mx.array]:
        results = record(self, arrays)
        found.append(len(arrays))
        return results

    monkeypatch.setattr(replay.Replayed, "_record", noted)
    return found


def step(model: Qwen2, token: int, cache: list) -> np.ndarray:
    """The logits of one token, or of a batch whose rows get this token and the ones after it."""
    rows = len(cache[0].padding.columns) if isinstance(cache[0], BatchKVCache) else 1
    return np.array(FusedModel.of(model)(mx.array([[(token + i) % 300] for i in range(rows)]), cache))


def anew(model: Qwen2, token: int, cache: list) -> np.ndarray:
    """A step without a recording."""
    form = FusedModel.of(model)
    before = form._one_row, form._rows
    form._one_row, form._rows = form._run_one_row, form._run_rows
    try:
        return step(model, token, cache)
    finally:
        form._one_row, form._rows = before


def filled(model: Qwen2, n_tokens: int = 4) -> list:
    cache = model.make_cache()
    FusedModel.of(model)(mx.array([[(7 * i + 5) % 300 for i in range(n_tokens)]]), cache)
    return cache


def adapted(model: Qwen2) -> Qwen2:
    """Adapters beside a packed and beside a dense matrix, one of them with a factor for each row."""
    rng = np.random.default_rng(3)
    for module, scaled in (
        (model.model.layers[0].self_attn.o_proj, True),
        (model.model.layers[1].mlp.down_proj, False),
    ):
        rows, columns = (
            (module.matrix.rows, module.matrix.columns) if isinstance(module, QuantizedLinear) else module.weight.shape
        )
        module.lora_a = mx.array(rng.standard_normal((4, columns)).astype(np.float32))
        module.lora_b = mx.array(rng.standard_normal((rows, 4)).astype(np.float32))
        if scaled:
            module.lora_row_scale = mx.array(rng.uniform(0.5, 2, rows).astype(np.float32))
    return model


@pytest.mark.parametrize("packing", ["dense", "affine", "q4_k", "mixed", "adapted"])
def test_steps_are_bit_equal_to_steps_made_anew(packing: str, recordings: list[int]):
    """Forty steps of two texts in turn, with tokens taken back and past a buffer's end."""
    model = adapted(model_of("q4_k", True)) if packing == "adapted" else model_of(packing, True)
    repeated, fresh = [filled(model), filled(model, 250)], [filled(model), filled(model, 250)]
    for i in range(40):
        logits = step(model, i * 13 % 300, repeated[i % 2])
        assert np.array_equal(logits, anew(model, i * 13 % 300, fresh[i % 2]))
        if i % 16 == 15:
            for cache in (*repeated[i // 16 % 2], *fresh[i // 16 % 2]):
                cache.trim(3)
    for mine, theirs in zip(repeated[1], fresh[1]):
        assert np.array_equal(np.array(mx.concatenate(mine.state)), np.array(mx.concatenate(theirs.state)))
    assert len(recordings) == 1


@pytest.mark.parametrize("packing", ["dense", "mixed", "adapted"])
def test_a_batch_s_steps_too(packing: str, recordings: list[int]):
    """Past a buffer's end, while a row leaves and another joins; what adapters add is computed by MLX."""
    model = adapted(model_of("q4_k", True)) if packing == "adapted" else model_of(packing, True)
    batches = [join(join(filled(model, 250), filled(model)), filled(model, 30)) for _ in range(2)]
    for i in range(30):
        if i == 10:
            batches = [select(batch, [0, 2]) for batch in batches]
        if i == 20:
            batches = [join(batch, filled(model, 5)) for batch in batches]
        assert np.array_equal(step(model, i * 13, batches[0]), anew(model, i * 13, batches[1]))
    assert len(recordings) == (0 if packing == "adapted" else 3)


def test_results_stay_what_they_were():
    model = model_of("q4_k", True)
    cache = filled(model)
    first = FusedModel.of(model)(mx.array([[1]]), cache)
    second = FusedModel.of(model)(mx.array([[2]]), cache)
    before = np.array(first), np.array(second)
    step(model, 3, cache)
    assert np.array_equal(first, before[0])
    assert np.array_equal(second, before[1])


def test_a_function_that_computes_otherwise_is_called_each_time(recordings: list[int]):
    """An array of MLX's own would be the first call's for ever."""
    weight = mx.ones((32, 32))
    matrix = ops.Matrix(ops.DENSE, 32, 32, (weight,))
    x = [mx.full((1, 1, 32), float(n)) for n in range(3)]
    for function in (
        lambda x: [ops.matvec(x + 1, matrix)],  # before an operation
        lambda x: [ops.matvec(x, matrix) + 32],  # after it
        lambda x: [ops.matvec(ops.matvec(x, matrix) / 32 + 1, matrix)],  # between two
        lambda x: [ops.matmul(x, weight) + 32],  # by a compiled function that is not recorded
    ):
        call = ops.compiled(function, lambda: [weight])
        with ops.no_grad():
            assert [float(call(value)[0][0, 0, 0]) for value in x] == [32, 64, 96]
    assert not recordings


def test_a_weight_that_was_not_named_is_not_kept(recordings: list[int]):
    weights = [mx.ones((32, 32))]
    call = ops.compiled(lambda x: [ops.matvec(x, ops.Matrix(ops.DENSE, 32, 32, tuple(weights)))], list)
    x = mx.ones((1, 1, 32))
    with ops.no_grad():
        assert float(call(x)[0][0, 0, 0]) == 32
        weights[0] = weights[0] * 2
        assert float(call(x)[0][0, 0, 0]) == 64
    assert not recordings


def test_threads_take_turns():
    model = model_of("q4_k", True)
    alone = filled(model)
    expected = [step(model, token, alone) for token in range(30)]
    wrong: list[int] = []

    def run() -> None:
        cache = filled(model)
        for token in range(30):
            with ops.no_grad():
                if not np.array_equal(step(model, token, cache), expected[token]):
                    wrong.append(token)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
