"""Refusals: kernels that do not end, end Python, or take too much, and calls that Metal refuses, instead of a hang or a
wrong result.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from qwen_mlx import ops
from reference.emulator import (
    CompileError,
    InvalidLaunch,
    OutOfBounds,
    Runaway,
    Unavailable,
    UndefinedBehaviour,
    build,
    emulate,
    metal_kernel,
)
from tests.helpers.cases import each
from tests.helpers.launching import I, run

ROOT = Path(__file__).parents[2]

ENDLESS = {
    "an empty loop": "while (true) {}",
    "a loop whose counter nobody reads": "for (uint k = 0; true; ++k) {}",
    "a jump to itself": "here: goto here;",
}


@each("checked", [True, False])
@each("name", ENDLESS)
def test_a_thread_that_stands_still_is_a_runaway(name, checked):
    """The compiler counts no steps in a block without instructions."""
    body = I + f"if (i == 5u) {{\n{ENDLESS[name]}\n}}\ny[i] = x[i];"
    with pytest.raises(Runaway, match=r"body line 2 .*thread \(5, 0, 0\) of .* does not end"):
        run(body, {"x": mx.zeros((8,))}, {"y": ((8,), mx.float32)}, (8, 1, 1), (8, 1, 1), checked=checked)


ENDINGS = {
    "a trap": ("__builtin_trap();", UndefinedBehaviour, "body line 2 .* executes what ends a program"),
    "abort": ("__builtin_abort();", UndefinedBehaviour, "executes what ends a program"),
    "no instruction": ('asm("ud2");', UndefinedBehaviour, "body line 2 .* executes what ends a program"),
    "recursion": ("y[0] = deeper(x[0]);", OutOfBounds, "header line 1 .* needs more than 256 KiB of stack"),
}


@each("name", ENDINGS)
def test_what_would_end_python_is_an_error(name):
    statement, error, message = ENDINGS[name]
    header = "inline float deeper(float a) { return a > 1e30f ? a : deeper(a + 1.0f) + 1.0f; }\n"
    with pytest.raises(error, match=message):
        run(f"\n{statement}\n", {"x": mx.zeros((1,))}, {"y": ((1,), mx.float32)}, header=header, init_value=0)


def test_a_long_launch_can_be_interrupted():
    """It runs a quarter of a second at a time: in between, Python's signals are heard."""
    code = (
        "import _thread, threading, mlx.core as mx\n"
        "from reference.emulator import emulate, metal_kernel\n"
        "body = 'if (thread_position_in_grid.x == 0u) y[0] = 1.0f;'\n"
        "threading.Timer(1.0, _thread.interrupt_main).start()\n"
        "with emulate(order='forward'):\n"
        "    metal_kernel('k', [], ['y'], body)(inputs=[], grid=(2**31, 1, 1), threadgroup=(1, 1, 1),\n"
        "        output_shapes=[(1,)], output_dtypes=[mx.float32])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"


def test_a_text_that_takes_too_much_to_compile(monkeypatch):
    bomb = "\n".join(f"#define A{n} A{n + 1} A{n + 1} A{n + 1} A{n + 1}" for n in range(40)) + "\n#define A40 + 1.0f\n"
    limits = [part.replace("4194304", "400000") for part in build.LIMITED]
    monkeypatch.setattr(build, "LIMITED", limits)
    with pytest.raises(CompileError, match="memory"):
        run("y[0] = x[0] A0;", {"x": mx.zeros((1,))}, {"y": ((1,), mx.float32)}, header=bomb)


REFUSED = {
    "empty grid": ({"grid": (0, 1, 1)}, r"kernel k: grid is \(0, 1, 1\), expected three positive integers"),
    "negative grid": ({"grid": (-1, 1, 1)}, "grid is"),
    "two sizes": ({"grid": (1, 1)}, r"grid is \(1, 1\), expected three positive integers"),
    "a number": ({"grid": 64}, "grid is 64"),
    "fractions": ({"grid": (1.0, 1, 1)}, "grid is"),
    "no threads": ({"threadgroup": (1, 0, 1)}, "threadgroup is"),
    "2048 threads": ({"threadgroup": (2048, 1, 1)}, "has 2048 threads, Metal allows at most 1024"),
    "2^32 threads": ({"grid": (2**30, 4, 1), "threadgroup": (1024, 1, 1)}, r"has 2\^32 threads or more"),
}


@each("name", REFUSED)
def test_launches_that_metal_refuses(name):
    sizes, message = REFUSED[name]
    with pytest.raises(InvalidLaunch, match=message):
        run("y[0] = x[0];", {"x": mx.zeros((1,))}, {"y": ((1,), mx.float32)}, **sizes)


REFUSED_CALLS = {
    "name": ({"name": 'k"; system("true'}, {}, "kernel name .*expected letters, digits and _"),
    "input": ({"input_names": ["x), int z(0"]}, {}, "names an array, expected a name of"),
    "template name": ({}, {"template": [("T> void f() {} template <int N", 1)]}, "expected a name with a bool"),
    "template text": ({}, {"template": [("T", "float")]}, "template has .'T', 'float'."),
    "template float": ({}, {"template": [("N", 1.5)]}, "an int of 32 bits"),
    "template of 64 bits": ({}, {"template": [("N", 2**40)]}, "an int of 32 bits"),
    "template dtype": ({}, {"template": [("T", mx.float64)]}, "a dtype of Metal"),
    "float64": ({}, {"output_dtypes": [mx.float64]}, "y is float64, which Metal does not have"),
    "negative size": ({}, {"output_shapes": [(-5,)]}, r"output shape \(-5,\)"),
    "100 GB": ({}, {"output_shapes": [(25_000_000_000,)]}, "1,800,000,000,000 bytes"),
}


@each("name", REFUSED_CALLS)
def test_calls_that_are_refused(name):
    making, calling, message = REFUSED_CALLS[name]
    kernel = metal_kernel(
        **{"name": "k", "input_names": ["x"], "output_names": ["y"], "source": "y[0] = 0.0f;"} | making
    )
    call = {"inputs": [mx.zeros((1,))], "grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    call |= {"output_shapes": [(1,)], "output_dtypes": [mx.float32]} | calling
    with emulate(), pytest.raises(Unavailable if name == "100 GB" else InvalidLaunch, match=message):
        kernel(**call)


def test_too_many_buffers_and_wrong_numbers():
    inputs = {f"x{i}": mx.zeros((1,)) for i in range(31)}
    with pytest.raises(InvalidLaunch, match="has 32 buffers, Metal allows 31"):
        run("y[0] = 0.0f;", inputs, {"y": ((1,), mx.float32)})
    with pytest.raises(ValueError, match="order is 'sideways'"), emulate(order="sideways"):
        pass


def test_the_signature_mlx_gets_wrong_does_not_compile():
    """Shapes, two outputs and no attribute: MLX ends the parameters after the first output."""
    outputs = {"y": ((1,), mx.float32), "z": ((1,), mx.float32)}
    with pytest.raises(CompileError, match="signature"):
        run("y[0] = float(x_shape[0]); z[0] = 1.0f;", {"x": mx.zeros((9,))}, outputs)


def test_within_compile_it_says_what_is_missing():
    with emulate(), pytest.raises(Unavailable, match=r"cannot run within mx\.compile"):
        mx.compile(lambda x: ops.rms_norm(x, mx.ones((32,)), 1e-6))(mx.ones((2, 32)))
