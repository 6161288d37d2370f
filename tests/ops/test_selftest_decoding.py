"""The self-test's cases of decoding, in the emulator; and the measure sees what is wrong."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qwen_mlx import ops
from qwen_mlx.cli import selftest_cases as selftest
from qwen_mlx.cli.selftest_decoding import FORMATS
from reference.emulator import emulate
from tests.helpers.cases import each
from tests.helpers.decoding_calls import tiles


@pytest.mark.parametrize("checked", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["numbers", "accesses"])
def test_every_case_is_within_its_limit(checked: bool):
    """tests/ops/test_matvec.py and others check the same kernels' accesses."""
    with emulate(checked=checked), ops.no_grad():
        rows = selftest.run(list(selftest.decoding_cases(mx.float16, small=True)))
    for row in rows:
        assert row["ok"], row
    # Products; five packings unpacked; long rows, two with a norm; few rows, dense and packed; attention of four kinds;
    # the best token.
    assert len(rows) == 4 * len(FORMATS) + 2 * 5 + 6 + 2 + 2 + 2 * 3 + 4 + 1


@pytest.mark.parametrize("dtype", [pytest.param(mx.float16, marks=pytest.mark.slow), mx.bfloat16], ids=str)
def test_long_rows_as_tiles(dtype):
    """As NVIDIA's GPUs compute them: several stages a simdgroup, all sizes of groups, a stage that ends early."""
    with emulate(checked=False), tiles():
        rows = selftest.run([c for c in selftest.decoding_cases(dtype, small=True) if ", rows of" in c.name])
    assert len(rows) == 6 + 2
    for row in rows:
        assert row["ok"], row


@each("break_it", ["element", "nan", "shape", "dtype", "number"])
def test_the_measure_sees_what_is_wrong(break_it):
    case = next(case for case in selftest.decoding_cases(mx.bfloat16, small=True) if "q4_k, norm" in case.name)
    right = case.compute()[0]
    first = mx.arange(right.size) == 0
    wrong = {
        "element": lambda: [mx.where(first, right + 0.05 * mx.abs(right).max(), right)],
        "nan": lambda: [mx.where(first, mx.array(float("nan"), right.dtype), right)],
        "shape": lambda: [right[..., 1:]],
        "dtype": lambda: [right.astype(mx.float16)],
        "number": lambda: [right, right],
    }[break_it]()
    assert case.error([right]) <= selftest.LIMIT < case.error(wrong)
