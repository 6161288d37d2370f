"""The CPU's own functions against float64, and against plain MLX."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from qwen_mlx import ops
from qwen_mlx.backend import mx
from qwen_mlx.gguf.blocks import BY_KIND
from qwen_mlx.gguf.packing import BLOCK_SIZES
from qwen_mlx.ops import DENSE, Matrix, Packing
from tests.helpers.blocks import SCALES, gguf_py, random_rows
from tests.helpers.cases import each

AFFINE = [(bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)]
EPS = 2.0**-24

pytestmark = pytest.mark.skipif(not ops.dispatch.have_numba(), reason="needs numba")


@pytest.fixture(autouse=True)
def on_the_cpu_without_gradients():
    with ops.forced("cpu"), ops.no_grad():
        yield


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def blocks(kind: str, rows: int, columns: int, halves: list[int] | None = None) -> tuple[Matrix, np.ndarray]:
    """A matrix of random blocks and its values, float32."""
    raw = random_rows(BY_KIND[kind], rows, columns // BLOCK_SIZES[kind], halves)
    return ops.raw_matrix(raw, kind), gguf_py(raw, BY_KIND[kind]).reshape(rows, columns)


def affine(bits: int, size: int, rows: int, columns: int) -> tuple[Matrix, np.ndarray]:
    arrays = mx.quantize(mx.array(normal(rows, columns)), group_size=size, bits=bits)
    values = np.array(mx.dequantize(*arrays, group_size=size, bits=bits))
    return Matrix(Packing("affine", bits, size), rows, columns, tuple(arrays)), values


def assert_product(y: mx.array, x: np.ndarray, w: np.ndarray) -> None:
    """y = x w^T within the bound of a float32 sum in any order: n eps times the sum of the products' sizes."""
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    bound = w.shape[1] * EPS * (np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64))
    assert y.dtype == mx.float32
    assert np.all(np.abs(np.array(y, np.float64).reshape(exact.shape) - exact) <= bound + 1e-37)


def assert_all_products(matrix: Matrix, values: np.ndarray) -> None:
    for count in (1, 2, 3, 5):
        x = normal(count, matrix.columns, seed=count)
        assert_product(ops.multiply(mx.array(x), matrix), x, values)
    unpacked = np.array(ops.unpack(matrix, mx.float32))
    assert np.array_equal(unpacked, values)
    ids = mx.array([[matrix.rows - 1, 0]])
    assert np.array_equal(np.array(ops.unpack(matrix, mx.float32, ids)), values[[[-1, 0]]])


@each("kind", BLOCK_SIZES)
@each("rows", [1, 7, 70])
def test_blocks_are_multiplied_and_unpacked(kind: str, rows: int):
    assert_all_products(*blocks(kind, rows, 512, [0x2419, 0x9C00, 0x1234]))


@each("kind", [kind for kind, size in BLOCK_SIZES.items() if size == 32])
def test_rows_of_an_odd_number_of_blocks(kind: str):
    assert_all_products(*blocks(kind, 5, 7 * 32, [0x2419, 0x9C00]))


@each("scales", ["zero", "subnormal", "largest", "negative"])
@each("kind", BLOCK_SIZES)
def test_extreme_scales(kind: str, scales: str):
    assert_all_products(*blocks(kind, 3, 256, SCALES[scales]))


@pytest.mark.parametrize("kind", ["q5_0", "q6_k"])
def test_a_scale_that_is_not_finite_reaches_the_product(kind: str):
    matrix, _ = blocks(kind, 3, 256, SCALES["nan"])
    assert np.isnan(np.array(ops.multiply(mx.array(normal(1, 256)), matrix))).all()


@each(("bits", "size"), AFFINE)
def test_affine_codes_are_multiplied_and_unpacked(bits: int, size: int):
    matrix, values = affine(bits, size, 9, 384)
    x = normal(3, 384)
    for count in (1, 3):
        assert_product(ops.multiply(mx.array(x[:count]), matrix), x[:count], values)
    np.testing.assert_allclose(np.array(ops.unpack(matrix, mx.float32)), values, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_dense_rows_are_multiplied(dtype: mx.Dtype):
    w = mx.array(normal(70, 96)).astype(dtype)
    x, values = normal(4, 96), np.array(w.astype(mx.float32))
    for count in (1, 4):
        assert_product(ops.multiply(mx.array(x[:count]), Matrix(DENSE, 70, 96, (w,))), x[:count], values)


def test_a_matrix_larger_than_what_is_unpacked_at_a_time():
    matrix, values = blocks("q8_0", 2100, 1024, [0x2419])
    x = normal(2, 1024)
    assert_product(ops.multiply(mx.array(x), matrix), x, values)


def test_ids_beyond_the_rows_read_no_foreign_memory():
    """A step that is launched ahead may be given -1, the sign of a logit that is not finite."""
    matrix, values = blocks("q5_0", 4, 64, [0x2419])
    out = np.array(ops.unpack(matrix, mx.float32, mx.array([-1, 2**30])))
    assert np.array_equal(out[0], values[3])


def test_a_step_equals_plain_mlx():
    """Norm, products, positions, the cache's newest tokens and SwiGLU of one token."""
    x, eps = mx.array(normal(1, 1, 256)), 1e-6
    norm = (mx.array(normal(256, seed=1)), eps)
    q, kv = blocks("q5_0", 4 * 32, 256, [0x2419])[0], blocks("q6_k", 4 * 32, 256, [0x2419])[0]
    bias, recent = mx.array(normal(256, seed=2)), mx.array(normal(1, 4, 16, 32, seed=3))
    table = ops.Rotary.plain(32, 1e4).table(40, 1)[0, 0]
    position = mx.array([40, 37, 0, 0], mx.int32)

    def results() -> list[mx.array]:
        return [
            *ops.matvec_qkv(x, [q, kv], bias, norm, table, recent, position, 4),
            ops.matvec_swiglu(x, kv, norm),
            ops.matvec(x, kv, norm, mx.array(normal(128, seed=4))),
        ]

    own = results()
    with ops.forced("reference"):
        plain = results()
    for y, expected in zip(own, plain, strict=True):
        assert y.shape == expected.shape
        # Both add 256 products in float32, in another order; the largest sum says how large they are.
        largest = float(mx.abs(expected).max())
        np.testing.assert_allclose(np.array(y), np.array(expected), rtol=0, atol=4e-6 * largest)


@each("tokens", [1, 20, 300, 700])
@each("window", [None, 5, 290])
@each("padding", [None, [0, 9]])
def test_decode_attention_equals_plain_mlx(tokens: int, window: int | None, padding: list[int] | None):
    rows, room = 1 if padding is None else 2, -(-tokens // 256) * 256
    q, kv = mx.array(normal(rows, 6, 1, 48)), mx.array(normal(rows, 4, room, 48, seed=1))
    recent = mx.array(normal(rows, 4, 16, 48, seed=2))
    first = None if padding is None else mx.array([min(p, tokens) for p in padding], mx.int32)
    arguments = (q, kv, recent, mx.array([tokens + 3, tokens], mx.int32), 48**-0.5, window, first)
    own = ops.decode_attention(*arguments)
    with ops.forced("reference"):
        plain = ops.decode_attention(*arguments)
    np.testing.assert_allclose(np.array(own), np.array(plain), rtol=1e-5, atol=2e-6)


@each("length", [1, 5, 60])
@each("before", [0, 13])
@each("mask", ["causal", None, "shared", "each row's"])
def test_attention_equals_plain_mlx(length: int, before: int, mask: str | None):
    q, kv = mx.array(normal(2, length, 6, 40)), mx.array(normal(2, 4, length + before, 40, seed=1))
    visible: mx.array | str | None = mask
    if mask in ("shared", "each row's"):
        shape = (length, length + before) if mask == "shared" else (2, 1, length, length + before)
        seen = np.random.default_rng(2).random(shape) < 0.5
        seen[..., 0] = True
        visible = mx.array(seen)
    own = ops.attention(q, kv[:, :2], kv[:, 2:], 40**-0.5, visible)
    with ops.forced("reference"):
        plain = ops.attention(q, kv[:, :2], kv[:, 2:], 40**-0.5, visible)
    np.testing.assert_allclose(np.array(own), np.array(plain), rtol=1e-5, atol=2e-6)


def test_a_prompts_passes_equal_plain_mlx():
    x, weight = mx.array(normal(2, 5, 128)), mx.array(normal(128, seed=1))
    table = ops.Rotary.plain(16, 1e4).table(np.array([3, -2]), 5)

    def results() -> list[mx.array]:
        return [
            ops.rms_norm(x, weight, 1e-6),
            *ops.add_rms_norm(x, x * 0.5, weight, 1e-6),
            *ops.qkv_rope(x, weight, table, 4, 2),
            *ops.qkv_rope(x, None, table[:1], 4, 2),
            ops.swiglu(x * 40, x),
            ops.swiglu_joined(x),
        ]

    own = results()
    with ops.forced("reference"):
        plain = results()
    for y, expected in zip(own, plain, strict=True):
        assert y.shape == expected.shape
        np.testing.assert_allclose(np.array(y), np.array(expected), rtol=1e-6, atol=1e-6)


def test_the_likeliest_token_and_what_is_not_finite():
    logits = normal(3, 1000)
    logits[1, 7] = np.inf
    logits[2, 500] = logits[2, 501] = 9
    assert ops.best_token(mx.array(logits)).tolist() == [int(logits[0].argmax()), -1, 500]


SCRIPT = """
import numpy as np
from qwen_mlx import ops
from qwen_mlx.backend import mx
matrix, x = ops.raw_matrix(np.full((3, 22), 60, np.uint8), "q5_0"), mx.array(np.linspace(-1, 1, 32, dtype=np.float32))
with ops.no_grad():
    assert ops.executor() == "cpu"
    own = ops.multiply(x[None], matrix)
    with ops.forced("reference"):
        plain = ops.multiply(x[None], matrix)
print(mx.allclose(own, plain, rtol=1e-5).item())
"""


@pytest.mark.heavy
@pytest.mark.parametrize(
    "environment",
    [
        {"NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        {"NUMBA_THREADING_LAYER": "workqueue"},
        {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": ""},
        {"NUMBA_CACHE_DIR": "/dev/null/none"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_in_other_surroundings(environment: dict[str, str], tmp_path):
    """One thread, numba's own threads, a processor without AVX2, no place for compiled code."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), **environment},
    )
    assert result.stdout == "True\n", result.stderr


@pytest.mark.heavy  # a process
def test_a_second_process_compiles_where_all_has_to_be_compiled(monkeypatch: pytest.MonkeyPatch):
    from qwen_mlx.ops.cpu import kernels, rehearsal, threads

    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **settings: started.append(command))
    for compiled, cores, processes in ((0, 2, 0), (1, 1, 0), (1, 2, 1)):
        monkeypatch.setattr(rehearsal, "_rehearsed", set())
        monkeypatch.setattr(kernels, "compilations", lambda compiled=compiled: compiled)
        monkeypatch.setattr(threads, "count", lambda cores=cores: cores)
        ops.compile_ahead([], [], mx.float32)()
        assert len(started) == processes
    monkeypatch.undo()
    subprocess.run(started[0], check=True, timeout=120)


@pytest.mark.parametrize("native", [True, False])
def test_every_float16_is_read_by_the_processor_s_instructions_and_without_them(
    native: bool, monkeypatch: pytest.MonkeyPatch
):
    import numba

    from qwen_mlx.ops.cpu import vectors
    from qwen_mlx.ops.cpu.packings import Q80, Halves, store_values

    if native and not vectors._KNOWS_HALVES:
        pytest.skip("this processor has no such instructions")
    monkeypatch.setattr(vectors, "_KNOWS_HALVES", native)

    @numba.njit
    def read(matrix, out):
        for block in range(out.size // 32):
            store_values(matrix, np.uintp(block), out, np.uintp(block))

    halves = np.arange(1 << 16, dtype=np.uint16)
    together, one_by_one = np.zeros(1 << 16, np.float32), np.zeros((1 << 16, 32), np.float32)
    read(Halves(halves.view(np.uint8)), together)
    blocks = np.ones((1 << 16, 34), np.uint8)  # codes of 1, with every scale
    blocks[:, :2] = halves.view(np.uint8).reshape(-1, 2)
    read(Q80(blocks.reshape(-1)), one_by_one.reshape(-1))
    expected = halves.view(np.float16).astype(np.float32)
    for values in (together, one_by_one[:, 31]):
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(np.signbit(values), np.signbit(expected))


@each("kind", [*BLOCK_SIZES, "float32", "float16", "bfloat16", "affine3", "affine4", "affine8"])
def test_the_other_number_of_lanes_multiplies_alike(kind: str, monkeypatch: pytest.MonkeyPatch):
    """AVX-512's sums of 16 lanes on processors without it, and the other way round."""
    import numba

    from qwen_mlx.ops.cpu import matrices, packings, vectors
    from qwen_mlx.ops.cpu.kernels import ordered

    lanes = 24 - vectors.LANES
    monkeypatch.setattr(vectors, "LANES", lanes)
    monkeypatch.setattr(vectors, "Sums", vectors.F32X16 if lanes == 16 else vectors.F32X8)
    zeros = vectors.zeros16 if lanes == 16 else vectors.zeros8

    @numba.njit
    def products(matrix, per_block, by_words, x, out):
        order, totals = ordered(x, x[:0], 0.0, by_words)
        blocks = totals.size // per_block
        for row in range(out.size):
            sums = zeros()
            for block in range(blocks):
                sums = packings.add_products(
                    matrix, np.uintp(row * blocks + block), np.uintp(block), order, totals, sums
                )
            out[row] = vectors.total(sums)

    if kind in BLOCK_SIZES:
        matrix, values = blocks(kind, 7, 512, [0x2419, 0x9C00])
    elif kind.startswith("affine"):
        matrix, values = affine(int(kind[6:]), 64, 7, 512)
    else:
        weight = mx.array(normal(7, 512)).astype(getattr(mx, kind))
        matrix, values = Matrix(DENSE, 7, 512, (weight,)), np.array(weight.astype(mx.float32))
    packed, x, out = matrices._compiled_form(matrix), normal(512, seed=1), np.zeros(7, np.float32)
    products(packed, packings.groups_of(packed), packings.by_words(packed), x, out)
    assert_product(mx.array(out), x[None], values)
