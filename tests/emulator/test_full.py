"""All cases of the self-test, large ones too, in the emulator: minutes, so only with -m slow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qwen_mlx import ops
from qwen_mlx.cli import selftest_cases as selftest
from reference.emulator import emulate

SETTINGS = {
    "everything, random": ({"order": "random", "seed": 7}, False),
    "small, forward": ({"order": "forward"}, True),
    "small, reverse": ({"order": "reverse"}, True),
    "small, contracted": ({"contract": True}, True),
}


@pytest.mark.slow
def test_every_case_is_right_as_an_apple_gpu_computes(monkeypatch):
    """Subnormal numbers are flushed, products and sums contracted, and no threadgroup has more than 384 threads."""
    monkeypatch.setattr(selftest, "sys", SimpleNamespace(platform="darwin"))
    cases = [*selftest.cases(True), *(c for dtype in selftest.DTYPES for c in selftest.decoding_cases(dtype, True))]
    with emulate(checked=False, contract=True, flush=True, max_threads=384), ops.no_grad():
        wrong = [row for row in selftest.run([c for c in cases if "gradient" not in c.name]) if not row["ok"]]
    assert wrong == []
    assert len(cases) >= 270


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_every_case_is_within_its_limit(name):
    options, small = SETTINGS[name]
    count = 0
    with emulate(**options):
        for case in selftest.cases(small):
            assert case.error(case.compute()) <= selftest.LIMIT, (case.name, case.dtype)
            count += 1
    assert count >= 140
