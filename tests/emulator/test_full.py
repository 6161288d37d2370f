"""All cases of the self-test, large ones too, in the emulator: minutes, so only with -m slow."""

from __future__ import annotations

import pytest

from qwen_mlx.cli import selftest_cases as selftest
from reference.emulator import emulate

SETTINGS = {
    "everything, random": ({"order": "random", "seed": 7}, False),
    "small, forward": ({"order": "forward"}, True),
    "small, reverse": ({"order": "reverse"}, True),
    "small, contracted": ({"contract": True}, True),
}


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
