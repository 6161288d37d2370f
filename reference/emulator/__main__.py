"""Checks and runs the body of a Metal kernel, as mx.fast.metal_kernel takes it, on a CPU.

Lints the text that MLX would compile, runs it in three orders of threads under all checks, and compares the results.

    python -m reference.emulator scale.metal --input x=float32[3,64] --input factor=2.5 --output y=float32[3,64] \\
        --grid 192,1,1 --threadgroup 64,1,1 --template T=float32 --template N=4 --header helpers.h

An input is NAME=DTYPE[SHAPE] (normal deviates, or 0, 1, 2, ... for integers), NAME=@FILE.npy, or NAME=NUMBER, which has
no axis. Exit status: 0 nothing found, 1 findings, 2 a mistake in the arguments.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwen_mlx.backend import mx

from . import EmulatorError, Unavailable, emulate, lint, metal_kernel, metal_source

_ORDERS = ("forward", "reverse", "random")
_ARRAY = re.compile(r"(?P<dtype>\w+)\[(?P<shape>[\d,\s]*)\]")


def _dtype(name: str) -> mx.Dtype:
    dtype = getattr(mx, {"bool": "bool_"}.get(name, name), None)
    if not isinstance(dtype, mx.Dtype):
        raise argparse.ArgumentTypeError(f"{name!r} is no dtype of MLX: float32, bfloat16, int32, ...")
    return dtype


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return name, value


def _shaped(text: str) -> tuple[mx.Dtype, tuple[int, ...]]:
    match = _ARRAY.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: expected DTYPE[SHAPE], for example float32[3,64]")
    shape = tuple(int(n) for n in match["shape"].split(",") if n.strip())
    if math.prod(shape) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r}: expected fewer than 2^31 elements")
    return _dtype(match["dtype"]), shape


def _input(text: str) -> tuple[str, Callable[[], mx.array]]:
    """The name, and what makes the array once the seed is known."""
    name, value = _pair(text)
    if value.startswith("@"):
        try:
            array = mx.array(np.load(value[1:]))
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise argparse.ArgumentTypeError(f"{name}: cannot read {value[1:]}: {error}") from error
        return name, lambda: array
    if value in ("true", "false"):
        return name, lambda: mx.array(value == "true")
    if re.fullmatch(r"[+-]?\d+", value):
        if not -(2**31) <= int(value) < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an int32, or a number with a point")
        return name, lambda: mx.array(int(value))
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)", value):
        return name, lambda: mx.array(float(value))
    dtype, shape = _shaped(value)
    if mx.issubdtype(dtype, mx.floating):
        return name, lambda: mx.random.normal(shape).astype(dtype)
    return name, lambda: mx.arange(math.prod(shape)).reshape(shape).astype(dtype)


def _output(text: str) -> tuple[str, mx.Dtype, tuple[int, ...]]:
    name, value = _pair(text)
    return name, *_shaped(value)


def _template(text: str) -> tuple[str, bool | int | mx.Dtype]:
    name, value = _pair(text)
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if re.fullmatch(r"-?\d+", value) else _dtype(value)


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 10^18")
    return int(text)


def _size(text: str) -> tuple[int, int, int]:
    try:
        sizes = [int(n) for n in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected X,Y,Z") from error
    if not 1 <= len(sizes) <= 3:
        raise argparse.ArgumentTypeError(f"{text!r}: expected X,Y,Z")
    return tuple(sizes + [1] * (3 - len(sizes)))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m reference.emulator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("kernel", type=Path, help="file with the kernel's body")
    add(
        "--input", action="append", default=[], metavar="NAME=...", type=_input, help="see above; in the kernel's order"
    )
    add("--output", action="append", required=True, metavar="NAME=DTYPE[SHAPE]", type=_output, help="in order")
    add(
        "--template",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_template,
        help="a dtype, int, true or false",
    )
    add("--grid", type=_size, required=True, metavar="X,Y,Z", help="threads in all")
    add("--threadgroup", type=_size, required=True, metavar="X,Y,Z", help="threads of a threadgroup")
    add(
        "--header",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="text before the kernel; may be repeated",
    )
    add("--init-value", type=float, metavar="NUMBER", help="what outputs hold before; without it each must be written")
    add("--atomic-outputs", action="store_true", help="outputs are device atomic<T>*")
    add("--order", choices=(*_ORDERS, "all"), default="all", help="of the threads between two barriers (default: all)")
    add("--seed", type=_seed, default=0, help="of the inputs and of the random order")
    add("--contract", action="store_true", help="let a * b + c become fma")
    add("--flush", action="store_true", help="flush subnormal numbers of float and bfloat to zero, as Apple's GPUs do")
    add("--max-threads", type=int, default=1024, metavar="N", help="refuse threadgroups of more (default: %(default)s)")
    add("--unchecked", action="store_true", help="run without the checks, up to four times as fast")
    add("--print", action="store_true", help="print the text that MLX would compile")
    add("--no-lint", action="store_true", help="do not lint (the lint needs `pip install libclang`)")
    add("--save", type=Path, metavar="FOLDER", help="write each output to FOLDER/NAME.npy, bfloat16 as float32")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    command = parser()
    options = command.parse_args(arguments)
    mx.random.seed(options.seed)
    try:
        source, header = options.kernel.read_text(), "\n".join(path.read_text() for path in options.header)
    except OSError as error:
        command.error(f"cannot read {error.filename}: {error.strerror}")
    except UnicodeDecodeError as error:
        command.error(f"the kernel or a header is not text in UTF-8: {error}")
    if options.save and options.save.exists() and not options.save.is_dir():
        command.error(f"--save is {options.save}, expected a folder, existing or new")
    given = [name for name, *_ in (*options.input, *options.output, *options.template)]
    if twice := next((name for name in given if given.count(name) > 1), None):
        command.error(f"{twice} is given twice among --input, --output and --template")
    if re.search(r"\bkernel\s+void\b|\[\[\s*kernel\s*\]\]", source):
        command.error(f"{options.kernel} holds a whole kernel: leave its body only, MLX writes the signature")
    names, dtypes, shapes = zip(*options.output)
    arrays = [make() for _, make in options.input]
    found = False
    try:
        kernel = metal_kernel(
            re.sub(r"\W", "_", options.kernel.stem),
            [name for name, _ in options.input],
            names,
            source,
            header,
            atomic_outputs=options.atomic_outputs,
        )
        text = metal_source(kernel, arrays, dtypes, options.template)
        if options.print:
            print(text)
        if not options.no_lint:
            for finding in lint(text):
                found |= not finding.only_cuda
                print(f"{'note' if finding.only_cuda else 'lint'}: {finding}")
        results = []
        for order in _ORDERS if options.order == "all" else (options.order,):
            settings = {"unset_locals": True, "flush": options.flush, "max_threads": options.max_threads}
            with emulate(not options.unchecked, order, options.seed, options.contract, **settings):
                results.append(
                    kernel(
                        inputs=arrays,
                        template=options.template,
                        grid=options.grid,
                        threadgroup=options.threadgroup,
                        output_shapes=shapes,
                        output_dtypes=dtypes,
                        init_value=options.init_value,
                    )
                )
            print(f"{order}: ok")
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    except EmulatorError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    for name, *outputs in zip(names, *results):
        values = np.array(outputs[0].astype(mx.float32))
        print(f"{name}: {outputs[0].dtype} {outputs[0].shape}, {_summary(values)}")
        if any(not np.array_equal(values, np.array(other.astype(mx.float32)), equal_nan=True) for other in outputs[1:]):
            found = True
            print(f"{name}: the values depend on the order of the threads")
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            bfloat = outputs[0].dtype == mx.bfloat16
            np.save(options.save / f"{name}.npy", values if bfloat else np.array(outputs[0]))
    return int(found)


def _summary(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)].astype(np.float64)  # whose sum may not overflow
    if not finite.size:
        return "no finite values"
    odd = values.size - finite.size
    return f"{finite.min():g} to {finite.max():g}, mean {finite.mean():g}" + (f", {odd} NaN or infinite" if odd else "")


if __name__ == "__main__":
    sys.exit(main())
