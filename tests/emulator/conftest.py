"""Where the emulator cannot run its tests are skipped, and the summary says so; in CI they fail instead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reference.emulator import unavailable


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (reason := unavailable()) and not os.environ.get("CI"):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))
