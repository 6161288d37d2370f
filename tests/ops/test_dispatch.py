"""Which executor runs, what it refuses, and what the CUDA compiler makes of every kernel."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from qwen_mlx import ops
from qwen_mlx.cli import selftest_cases as selftest
from qwen_mlx.cli import selftest_decoding
from qwen_mlx.cli.selftest import main
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.ops import dispatch
from reference.small_models import RandomModel, write_gguf
from tests.helpers.cases import each
from tests.helpers.decoding_calls import TILED, calls
from tests.helpers.nvrtc import compiled_kernels

ROTARY = ops.Rotary.plain(8, 1e4)
TABLE = ROTARY.table(0, 2)


def x(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


REFUSED = {
    "x is integer": (
        lambda: ops.rms_norm(x(2, 8, dtype=mx.int32), x(8), 1e-6),
        "x has shape .*int32, expected an array of float32",
    ),
    "x has no axis": (lambda: ops.rms_norm(mx.array(1.0), x(1), 1e-6), r"x has shape \(\)"),
    "weight too long": (lambda: ops.rms_norm(x(2, 8), x(9), 1e-6), r"weight has shape \(9,\).*expected \(8,\)"),
    "weight of another dtype": (
        lambda: ops.rms_norm(x(2, 8), x(8, dtype=mx.bfloat16), 1e-6),
        "weight .*bfloat16, expected .*float32",
    ),
    "residual of another shape": (
        lambda: ops.add_rms_norm(x(2, 8), x(1, 8), x(8), 1e-6),
        r"residual has shape \(1, 8\).*expected \(2, 8\)",
    ),
    "up of another shape": (lambda: ops.swiglu(x(2, 8), x(2, 7)), r"up has shape \(2, 7\).*expected \(2, 8\)"),
    "one bias": (lambda: ops.swiglu(x(2, 8), x(2, 8), x(8)), "give both or none"),
    "gate's bias": (lambda: ops.swiglu(x(2, 8), x(2, 8), x(7), x(8)), r"gate_bias has shape \(7,\).*expected \(8,\)"),
    "odd joined axis": (lambda: ops.swiglu_joined(x(2, 7)), r"gate_up has shape \(2, 7\).*even"),
    "joined bias": (lambda: ops.swiglu_joined(x(2, 8), x(4)), r"bias has shape \(4,\).*expected \(8,\)"),
    "three axes": (lambda: ops.rope(x(2, 3, 8), TABLE), r"x has shape \(2, 3, 8\), expected \(B, L, H, head_dim\)"),
    "odd head": (lambda: ops.rope(x(1, 2, 3, 7), TABLE), r"x has shape \(1, 2, 3, 7\), expected \(B, L, H, 8\)"),
    "negative offset": (lambda: ROTARY.table(-1, 2), "offset is -1"),
    "offsets of another batch": (
        lambda: ops.rope(x(2, 2, 3, 8), ROTARY.table(np.array([1, 2, 3]), 2)),
        r"table has shape \(3, 2, 4, 2\).*expected \(1 or 2, 2, head_dim / 2, 2\)",
    ),
    "offsets of floats": (
        lambda: ROTARY.table(np.array([1.0]), 2),
        r"offset is array\(\[1.\]\), expected an int, or a NumPy array",
    ),
    "offsets of MLX": (
        lambda: ROTARY.table(mx.array([1]), 2),
        r"offset is array\(\[1\], dtype=int32\), expected .* NumPy",
    ),
    "offsets in two axes": (
        lambda: ROTARY.table(np.ones((2, 1), int), 2),
        r"offset is array\(\[\[1\],\s+\[1\]\]\), expected",
    ),
    "offsets beyond int32": (
        lambda: ROTARY.table(np.array([1, 2**31 - 1]), 2),
        "offset is .*2147483647.*, expected -2147483646 to",
    ),
    "a table of another length": (lambda: ops.rope(x(1, 3, 3, 8), TABLE), r"table has shape \(1, 2, 4, 2\)"),
    "a table of float16": (lambda: ops.rope(x(1, 2, 3, 8), TABLE.astype(mx.float16)), "table .*float16, expected"),
    "width of qkv": (lambda: ops.qkv_rope(x(1, 2, 30), None, TABLE, 2, 1), r"qkv has shape \(1, 2, 30\).*32"),
    "x is None": (lambda: ops.rms_norm(None, x(8), 1e-6), "x is None, expected an array of float32"),
    "x is a list": (lambda: ops.swiglu_joined([1.0, 2.0]), "gate_up is of type list, expected an array"),
    "weight of numpy": (lambda: ops.rms_norm(x(2, 8), np.ones(8, np.float32), 1e-6), "weight is of type ndarray"),
    "no residual": (lambda: ops.add_rms_norm(x(2, 8), None, x(8), 1e-6), r"residual is None, expected \(2, 8\)"),
    "no up": (lambda: ops.swiglu(x(2, 8), None), r"up is None, expected \(2, 8\)"),
    "negative eps": (lambda: ops.rms_norm(x(2, 8), x(8), -1.0), "eps is -1.0, expected a number from 0"),
    "eps not a number": (lambda: ops.rms_norm(x(2, 8), x(8), float("nan")), "eps is nan"),
    "eps as text": (lambda: ops.add_rms_norm(x(2, 8), x(2, 8), x(8), "1e-6"), "eps is '1e-6'"),
    "offset beyond int32": (lambda: ROTARY.table(2**31 - 1, 2), "expected 0 to 2147483646 for 2"),
    "offset is True": (lambda: ROTARY.table(True, 2), "offset is True, expected an int"),
    "products without a norm": (
        lambda: ops.matvec_swiglu(x(64), selftest_decoding.matrix("affine4", 4, 64, mx.float32), None),
        "norm is None",
    ),
    "a product's eps": (
        lambda: ops.matvec(x(64), selftest_decoding.matrix("dense", 4, 64, mx.float32), (x(64), -1.0)),
        "eps is -1.0",
    ),
    "a format of other rows": (
        lambda: ops.matvec(x(64), ops.Matrix(ops.Packing("dense"), 5, 64, (x(4, 64),))),
        r"arrays have shapes \(\(4, 64\),\), expected \(\(5, 64\),\)",
    ),
    "a format of other groups": (
        lambda: ops.matvec(x(64), ops.Matrix(ops.Packing("affine", 4, 64), 4, 64, (x(4, 8), x(4, 2), x(4, 2)))),
        "arrays have shapes",
    ),
    "a format without rows": (
        lambda: ops.matvec(x(64), ops.Matrix(ops.Packing("dense"), 0, 64, (x(0, 64),))),
        "matrix has 0 rows",
    ),
    "ids that are no integers": (
        lambda: ops.unpack(selftest_decoding.matrix("affine4", 4, 64, mx.float32), mx.float32, x(2)),
        "ids has shape .* expected integers",
    ),
    "no table": (lambda: ops.rope(x(1, 2, 3, 8), None), r"table is None, expected \(1 or 1, 2, head_dim / 2, 2\)"),
    "no heads": (lambda: ops.qkv_rope(x(1, 2, 0), None, TABLE, 0, 0), "n_heads is 0 and n_kv_heads 0"),
    "heads below none": (lambda: ops.qkv_rope(x(1, 2, 32), None, TABLE, 6, -1), "n_kv_heads -1, expected positive"),
    "heads of floats": (lambda: ops.qkv_rope(x(1, 2, 32), None, TABLE, 2.0, 1), "n_heads is 2.0"),
    "theta of 0": (lambda: ops.Rotary.plain(8, 0.0), "theta is 0.0, expected a positive number"),
    "theta not a number": (lambda: ops.Rotary.plain(8, float("nan")), "theta is nan"),
    "factor of 0": (lambda: ops.Rotary.plain(8, 1e4, 0.0), "factor is 0.0"),
    "YaRN's theta": (lambda: ops.Rotary.yarn(8, 1.0, 4.0, 100), "theta is 1.0, expected more than 1"),
    "YaRN's context": (lambda: ops.Rotary.yarn(8, 1e4, 4.0, 0), "original_context is 0"),
    "huge factor": (lambda: ops.Rotary((0.1,), 1e39), r"attention_factor is 1e\+39, expected a positive number"),
    "infinite frequency": (lambda: ops.Rotary((float("inf"),)), "expected one or more finite numbers"),
    "frequencies in a list": (lambda: ops.Rotary([1.0]), "inv_freq is of type list, expected a tuple"),
    "head_dim as text": (lambda: ops.Rotary.plain("8", 1e4), "head_dim is '8', expected a positive even number"),
    "YaRN's beta": (lambda: ops.Rotary.yarn(8, 1e4, 4.0, 100, beta_fast=0), "beta_fast is 0"),
    "YaRN's factor": (lambda: ops.Rotary.yarn(8, 1e4, 4.0, 100, attention_factor=0), "attention_factor is 0"),
    "no frequency": (lambda: ops.Rotary(()), "expected one or more finite numbers"),
    "factors of another length": (lambda: ROTARY.divided(np.ones(3)), r"factors has shape \(3,\), expected 4 positive"),
    "bias of qkv": (lambda: ops.qkv_rope(x(1, 2, 32), x(8), TABLE, 2, 1), r"bias has shape \(8,\).*\(32,\)"),
}


@each("name", REFUSED)
@each("kind", ["reference", "metal"])
def test_wrong_arguments_are_refused_by_name_before_any_launch(name, kind):
    call, message = REFUSED[name]
    with ops.forced(kind), pytest.raises(ValueError, match=message):
        call()


def test_arrays_without_elements_launch_nothing():
    for kind in ("reference", "metal"):  # without a stand-in a launch would raise
        with ops.forced(kind):
            assert ops.rms_norm(x(2, 0), x(0), 1e-6).shape == (2, 0)
            assert ops.swiglu_joined(x(3, 0)).shape == (3, 0)
            assert ops.rope(x(2, 3, 0, 8), ROTARY.table(5, 3)).shape == (2, 3, 0, 8)
            assert ops.rope(x(2, 0, 2, 8), ROTARY.table(5, 0)).shape == (2, 0, 2, 8)
            assert [y.shape for y in ops.qkv_rope(x(0, 2, 32), None, TABLE, 2, 1)] == [(0, 2, 2, 8), (0, 2, 2, 1, 8)]


def test_odd_head_dim_has_no_frequencies():
    with pytest.raises(ValueError, match="head_dim is 7, expected"):
        ops.Rotary.plain(7, 1e4)


def test_the_cpu_runs_plain_mlx_without_numba_and_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "have_numba", lambda: False)
    assert ops.executor() == "reference"
    assert "the default device is the CPU; with numba" in ops.explain()
    with ops.forced("cuda"):
        assert ops.executor() == "cuda"
        assert "compiled as CUDA (forced)" in ops.explain()
    assert ops.executor() == "reference"


WITHOUT_NUMBA = """
import importlib.util
import sys

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name == "numba" else find(name, *package)
sys.modules["numba"] = None  # an import raises ImportError
from qwen_mlx import batch_generate, generate, load

model, tokenizer = load(sys.argv[1])
alone = generate(model, tokenizer, "hello", max_tokens=4, temperature=0)
together = batch_generate(model, tokenizer, ["hello", "a"], max_tokens=4, temperature=0)
assert together[0].text == alone, (together, alone)
"""


def test_nothing_needs_numba(tmp_path: Path):
    """One text and a batch, in a process that cannot import it."""
    path = write_gguf(tmp_path / "m.gguf", RandomModel(2), GGMLQuantizationType.Q8_0)
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not dispatch.have_numba(), reason="needs numba")
def test_the_cpu_runs_its_own_functions_and_says_so(monkeypatch):
    assert ops.executor() == "cpu"
    assert "compiled by numba, on" in ops.explain()
    assert "the default device is the CPU" in ops.explain()
    try:
        monkeypatch.setenv("QWEN_MLX_KERNELS", "off")
        dispatch.setting.cache_clear()
        assert ops.executor() == "reference"
    finally:
        monkeypatch.undo()
        dispatch.setting.cache_clear()


def test_kernels_can_be_switched_off_all_or_one_by_one(monkeypatch):
    gpu = mx.Device(mx.gpu)
    monkeypatch.setattr(mx, "default_device", lambda: gpu)

    def running(value: str) -> set[str]:
        monkeypatch.setenv("QWEN_MLX_KERNELS", value)
        dispatch.setting.cache_clear()
        return {part for part in dispatch.PARTS if ops.executor(part) == "cuda"}

    try:
        assert running("on") == set(dispatch.PARTS)
        assert ops.executor() == "cuda"
        for part in dispatch.PARTS:
            assert running(f"-{part}") == set(dispatch.PARTS) - {part}
        assert running("-step,-rope") == set(dispatch.PARTS) - {"step", "rope"}
        assert ops.executor() == "cuda"
        assert "but rope, step: plain MLX (QWEN_MLX_KERNELS)" in ops.explain()
        assert running("off") == set()
        assert ops.executor() == "reference"
        assert "QWEN_MLX_KERNELS=off" in ops.explain()
        for value in ("fast", "", "-fast", "step", "-step,", "off,-step"):
            with pytest.raises(QwenMLXError, match="expected on, off, or some of -step, -matvec"):
                running(value)
    finally:
        monkeypatch.undo()
        dispatch.setting.cache_clear()


def test_a_part_that_is_switched_off_launches_nothing(monkeypatch):
    launched: list[str] = []

    def cuda_kernel(name, **_):
        def launch(output_shapes, output_dtypes, **_):
            launched.append(name)
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return launch

    matrix = selftest_decoding.matrix("q4_k", 8, 256, mx.float32)
    part_calls = {
        "matvec": lambda: ops.matvec(x(1, 1, 256), matrix),
        "attend": lambda: ops.decode_attention(
            x(1, 2, 1, 64), x(1, 2, 32, 64), x(1, 2, 16, 64), mx.array([5, 3], mx.int32), 1.0
        ),
        "unpack": lambda: ops.unpack(matrix, mx.float32),
        "rms_norm": lambda: (ops.rms_norm(x(2, 8), x(8), 1e-6), ops.add_rms_norm(x(2, 8), x(2, 8), x(8), 1e-6)),
        "rope": lambda: (
            ops.rope(x(1, 2, 2, 8), TABLE),
            ops.qkv_rope(x(1, 2, 32), None, TABLE, 2, 1),
        ),
        "swiglu": lambda: (ops.swiglu(x(2, 8), x(2, 8)), ops.swiglu_joined(x(2, 16))),
        "best_token": lambda: ops.best_token(x(2, 8)),
        "matmul": lambda: ops.matmul(x(2, 32, dtype=mx.bfloat16), x(8, 32, dtype=mx.bfloat16)),
    }
    assert {"step", *part_calls} == set(dispatch.PARTS)
    gpu = mx.Device(mx.gpu)
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    for part, call in part_calls.items():
        for off, expected in (("step", True), (part, False)):
            launched.clear()
            monkeypatch.setattr(dispatch, "switched_off", lambda off=off: frozenset({off}))
            with ops.no_grad():
                call()
            assert bool(launched) == expected, (part, off)


@pytest.mark.linux  # where mx.compile has a compiler on the CPU
@pytest.mark.parametrize("dtype", selftest.DTYPES, ids=str)
def test_plain_mlx_on_a_gpu_is_what_it_is_on_the_cpu(monkeypatch, dtype):
    """As fused launches, which this machine's CPU compiles too."""
    random, table = selftest._Random(4, dtype), ops.Rotary.plain(16, 1e4).table(np.array([3, 70]), 5)
    heads, qkv, bias, gate, up = random(2, 5, 3, 16), random(2, 5, 64), random(64), random(3, 70), random(3, 70)

    def both() -> list[mx.array]:
        with ops.no_grad():
            return [ops.rope(heads, table), *ops.qkv_rope(qkv, bias, table, 2, 1), ops.swiglu(gate, up)]

    expected, gpu = both(), mx.Device(mx.gpu)
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    monkeypatch.setattr(dispatch, "switched_off", lambda: frozenset(dispatch.PARTS))
    got = both()
    for a, b in zip(got[:3], expected[:3], strict=True):
        assert mx.allclose(a, b, rtol=0, atol=2 * float(mx.finfo(dtype).eps) * float(mx.abs(b).max()))
    assert selftest.ulp_error(got[3], selftest.to_float64(expected[3]), dtype) <= 4


def test_rows_above_the_limit_are_computed_in_plain_mlx():
    with ops.forced("metal"):  # without a stand-in a launch would raise
        assert ops.rms_norm(x(1, 20_000), x(20_000), 1e-6).shape == (1, 20_000)
        mx.eval(ops.rms_norm(x(1, 20_000), x(20_000), 1e-6))
        with pytest.raises(RuntimeError, match="No Metal back-end"):
            mx.eval(ops.rms_norm(x(1, 16_384), x(16_384), 1e-6))


def test_every_kernel_compiles_as_cuda_with_16_byte_accesses():
    table = ops.Rotary.plain(64, 1e6).table(5, 3)
    calls = [
        lambda dtype: ops.rms_norm(x(3, 896, dtype=dtype), x(896, dtype=dtype), 1e-6),
        lambda dtype: ops.add_rms_norm(x(3, 896, dtype=dtype), x(3, 896, dtype=dtype), x(896, dtype=dtype), 1e-6),
        lambda dtype: ops.swiglu(x(3, 48, dtype=dtype), x(3, 48, dtype=dtype), x(48, dtype=dtype), x(48, dtype=dtype)),
        lambda dtype: ops.swiglu_joined(x(3, 96, dtype=dtype)),
        lambda dtype: ops.rope(x(1, 3, 2, 64, dtype=dtype), table),
        lambda dtype: ops.qkv_rope(x(1, 3, 256, dtype=dtype), x(256, dtype=dtype), table, 2, 1),
        lambda dtype: ops.qkv_rope(x(1, 3, 256, dtype=dtype), None, table, 2, 1),
    ]
    for dtype in selftest.DTYPES:
        for call in calls:
            with compiled_kernels() as ptx, ops.no_grad():
                call(dtype)
            assert len(ptx) == 1
            # No array went to local memory, and packs are read and written whole.
            assert ".local" not in ptx[0]
            assert "ld.global" in ptx[0]
            assert ".v4" in ptx[0].split("ld.global", 1)[1]
            assert any(line.strip().startswith(("st.global.v4", "@%p st.global.v4")) for line in ptx[0].splitlines())


@pytest.mark.parametrize("dtype", [pytest.param(mx.float32, marks=pytest.mark.slow), mx.float16, mx.bfloat16], ids=str)
def test_every_kernel_of_a_decoding_step_compiles_as_cuda(dtype):
    optimized = dtype != mx.float16  # whose kernels are bfloat16's but for the numbers' conversions
    for name, call in calls(dtype).items():
        with compiled_kernels(optimized) as ptx, ops.no_grad():
            call()
        # Attention of a long context and the likeliest token join their parts in a launch of its own, products with
        # packed rows too, which arrange their vectors first.
        launches = {"attend_split": 2, "best_token": 2, "multiply": 3}.get(name.split()[0].rstrip(","), 1)
        assert len(ptx) == launches, name
        assert not optimized or not any(".local" in text for text in ptx), name


@pytest.mark.parametrize("form", TILED)
def test_tiles_wait_for_what_they_copy(form):
    """The emulator copies at once: that a stage is waited for shows in the instructions only, and on a GPU."""
    with compiled_kernels() as ptx, ops.no_grad():
        calls(mx.bfloat16)[f"matvec {form}, long, tiles"]()
    kinds = {"cp.async.commit": "end", "cp.async.wait_group 0": "wait", "bar.warp": "barrier", "mma": "product"}
    lines = [line.strip() for line in ptx[-1].splitlines()]
    order = " ".join(kind for line in lines for start, kind in kinds.items() if line.startswith(start))
    # Twice: where the arrays lie at 16 bytes, and where not.
    assert re.fullmatch(r"((end )+wait barrier end( product)+ ?){2}", order), order
    assert any(line.startswith("cp.async.cg") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", selftest.DTYPES, ids=str)
def test_every_case_of_the_self_test_compiles_as_cuda(dtype):
    """The kernels of the tests above in other sizes."""
    launches = 0
    for case in (case for case in selftest.cases() if case.dtype == dtype):
        with compiled_kernels(optimized=False) as ptx, ops.no_grad():
            case.compute()
        launches += len(ptx)
    assert launches > 100


@pytest.mark.parametrize("dtype", selftest.DTYPES, ids=str)
def test_odd_sizes_compile_as_cuda(dtype):
    with compiled_kernels() as ptx, ops.no_grad():
        ops.rms_norm(x(3, 897, dtype=dtype), x(897, dtype=dtype), 1e-6)
        ops.swiglu(x(3, 7, dtype=dtype), x(3, 7, dtype=dtype))
        for head_dim in (2, 4, 6, 80, 96):
            table = ops.Rotary.plain(head_dim, 1e6).table(5, 3)
            ops.rope(x(1, 3, 2, head_dim, dtype=dtype), table)
            ops.qkv_rope(x(1, 3, 4 * head_dim, dtype=dtype), x(4 * head_dim, dtype=dtype), table, 2, 1)
    assert len(ptx) == 12


def test_a_kernel_that_does_not_compile_fails_the_test_of_it(tmp_path, monkeypatch):
    folder = tmp_path / "metal"
    shutil.copytree(dispatch.SOURCES, folder)
    body = folder / "rms_norm.metal"
    body.write_text(body.read_text().replace("as_type<float>(EPS)", "as_types<float>(EPS)"))
    line = body.read_text().partition("as_types")[0].count("\n") + 1
    monkeypatch.setattr(dispatch, "SOURCES", folder)
    with compiled_kernels(), ops.no_grad(), pytest.raises(AssertionError, match=rf"rms_norm.metal\({line}\).*as_types"):
        ops.rms_norm(x(3, 32), x(32), 1e-6)


def test_every_metal_launch_is_legal_whatever_registers_it_takes(monkeypatch):
    """Apple's GPUs run 384 threads in a threadgroup of any kernel, and more of those that take few registers."""
    launched: dict[str, int] = {}

    def metal_kernel(name, **_):
        def launch(threadgroup, output_shapes, output_dtypes, **_):
            launched[name] = max(launched.get(name, 0), math.prod(threadgroup))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return launch

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    with ops.forced("metal"), ops.no_grad():
        for dtype in selftest.DTYPES:
            for call in calls(dtype).values():
                call()
            for _, call in selftest_decoding.calls(dtype, False):
                call()
            for width in (1, 96, 897, 3584, 8192, 16384):
                ops.rms_norm(x(2, width, dtype=dtype), x(width, dtype=dtype), 1e-6)
                ops.add_rms_norm(*[x(2, width, dtype=dtype)] * 2, x(width, dtype=dtype), 1e-6)
                ops.swiglu_joined(x(2, 2 * width, dtype=dtype))
            ops.rope(x(1, 3, 40, 128, dtype=dtype), ops.Rotary.plain(128, 1e6).table(5, 3))
            ops.qkv_rope(x(1, 3, 4096, dtype=dtype), None, ops.Rotary.plain(128, 1e6).table(5, 3), 24, 4)
    assert max(launched.values()) == launched["qwen_rms_norm"] <= 384, launched
    assert {name.split("_")[1] for name in launched} >= {
        "matvec",
        "decode",
        "combine",
        "best",
        "unpack",
        "rope",
        "swiglu",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No kernel to test: the default device is the CPU. Run it on a Mac"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--json", "nowhere/x.json"], "--json is nowhere/x.json"),
    ],
)
def test_selftest_needs_a_gpu(arguments: list[str], message: str):
    with pytest.raises(QwenMLXError, match=message):
        main(arguments)
