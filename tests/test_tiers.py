"""The tiers: what a test needs is read from its source, and the fast tier and a Mac select accordingly."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers import needs
from tests.helpers.cases import each

CODE = """
import sys, pytest
status = pytest.main(["--co", "-q", "-p", "no:cacheprovider", *sys.argv[1:]])
assert status == 0, status
assert "--fast" not in sys.argv or not {"torch", "transformers", "mlx_lm"} & sys.modules.keys()
"""
GOLDEN = "test_stored_models_and_results_are_what_transformers_gives_today"


@each(
    ("file", "function", "expected"),
    [
        ("model/test_golden.py", "test_logits_equal_stored_ones_of_transformers", set()),
        ("model/test_golden.py", GOLDEN, {"torch"}),
        ("model/test_model.py", "test_logits_equal_transformers", {"torch"}),
        ("emulator/test_launch.py", "test_attributes", {"emulator"}),
        ("test_architecture.py", "test_no_circle", set()),
        ("gguf/test_reader.py", "test_agrees_with_gguf_py_on_every_value_type", set()),
    ],
)
def test_what_a_test_needs(file: str, function: str, expected: set[str]):
    assert needs.of_test(needs.ROOT / "tests" / file, function) == expected


def collect(*options: str) -> list[str]:
    """Names of the tests that are selected, in a fresh process."""
    command = [sys.executable, "-c", CODE, *options]
    done = subprocess.run(command, cwd=needs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.heavy
def test_xdist_keeps_a_file_s_tests_in_one_process():
    files = ["tests/test_cases.py", "tests/model/test_ids.py", "tests/text/test_thoughts.py"]
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider", *files]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=needs.ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = set(re.findall(r"\[(gw\d)\] .*PASSED (\S+)::", done.stdout))
    assert sorted(file for _, file in ran) == sorted(files), ran


@pytest.mark.heavy
def test_the_fast_tier_is_collected_without_torch():
    names = collect("--fast")
    assert len(names) > 500
    assert not [name for name in names if name.startswith("tests/emulator/")]


@pytest.mark.heavy
@pytest.mark.linux
def test_a_mac_selects_no_test_of_the_emulator_or_of_linux():
    names = collect("--as-macos", *(f"tests/{room}" for room in ("emulator", "ops", "model", "parallel")))
    assert len(names) > 150
    of_linux = "tests/parallel/test_control.py::test_a_rank_that_has_died_is_not_killed_again"
    assert not [name for name in names if "[emulated" in name or name.startswith(("tests/emulator/", of_linux))]
