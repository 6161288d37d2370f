"""The checks are checked: every seeded defect is seen, and every kernel without it passes."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import ops
from qwen_mlx.cli import selftest_cases as selftest
from qwen_mlx.ops import dispatch
from reference.emulator import CompileError, OutOfBounds, emulate, lint, standin
from tests.helpers import seeded_decoding
from tests.helpers.cases import each
from tests.helpers.decoding_calls import calls
from tests.helpers.seeded import EDITS, Edit, WrongNumbers, case_inputs
from tests.helpers.seeded_small import SMALL, Small

DECODING = calls(mx.bfloat16)
CASES = case_inputs() | DECODING
# name: the call that must fail, and the change
DEFECTS = {name: (name.split()[0].rstrip(":"), edit) for name, edit in EDITS.items()} | seeded_decoding.EDITS


def copied_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a copy of the shipped kernels, which the operations then use."""
    folder = tmp_path / "metal"
    shutil.copytree(dispatch.SOURCES, folder)
    monkeypatch.setattr(dispatch, "SOURCES", folder)
    monkeypatch.setattr(dispatch, "_compiled", functools.cache(dispatch._compiled.__wrapped__))
    return folder


def compare(name: str) -> None:
    """Runs a shipped kernel in the emulator. Raises WrongNumbers unless it is within an ulp of plain MLX.

    RoPE's ulp is that of each pair's length: see selftest.pair_lengths. That of products with packed rows, whose plain
    form rounds the values, is that of the largest element.
    """
    with emulate(seed=1), ops.no_grad():
        got = CASES[name]()
    want = CASES[name]()
    for a, b in zip(got, want):
        if b.dtype == mx.int32:
            error = 0.0 if a.tolist() == b.tolist() else float("inf")
        else:
            exact = selftest.to_float64(b)
            size = selftest.pair_lengths(exact) if name in ("rope", "qkv_rope") else None
            if name.startswith("multiply"):
                size = np.full_like(exact, np.abs(exact).max())
            error = selftest.ulp_error(a, exact, b.dtype, size)
        different = mx.mean(a != b).item()
        exactly = b.dtype != mx.float32 and not name.startswith("multiply")
        if error > 1 or (different > 0.002 and exactly):  # which has no digits to spare
            raise WrongNumbers(f"{name}: {error} ulp, {different:.1%} of the elements differ")


# tests/ops has the products of every format.
SPOILT = {call for call, _ in seeded_decoding.EDITS.values()}
PLAIN = [name for name in CASES if name in SPOILT or not re.fullmatch(r"(matvec|unpack)\w* \w+", name)]


@pytest.mark.slow
@each("name", PLAIN)
def test_shipped_kernels_pass(name):
    """The tests of operations and of decoding steps run them with every check, too."""
    compare(name)


@each("name", [name for name, (_, edit) in DEFECTS.items() if edit.caught_by is not WrongNumbers])
def test_defects_that_a_check_sees(tmp_path, monkeypatch, name):
    with_defect(copied_kernels(tmp_path, monkeypatch), *DEFECTS[name])


@pytest.mark.slow
@each("name", [name for name, (_, edit) in DEFECTS.items() if edit.caught_by is WrongNumbers])
def test_defects_that_only_numbers_show(tmp_path, monkeypatch, name):
    """The emulator's checks have no part in these: tests/mutate.py draws such lines from every kernel."""
    with_defect(copied_kernels(tmp_path, monkeypatch), *DEFECTS[name])


def with_defect(kernels: Path, name: str, edit: Edit) -> None:
    text = (kernels / edit.file).read_text()
    assert edit.old in text, "the kernel has changed: adapt the defect"
    (kernels / edit.file).write_text(text.replace(edit.old, edit.new))
    with pytest.raises(edit.caught_by):
        compare(name)


LINES = {
    "prelude": ("metal_prelude.h", "pack.v[k] = float(from[index + uint(k)]);"),
    "header": ("rms.h", "const float mean = sum / count;"),
    "threadgroup memory": ("matvec.metal", "threadgroup float partial[THREADS / SIMD_WIDTH * R];"),
    "body": ("matvec.metal", "const uint row = unit * uint(R) + lane;"),
}


@each("part", LINES)
def test_an_error_names_the_file_and_the_line(tmp_path, part, monkeypatch):
    kernels, (file, line) = copied_kernels(tmp_path, monkeypatch), LINES[part]
    text = (kernels / file).read_text()
    assert text.count(line) == 1
    (kernels / file).write_text(text.replace(line, f"{line} undefined_name;"))
    number = text.partition(line)[0].count("\n") + 1
    ran: list[str] = []
    monkeypatch.setattr(standin, "on_text", lambda source: ran.append(source.text))
    with pytest.raises(CompileError, match=rf"qwen_mlx/metal/{file}:{number}:.*undefined_name"):
        compare("matvec dense")
    assert any(f.part == f"qwen_mlx/metal/{file}" and f.line == number for f in lint(ran[-1])), lint(ran[-1])


def test_a_fault_names_the_file_and_the_line(tmp_path, monkeypatch):
    kernels = copied_kernels(tmp_path, monkeypatch)
    text = (kernels / "rms.h").read_text()
    (kernels / "rms.h").write_text(text.replace("partial[simd] = sum;", "partial[simd + 1000u] = sum;"))
    number = text.partition("partial[simd] = sum;")[0].count("\n") + 1
    with pytest.raises(OutOfBounds, match=rf"qwen_mlx/metal/rms.h line {number} \(`partial\[simd \+ 1000u\] = sum;"):
        compare("matvec dense")


def run(case: Small, source: str, **options) -> mx.array:
    with emulate(**options):
        kernel = mx.fast.metal_kernel(name="small", input_names=["x"], output_names=["y"], source=source)
        return kernel(
            inputs=[mx.arange(case.size, dtype=mx.float32)],
            grid=(case.grid, 1, 1),
            threadgroup=(case.threadgroup, 1, 1),
            output_shapes=[(case.outputs,)],
            output_dtypes=[mx.float32],
            **case.options,
        )[0]


@each("name", SMALL)
def test_defects_of_small_kernels_are_seen(name):
    case: Small = SMALL[name]
    for order in ("forward", "reverse", "random"):
        with pytest.raises(case.caught_by, match=case.message):
            run(case, case.wrong, order=order)
        run(case, case.right, order=order)


def test_there_are_enough():
    assert len(DEFECTS) + len(SMALL) >= 25
