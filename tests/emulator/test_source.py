"""The emulator's text against what MLX itself prints, byte for byte."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable

import mlx.core as mx
import pytest

from qwen_mlx import ops
from reference.emulator import InvalidLaunch, metal_kernel, metal_source, source
from tests.helpers import shipped
from tests.helpers.cases import each

MLX_KERNEL = mx.fast.metal_kernel
DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.int8, mx.uint8, mx.int32, mx.uint64, mx.bool_, mx.complex64)
ATTRIBUTES = tuple(source.ATTRIBUTES)


def printed_by_mlx(call: Callable[..., list[mx.array]], arrays: list[mx.array]) -> list[str]:
    """The texts MLX prints on the C++ side's standard output while it traces `call`."""
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as folder:
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            mx.export_function(f"{folder}/traced.mlxfn", call, *arrays)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        file.seek(0)
        output = file.read().decode()
    return [part.split("```\n", 1)[1].split("\n```\n", 1)[0] for part in output.split("Generated source code for ")[1:]]


def both(
    arguments: dict, arrays: list[mx.array], scalars: list, dtypes: list[mx.Dtype], template: list
) -> tuple[str, str]:
    """The text of one kernel from MLX and from the emulator."""
    kernel = MLX_KERNEL(**arguments)

    def call(*inputs: mx.array) -> list[mx.array]:
        shapes = [(2,)] * len(dtypes)
        launch = {"grid": (2, 1, 1), "threadgroup": (2, 1, 1), "output_shapes": shapes, "output_dtypes": dtypes}
        return kernel(inputs=[*inputs, *scalars], template=template, verbose=True, **launch)

    (theirs,) = printed_by_mlx(call, arrays)
    return theirs, metal_source(metal_kernel(**arguments), [*arrays, *scalars], dtypes, template)


@each("seed", range(40))
def test_synthetic_kernels(seed):
    choose = random.Random(seed)
    shapes = [(), (7,), (8,), (1,), (2, 4), (0, 3), (3, 1, 2), (1, 1, 1, 9), (2, 3, 2)]
    arrays = [mx.zeros(choose.choice(shapes)).astype(choose.choice(DTYPES)) for _ in range(choose.randint(0, 4))]
    scalars = [choose.choice([3, 2.5, True, -1]) for _ in range(choose.randint(0, 2))]
    inputs = [f"x{i}" for i in range(len(arrays) + len(scalars))]
    outputs = [f"y{i}" for i in range(choose.randint(1, 3))]
    words = [f"{name}_{kind}" for name in inputs + outputs for kind in ("shape", "strides", "ndim")] + list(ATTRIBUTES)
    used = choose.sample(words, choose.randint(0, 6))
    template = [
        ("T", choose.choice(DTYPES)),
        ("N", choose.choice([0, 7, -3, 2**31 - 1])),
        ("B", choose.choice([True, False])),
    ]
    theirs, ours = both(
        {
            "name": choose.choice(["k", "kernel_2", "a b"]),
            "input_names": inputs,
            "output_names": outputs,
            "source": f"// {' '.join(used)}\n",
            "header": choose.choice(["", "#define A 1\n", "inline float f() { return 1.0f; }"]),
            "atomic_outputs": choose.choice([True, False]),
        },
        arrays,
        scalars,
        [choose.choice(DTYPES) for _ in outputs],
        choose.sample(template, choose.randint(0, 3)),
    )
    assert ours == theirs


@each("attribute", ATTRIBUTES)
def test_each_attribute(attribute):
    arguments = {"name": "k", "input_names": ["x"], "output_names": ["y"], "source": f"uint i = {attribute};"}
    theirs, ours = both(arguments, [mx.zeros((9,))], [], [mx.float32], [])
    assert ours == theirs
    assert f"{attribute} [[{attribute}]]" in ours


@each("index", range(len(shipped.calls())), ids=shipped.names())
def test_shipped_kernels(index, monkeypatch):
    """MLX's print of the kernels as ops launches them, against what the emulator ran for the same call."""
    name, call, arrays = shipped.calls()[index]

    def verbose(**arguments):
        kernel = MLX_KERNEL(**arguments)
        return lambda **launch: kernel(**launch, verbose=True)

    with monkeypatch.context() as patch, ops.forced("metal"), ops.no_grad():
        patch.setattr(mx.fast, "metal_kernel", verbose)
        theirs = printed_by_mlx(lambda *x: call(*x), arrays)
    assert theirs == [shipped.texts()[index]]
    assert f"custom_kernel_qwen_{name}_" in theirs[0]


def test_a_changed_text_is_seen():
    arguments = {"name": "k", "input_names": ["x"], "output_names": ["y"], "source": "y[0] = x[0];"}
    theirs, ours = both(arguments, [mx.zeros((7,))], [], [mx.float32], [])
    other = metal_source(metal_kernel(**arguments), [mx.zeros((8,))], [mx.float32])
    assert ours == theirs != other


def test_the_preamble_is_the_installed_mlx_s():
    kernel = metal_kernel("k", ["x"], ["y"], "y[0] = x[0];")
    text = metal_source(kernel, [mx.zeros((8,))], [mx.float32], with_preamble=True)
    assert (
        text.index("typedef bfloat bfloat16_t") < text.index("struct complex_t") < text.index("struct LoopedElemToLoc")
    )
    assert '#include "mlx' not in text


def test_wrong_numbers_of_arguments_and_text_outside_ascii_are_refused():
    kernel = metal_kernel("k", ["x"], ["y"], "y[0] = x[0];")
    with pytest.raises(InvalidLaunch, match="kernel k: inputs has 2 entries, expected 1"):
        kernel.text([mx.zeros((1,))] * 2, [mx.float32])
    with pytest.raises(InvalidLaunch, match="output_dtypes has 0 entries"):
        kernel.text([mx.zeros((1,))], [])
    with pytest.raises(InvalidLaunch, match="source is not ASCII"):
        metal_kernel("k", ["x"], ["y"], "y[0] = x[0]; // \u00e9")
    with pytest.raises(InvalidLaunch, match="output_names is empty"):
        metal_kernel("k", ["x"], [], "")
