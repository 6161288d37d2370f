"""The fused form against the plain equations: chunks, one token and one token of each row, in the emulator too."""

from __future__ import annotations

import copy
import importlib

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import launches
from qwen_mlx import Qwen2, ops
from qwen_mlx.model.batch_cache import BatchKVCache, Padding, join, select
from qwen_mlx.model.cache import KVCache
from qwen_mlx.model.fused import FusedModel
from qwen_mlx.model.layers import join_rows, matrix_of, temporary_bytes
from reference.emulator import emulate
from tests.helpers.cases import each
from tests.helpers.packed_models import leaves_no_memory, model_of, nbytes, same

PACKINGS = ["dense", "affine", "q4_k", "q6_k", "mixed"]
FEW = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # threads


def fused(model: Qwen2, ids: list[list[int]], cache: list, keep: int = 0) -> mx.array:
    return FusedModel.of(model)(mx.array(ids), cache, keep)


@each("biased", [False, True])
@each("packing", PACKINGS)
def test_a_chunk_gets_the_logits_of_the_plain_equations(packing: str, biased: bool):
    model = model_of(packing, True, mlp_bias=biased, sliding_window=3, max_window_layers=1)
    plain, joined, ids = model.make_cache(), model.make_cache(), [[5, 17, 200, 3, 9], [1, 2, 3, 4, 5]]
    for chunk in (ids, [row[:1] for row in ids], ids):
        same(fused(model, chunk, joined), model(mx.array(chunk), plain))
    for mine, theirs in zip(joined, plain):
        same(mx.concatenate(mine.state), mx.concatenate(theirs.state))


@each(("packing", "tied"), [*((packing, packing != "affine") for packing in PACKINGS), ("dense", False)])
def test_a_token_gets_the_logits_of_the_plain_equations(packing: str, tied: bool):
    model = model_of(packing, tied)
    prompt, more = mx.array([[5, 17, 200, 3]]), [9, 250]
    plain, stepped = model.make_cache(), model.make_cache()
    model(prompt, plain), model(prompt, stepped)
    expected = [model(mx.array([[token]]), plain) for token in more]
    with emulate():
        form = FusedModel.of(model)
        assert form.supports_step(mx.array([[9]]), stepped)
        logits = [form(mx.array([[token]]), stepped) for token in more]
    for a, b in zip(logits, expected):
        assert b.shape == (1, 1, 300)
        same(a, b)
    assert stepped[0].offset == 6


def test_caches_looked_into_taken_back_and_continued_between_steps():
    """Forty steps, past the newest tokens' array twice, with every other use of a cache in between."""
    model = model_of("dense", True, **FEW)
    plain, stepped = model.make_cache(), model.make_cache()

    def feed(ids: list[int]) -> None:
        expected = model(mx.array([ids]), plain)
        with emulate(checked=False):
            same(fused(model, [ids], stepped), expected)

    feed([5, 17, 200, 3])
    for token in range(20):
        feed([token])
    same(stepped[1].state[0], plain[1].state[0])  # one layer alone
    feed([30])
    for cache in (plain, stepped):
        for layer in cache:
            layer.trim(3)
    feed([31])
    feed([40, 41, 42])
    for token in range(17):
        feed([50 + token])
    for cache in (plain, stepped):
        for layer in cache:
            layer.trim(25)
    feed([60])
    for mine, theirs in zip(stepped, plain):
        same(mx.concatenate(mine.state), mx.concatenate(theirs.state))


def test_each_layer_has_its_own_window_in_a_step():
    model = model_of("dense", True, sliding_window=4, max_window_layers=1)
    plain, stepped = model.make_cache(), model.make_cache()
    prompt = mx.array([[5, 17, 200, 3, 7, 8, 9]])
    model(prompt, plain), model(prompt, stepped)
    expected = model(mx.array([[11]]), plain)
    with emulate():
        assert FusedModel.of(model).supports_step(mx.array([[11]]), stepped)
        same(fused(model, [[11]], stepped), expected)


@pytest.mark.parametrize(
    ("packing", "hidden_size", "forms"), [("dense", 2048, 1), ("mixed", 3584, 2), ("three", 2048, 3)]
)
def test_rows_wider_than_a_threadgroup_loads_at_a_time(packing: str, hidden_size: int, forms: int):
    """Of the sizes of the 7B model and larger, with q, k and v in one, two and three matrices."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 256, "num_key_value_heads": 1}
    model = model_of(packing, False, **sizes, sliding_window=3, max_window_layers=1)
    assert len(join_rows([getattr(model.model.layers[0].self_attn, f"{name}_proj") for name in "qkv"])) == forms
    plain, stepped, prompt = model.make_cache(), model.make_cache(), mx.array([[5, 17, 200, 3, 7, 8]])
    mx.eval(model(prompt, plain), model(prompt, stepped))
    expected = [model(mx.array([[token]]), plain) for token in (9, 250)]
    with emulate(checked=False):
        assert FusedModel.of(model).supports_step(mx.array([[9]]), stepped)
        for token, logits in zip((9, 250), expected):
            same(fused(model, [[token]], stepped), logits)


def test_calls_that_are_no_step():
    model = model_of("dense", True)
    form, one, two = FusedModel.of(model), mx.array([[1]]), mx.array([[1, 2]])
    cache = model.make_cache()
    model(two, cache)
    with emulate():
        assert form.supports_step(one, cache)
        assert not form.supports_step(two, cache)
        assert not form.supports_step(one, model.make_cache()), "there is no buffer yet"
        quantized = model.make_cache(bits=8)
        model(two, quantized)
        assert not form.supports_step(one, quantized)
        biased = model_of("dense", True, mlp_bias=True)
        assert not FusedModel.of(biased).supports_step(one, cache), "the step has no place for them"
    with ops.forced("reference"):
        assert not form.supports_step(one, cache), "plain MLX has no step"


@pytest.mark.parametrize("which", ["mlp_bias", "o_proj_bias"])
def test_biases_are_in_every_token(which: str):
    model = model_of("dense", True, **{which: True})
    plain, stepped = model.make_cache(), model.make_cache()
    model(mx.array([[1, 2]]), plain), model(mx.array([[1, 2]]), stepped)
    expected = model(mx.array([[3]]), plain)
    with emulate():
        same(fused(model, [[3]], stepped), expected)


@pytest.mark.parametrize("owner", ["norm", "projection", "body"])
def test_it_is_made_anew_when_a_weight_is_replaced(owner: str):
    model = model_of("dense", True)
    ids = [[1, 2, 3]]
    before = fused(model, ids, model.make_cache())
    if owner == "norm":
        model.model.norm.weight = model.model.norm.weight * 2
    elif owner == "projection":
        model.model.layers[1].self_attn.k_proj.weight = model.model.layers[1].self_attn.k_proj.weight * 3
    else:
        model.model = model_of("affine", True).model
    after = fused(model, ids, model.make_cache())
    same(after, model(mx.array(ids)))
    assert not np.allclose(np.array(after), np.array(before))


def test_a_copy_of_a_model_has_a_fused_form_of_its_own():
    model = model_of("dense", True)
    fused(model, [[1, 2]], model.make_cache())
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj.weight = other.model.layers[0].mlp.up_proj.weight * 2
    same(fused(other, [[1, 2]], other.make_cache()), other(mx.array([[1, 2]])))
    same(fused(model, [[1, 2]], model.make_cache()), model(mx.array([[1, 2]])))


@each("packing", PACKINGS)
def test_joined_rows_are_held_once(packing: str):
    model = model_of(packing, False)
    attention = model.model.layers[0].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    expected = [np.array(array) for module in modules for array in matrix_of(module).arrays]
    before = nbytes(model)
    matrices = join_rows(modules)
    assert len(matrices) == (2 if packing == "mixed" else 1)
    assert sum(matrix.rows for matrix in matrices) == 512
    assert join_rows(modules) is matrices, "nothing is joined again"
    assert nbytes(model) == before
    arrays = [array for module in modules for array in matrix_of(module).arrays]
    for array, old in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(np.array(array), old)
    joined = sum(array.nbytes for matrix in matrices for array in matrix.arrays)
    assert joined == sum(array.nbytes for array in arrays)


def test_a_deleted_model_leaves_no_memory_behind():
    model = model_of("dense", tied=True)
    cache, rows = model.make_cache(), read(model, [0, 2], 4)
    fused(model, [[5, 17]], cache)
    with emulate():
        mx.eval(fused(model, [[9]], cache), fused(model, [[9], [8]], rows, 1))
    references, size = [model, cache, rows], nbytes(model)
    del model, cache, rows
    leaves_no_memory(references, size)


def test_a_decoded_token_takes_five_primitives_a_layer_and_no_view():
    mine, theirs = (launches.per_layer(count) for count in (launches.ours, launches.theirs))
    assert mine == {"CustomKernel": 5}
    assert sum(count for name, count in theirs.items() if name not in launches.VIEWS) > 3 * mine.total()


@pytest.mark.parametrize("packing", ["dense", "affine", "q4_k"])
def test_the_bytes_of_temporary_arrays_are_those_of_products_and_unpacked_matrices(packing: str):
    form = FusedModel.of(model_of(packing, True))
    layer = form._layers[0]
    values = 4 * 256 * (512 + 256 + 1024 + 512) if packing == "q4_k" else 0
    products = 4 * 2 * 64 * (512 + 256 + 1024 + 256)
    matrices = [*layer.qkv, *layer.gate_up, *layer.outputs]
    assert temporary_bytes(2 * 64, mx.float32, matrices) == products + values


def test_a_pass_holds_the_unpacked_matrices_of_two_pieces_at_most(monkeypatch: pytest.MonkeyPatch):
    """Counts matrices unpacked, and those of pieces that were waited for: a GPU has let go of these."""
    form, unpack, evaluate, launch = FusedModel.of(model_of("q4_k", True)), ops.unpack, mx.eval, mx.async_eval
    unpacked, waited, most, launched = 0, 0, 0, {}

    def count(*arguments: object) -> mx.array:
        nonlocal unpacked, most
        unpacked, most = unpacked + 1, max(most, unpacked + 1 - waited)
        return unpack(*arguments)

    def note(arrays: tuple[mx.array, ...]) -> None:
        launched[tuple(map(id, arrays))] = unpacked
        launch(arrays)

    def wait(arrays: tuple[mx.array, ...]) -> None:
        nonlocal waited
        waited = launched.get(tuple(map(id, arrays)), waited)
        evaluate(arrays)

    monkeypatch.setattr(ops, "unpack", count)
    monkeypatch.setattr(importlib.import_module("qwen_mlx.ops.multiply"), "unpack", count)
    monkeypatch.setattr(mx, "async_eval", note)
    monkeypatch.setattr(mx, "eval", wait)
    monkeypatch.setattr("qwen_mlx.model.fused.SMALL", 0)
    monkeypatch.setattr("qwen_mlx.model.fused.PIECE", 1)
    with ops.forced("reference"):  # a CPU's own functions unpack a few rows at a time
        form.hidden(mx.array([list(range(64))]), [KVCache() for _ in range(2)])
    assert unpacked == 9
    assert most == 5  # the embedding's rows; q, k, v; o; gate, up; and then down, before the first four are waited for


# ---------------------------------------------------------------------------------------------------------------------
# One token of each row of a batch


def read(model: Qwen2, pads: list[int], length: int) -> list[BatchKVCache]:
    """Caches of rows that hold `length` columns, padding included."""
    padding = Padding(pads)
    cache = [BatchKVCache(padding) for _ in range(model.config.num_hidden_layers)]
    ids = mx.array([[(7 * row + 3 * i) % 300 for i in range(length)] for row in range(len(pads))])
    mx.eval(model.model(ids, cache))
    return cache


def tokens(step: int, rows: int) -> list[list[int]]:
    return [[(31 * step + 5 * row) % 300] for row in range(rows)]


@each(("packing", "tied"), [("dense", True), ("affine", False), ("q4_k", True), ("mixed", False)])
def test_rows_get_the_logits_of_the_plain_equations(packing: str, tied: bool):
    model, pads = model_of(packing, tied), [2, 0, 5]
    plain, stepped = read(model, pads, 6), read(model, pads, 6)
    expected = [model(mx.array(tokens(i, 3)), plain, 1) for i in range(2)]
    with emulate():
        assert FusedModel.of(model).supports_step(mx.array(tokens(0, 3)), stepped)
        logits = [fused(model, tokens(i, 3), stepped, 1) for i in range(2)]
    for a, b in zip(logits, expected):
        same(a, b)
    assert stepped[0].offset == 8


def test_rows_that_leave_and_join_between_steps():
    """Past the end of the newest tokens' array, with every other use of a batch's cache in between."""
    model = model_of("dense", True, **FEW)
    plain, stepped = read(model, [1, 0, 3, 4], 9), read(model, [1, 0, 3, 4], 9)

    def feed(count: int) -> None:
        for i in range(count):
            ids = tokens(i, len(plain[0].padding.columns))
            expected = model(mx.array(ids), plain, 1)
            with emulate(checked=False):
                same(fused(model, ids, stepped, 1), expected)

    feed(18)
    same(stepped[1].state[0], plain[1].state[0])  # one layer alone
    feed(2)
    plain, stepped = select(plain, [0, 2]), select(stepped, [0, 2])
    feed(2)
    plain, stepped = join(plain, read(model, [0, 6], 12)), join(stepped, read(model, [0, 6], 12))
    feed(2)
    for mine, theirs in zip(stepped, plain):
        for got, expected in zip(mine.state, theirs.state):
            same(got, expected)


def test_rows_that_are_no_step():
    model = model_of("dense", True)
    form, cache, one = FusedModel.of(model), read(model, [0, 2], 4), mx.array(tokens(0, 2))
    with emulate():
        assert form.supports_step(one, cache)
        assert not form.supports_step(mx.array([[1, 2], [3, 4]]), cache)
        empty = [BatchKVCache(Padding([0, 2])) for _ in cache]
        assert not form.supports_step(one, empty), "there is no buffer yet"
        plain = model.make_cache()
        model(mx.array([[1, 2], [3, 4]]), plain)
        assert not form.supports_step(one, plain), "rows of a plain cache have no padding"
    with ops.forced("reference"):
        assert not form.supports_step(one, cache), "plain MLX has no step"


def test_gradients_go_through_the_plain_form_after_the_fused_one():
    model = model_of("dense", True)
    fused(model, [[1, 2, 3]], model.make_cache())
    assert ops.recording()
    loss, gradients = mx.value_and_grad(lambda w: loss_of(model, w))(model.model.layers[0].self_attn.q_proj.weight)
    assert float(loss) > 0
    assert float(mx.abs(gradients).max()) > 0


def loss_of(model: Qwen2, weight: mx.array) -> mx.array:
    projection = model.model.layers[0].self_attn.q_proj
    before, projection.weight = projection.weight, weight
    loss = mx.square(model(mx.array([[1, 2, 3]]))).mean()
    projection.weight = before
    return loss
