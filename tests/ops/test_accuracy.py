"""Every operation against float64, MLX's own functions and torch, in plain MLX and as emulated kernels."""

from __future__ import annotations

import mlx.core as mx
import mpmath
import numpy as np
import pytest

from qwen_mlx import ops
from qwen_mlx.cli import selftest_cases as selftest
from reference.lazy import modeling_qwen2, torch, transformers
from tests.helpers.cases import each

CASES = list(selftest.cases(small=True))
EPS = selftest.EPS
TRACED = 3.25  # ulp of plain SwiGLU in float32 where MLX traces


def torch_dtype(dtype: mx.Dtype) -> torch.dtype:
    return getattr(torch, str(dtype).removeprefix("mlx.core."))


def to_torch(x: mx.array) -> torch.Tensor:
    return torch.tensor(np.array(x.astype(mx.float32))).to(torch_dtype(x.dtype))


@each("dtype", selftest.DTYPES, ids=str)
def test_within_two_ulp_of_float64_and_never_worse_than_mlx(executor, dtype):
    rows = selftest.run([case for case in CASES if case.dtype == dtype])
    for row in rows:
        assert row["ulp"] is not None, row
        assert row["ulp"] <= selftest.LIMIT, row
        # MLX has no SwiGLU of its own: what is compared there are three functions that may be lucky on one element.
        assert row["mlx_ulp"] is None or row["ulp"] <= max(row["mlx_ulp"], 1.0 * row["case"].startswith("swiglu")), row
    assert len(rows) >= 40


@pytest.mark.heavy
@each("dtype", selftest.DTYPES, ids=str)
def test_swiglu_on_a_dense_sweep(executor, dtype):
    """Gates whose silu is a normal number. Traced, in plain float32, e^-x, the sum, the quotient and the product round
    one after another: 3.08 ulp at the most in 30 million elements, the same as torch's."""
    lowest = {mx.float32: -88, mx.float16: -11, mx.bfloat16: -86}[dtype]
    n = 20_000 if executor == "emulated" else 1_000_000
    random = selftest._Random(11, dtype)
    gate = mx.maximum(mx.concatenate([random(n, scale=2), random(n, scale=8), random(n, scale=20)]), lowest)
    up = random(3 * n)
    got = ops.swiglu(gate.astype(dtype)[None], up[None])
    want = selftest.exact_swiglu(selftest.to_float64(gate), selftest.to_float64(up))[None]
    assert selftest.ulp_error(got, want, dtype) <= selftest.LIMIT
    if executor == "reference":
        traced = mx.compile(ops.swiglu)(gate.astype(dtype)[None], up[None])
        assert selftest.ulp_error(traced, want, dtype) <= (TRACED if dtype == mx.float32 else selftest.LIMIT)
    if executor == "emulated" and dtype == mx.float32:  # silu.h's own claim
        silu = ops.swiglu(gate[None], mx.ones_like(gate)[None])
        assert selftest.ulp_error(silu, selftest.exact_swiglu(selftest.to_float64(gate), 1.0)[None], dtype) <= 0.8


def test_a_compiler_that_contracts_products_and_sums_changes_no_verdict():
    """Metal's compiler may form a fused multiply-add of its own where a product is added."""
    from reference.emulator import emulate

    # One size of each operation and kind of input: every size is a kernel to compile.
    cases = {case.name.partition(" (")[0]: case for case in CASES if case.dtype == mx.float32}
    assert len(cases) >= 24
    with emulate(checked=False, contract=True):
        for row in selftest.run(list(cases.values())):
            assert row["ok"], row


@each("break_it", ["row", "rounding", "nan", "shape", "dtype", "zero"])
def test_the_measure_sees_what_is_wrong(break_it):
    case = next(case for case in CASES if case.name == "rms_norm (5, 897)" and case.dtype == mx.bfloat16)
    right = case.compute()[0]
    if break_it == "zero":
        assert selftest.ulp_error(mx.array([1e-10]), np.zeros(1), mx.float32) > selftest.LIMIT
        return
    wrong = {
        "row": lambda: right[::-1],
        "rounding": lambda: (right.astype(mx.float32) * (1 + 2**-6)).astype(mx.bfloat16),
        "nan": lambda: mx.where(mx.arange(897) == 5, mx.array(float("nan"), mx.bfloat16), right),
        "shape": lambda: right[:, :-1],
        "dtype": lambda: right.astype(mx.float32),
    }[break_it]()
    assert case.error([right]) <= selftest.LIMIT < case.error([wrong])


ROTARY = ops.Rotary.yarn(16, 1e4, 4.0, 2048)


def hardest_position() -> int:
    """The position up to 1,000,000 where an error of the frequency matters most: to a sine that is nearly zero."""
    positions = np.arange(1, 1_000_001)
    weights = [positions / np.abs(np.sin(positions * f)) for f in ROTARY.inv_freq]
    return int(positions[np.argmax(weights) % len(positions)])


@each("position", [0, 1, 355, 103_993, 833_719, "hardest", 1_000_000, 2**28, 2**31 - 1])
def test_rotation_against_200_bits(executor, position):
    position = hardest_position() if position == "hardest" else position
    with mpmath.workprec(200):
        angles = [mpmath.mpf(f) * position for f in ROTARY.inv_freq]
        factor = mpmath.mpf(ROTARY.attention_factor)
        cos, sin = (np.array([float(function(a) * factor) for a in angles]) for function in (mpmath.cos, mpmath.sin))
    one, zero = np.ones(8), np.zeros(8)
    x = mx.array(np.stack([np.concatenate([one, zero]), np.concatenate([zero, one])])[None, None].astype(np.float32))
    want = np.stack([np.concatenate([cos, sin]), np.concatenate([-sin, cos])])[None, None]
    got = ops.rope(x, ROTARY.table(position, 1))
    if position <= 2**29:  # the angle is exact, so that each element is, however much it cancels
        assert selftest.ulp_error(got, want, mx.float32) <= 1.0
    assert selftest.ulp_error(got, want, mx.float32, selftest.pair_lengths(want)) <= selftest.LIMIT


@each("dtype", selftest.DTYPES, ids=str)
def test_pairs_are_within_two_ulp_of_their_length(executor, dtype):
    """Random pairs, and pairs of which one element cancels almost wholly."""
    rotary, generator = ops.Rotary.plain(16, 1e4), np.random.default_rng(3)
    positions = np.array([*generator.integers(1, 1_000_001, 60), 1_000_000])
    angles = positions[:, None] * np.array(rotary.inv_freq)
    cos, sin = np.cos(angles), np.sin(angles)
    first = np.linspace(1, 2, 256, endpoint=False)[:, None, None] * np.ones_like(cos)
    second = [np.clip(first * cos / sin, -1e3, 1e3), generator.standard_normal(first.shape)]
    x = mx.array(np.concatenate([np.tile(first, (2, 1, 1)), np.concatenate(second)], axis=-1)).astype(dtype)
    x = x.swapaxes(0, 1)[:, None]  # (positions, 1, heads, head_dim)
    a, b = np.split(selftest.to_float64(x), 2, axis=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    want = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    lengths = selftest.pair_lengths(want)
    assert np.median(np.abs(want[:, :, :256, :8]) / lengths[:, :, :256, :8]) < 2**-7
    right = ops.rope(x, rotary.table(positions, 1))
    assert selftest.ulp_error(right, want, dtype, lengths) <= selftest.LIMIT
    wrong = positions[:, None].astype(np.float32) * np.array(rotary.inv_freq, np.float32)  # angles of float32
    table = mx.array(np.stack([np.cos(wrong), np.sin(wrong)], axis=-1)[:, None])
    assert selftest.ulp_error(ops.rope(x, table), want, dtype, lengths) > selftest.LIMIT


def test_tables():
    rotary = ops.Rotary.yarn(64, 1e6, 4.0, 32768)
    table = rotary.table(70_000, 5)
    assert (table.shape, table.dtype) == ((1, 5, 32, 2), mx.float32)
    rows = rotary.table(np.array([70_000, -3], np.int32), 5)
    assert mx.array_equal(rows[:1], table)
    assert mx.array_equal(rows[1:, 3:], rotary.table(0, 2))
    assert np.array_equal(np.array(rotary.table(np.array([70_000]), 5)), np.array(table))


def test_a_table_known_only_when_evaluated():
    table, x = ops.Rotary.plain(64, 1e6).table(np.array([3, 70_000, 999_000]), 4), mx.random.normal((3, 4, 2, 64))
    compiled = mx.compile(ops.rope)(x, table)
    eager = ops.rope(x, table)
    assert selftest.ulp_error(compiled, selftest.to_float64(eager), mx.float32) <= 1


@each(
    ("parameters", "rotary"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, ops.Rotary.plain(64, 1e6)),
        ({"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}, ops.Rotary.plain(64, 1e4, 2.5)),
        (
            {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
            ops.Rotary.yarn(64, 1e6, 4.0, 32768),
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 3.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 4096,
                "attention_factor": 0.9,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
            ops.Rotary.yarn(64, 1e4, 3.0, 4096, 0.9, 16.0, 2.0),
        ),
    ],
)
def test_frequencies_are_those_of_transformers(parameters, rotary):
    config = transformers.Qwen2Config(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    embedding = modeling_qwen2.Qwen2RotaryEmbedding(config)
    # torch forms them in float32, up to 2 ulp off; ours are float64 values rounded once.
    np.testing.assert_allclose(rotary.inv_freq, embedding.inv_freq.double().numpy(), rtol=2.5 * 2**-23)
    assert rotary.attention_factor == pytest.approx(embedding.attention_scaling, rel=1e-12)


@each("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_rounding_order_is_that_of_transformers(executor, dtype):
    """The same bits as transformers; a rounding left out would change a tenth of them and more."""
    random = selftest._Random(5, dtype)
    x, weight = random(64, 896), random(896)
    norm = modeling_qwen2.Qwen2RMSNorm(896, EPS).to(torch_dtype(dtype))
    norm.weight.data = to_torch(weight)
    gate, up = random(64, 896, scale=2), random(64, 896)
    pairs = {
        "rms_norm": (ops.rms_norm(x, weight, EPS), norm(to_torch(x))),
        "swiglu": (ops.swiglu(gate, up), torch.nn.functional.silu(to_torch(gate)) * to_torch(up)),
        "add": (ops.add_rms_norm(x, gate, weight, EPS)[0], to_torch(x) + to_torch(gate)),
    }
    for name, (ours, theirs) in pairs.items():
        different = np.mean(selftest.to_float64(ours) != theirs.detach().double().numpy())
        assert different < 2e-3, name
    once = selftest.exact_swiglu(selftest.to_float64(gate), selftest.to_float64(up))
    rounded_once = mx.array(once.astype(np.float32)).astype(dtype)
    assert np.mean(selftest.to_float64(rounded_once) != selftest.to_float64(pairs["swiglu"][0])) > 0.1


@each("dtype", selftest.DTYPES, ids=str)
def test_extremes_are_what_torch_gives(executor, dtype):
    random = selftest._Random(9, dtype)
    x = selftest.extremes(random, 12, 96)
    other, weight = random(12, 96), random(96)
    norm = modeling_qwen2.Qwen2RMSNorm(96, EPS).to(torch_dtype(dtype))
    norm.weight.data = to_torch(weight)
    total = to_torch(x) + to_torch(other)
    config = transformers.Qwen2Config(
        hidden_size=96, num_attention_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    positions = torch.zeros(1, 1, dtype=torch.long)
    cos, sin = modeling_qwen2.Qwen2RotaryEmbedding(config)(to_torch(x), positions)
    turned, _ = modeling_qwen2.apply_rotary_pos_emb(to_torch(x)[None, :, None], to_torch(x)[None, :, None], cos, sin)
    pairs = {
        "rms_norm": (ops.rms_norm(x, weight, EPS), norm(to_torch(x))),
        "sums": (ops.add_rms_norm(x, other, weight, EPS)[0], total),
        "add_rms_norm": (ops.add_rms_norm(x, other, weight, EPS)[1], norm(total)),
        "swiglu": (ops.swiglu(x, other), torch.nn.functional.silu(to_torch(x)) * to_torch(other)),
        "rope": (ops.rope(x[None, None], ops.Rotary.plain(96, 1e4).table(0, 1)), turned.swapaxes(1, 2)),
    }
    for name, (ours, theirs) in pairs.items():
        got, want = selftest.to_float64(ours), theirs.detach().double().numpy()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=name)
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want), err_msg=name)
        number = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(want[number]), err_msg=name)
        finite = np.isfinite(want)
        tolerance = {mx.float32: 2**-21, mx.float16: 2**-9, mx.bfloat16: 2**-6}[dtype]
        np.testing.assert_allclose(got[finite], want[finite], rtol=tolerance, atol=1e-38, err_msg=name)
