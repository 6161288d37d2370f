"""Who computes the operations in a test: plain MLX, or the Metal kernels in the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qwen_mlx import ops


@pytest.fixture(params=["reference", pytest.param("emulated", marks=pytest.mark.emulator)])
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once in plain MLX and once on the emulated kernels."""
    if request.param == "reference":
        with ops.forced("reference"):
            yield request.param
        return
    from reference.emulator import emulate

    with emulate():
        yield request.param
