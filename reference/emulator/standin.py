"""The stand-in for mx.fast.metal_kernel, and the context in which it stands in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from qwen_mlx import ops
from qwen_mlx.backend import mx

from . import launch
from .errors import InvalidLaunch
from .source import TYPES, Source, Template, generate, instance, preamble

_options = launch.Options()
on_text: Callable[[Source], None] = lambda source: None  # called with the text of every launch  # noqa: E731


@contextmanager
def emulate(
    checked: bool = True,
    order: str = "random",
    seed: int = 0,
    contract: bool = False,
    steps: int = 50_000_000,
    unset_locals: bool = False,
    flush: bool = False,
    max_threads: int = 1024,
) -> Iterator[None]:
    """Within it mx.fast.metal_kernel makes emulated kernels, and qwen_mlx.ops chooses them.

    The arguments: see launch.Options. Kernels are evaluated at once, so not within mx.compile.
    mx.metal.is_available() says yes, as host code asks it before making kernels.
    """
    global _options
    before = _options, mx.fast.metal_kernel, mx.metal.is_available
    _options = launch.Options(checked, order, seed, contract, steps, unset_locals, flush, max_threads)
    mx.fast.metal_kernel, mx.metal.is_available = metal_kernel, lambda: True
    try:
        with ops.forced("metal"):
            yield
    finally:
        _options, mx.fast.metal_kernel, mx.metal.is_available = before


@dataclass(frozen=True)
class MetalKernel:
    """The kernel that metal_kernel returns; calling it is as calling MLX's own, and runs in the emulator."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array | bool | int | float],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[mx.array]:
        """Runs the kernel with the options of the `emulate` around it; the outputs are evaluated."""
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        text = self.text(arrays, output_dtypes, template or (), output_shapes)
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{text.text}\n```")
        self._check(arrays, output_dtypes, output_shapes)
        on_text(text)
        return launch.run(
            self.name,
            text,
            instance(template or ()),
            arrays,
            grid,
            threadgroup,
            [tuple(shape) for shape in output_shapes],
            output_dtypes,
            init_value,
            self.ensure_row_contiguous,
            _options,
        )

    def _check(self, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], shapes: Sequence[tuple]) -> None:
        """Checks what MLX would put into the text, and Metal's compiler or MLX refuse."""
        if not re.fullmatch(r"\w+", self.name, re.ASCII):
            raise InvalidLaunch(
                f"kernel name {self.name!r}: expected letters, digits and _, it becomes part of a function's."
            )
        for parameter in (*self.input_names, *self.output_names):
            if not _is_name(parameter):
                raise InvalidLaunch(f"kernel {self.name}: {parameter!r} names an array, expected a name of C++.")
        for what, dtype in zip(
            (*self.input_names, *self.output_names), (*(x.dtype for x in inputs), *output_dtypes), strict=True
        ):
            if dtype == mx.float64:
                raise InvalidLaunch(f"kernel {self.name}: {what} is float64, which Metal does not have.")
        for shape in shapes:
            if any(not isinstance(n, int) or n < 0 for n in shape):
                raise InvalidLaunch(f"kernel {self.name}: output shape {tuple(shape)}, expected sizes of 0 or more.")

    def text(
        self,
        inputs: Sequence[mx.array],
        output_dtypes: Sequence[mx.Dtype],
        template: Template = (),
        output_shapes: Sequence[Sequence[int]] | None = None,
    ) -> Source:
        """The text for these arguments. Raises InvalidLaunch if there are too few or too many, or for a wrong one."""
        for what, given, names in (
            ("inputs", inputs, self.input_names),
            ("output_dtypes", output_dtypes, self.output_names),
            ("output_shapes", self.output_names if output_shapes is None else output_shapes, self.output_names),
        ):
            if len(given) != len(names):
                raise InvalidLaunch(f"kernel {self.name}: {what} has {len(given)} entries, expected {len(names)}.")
        for entry in template:
            if not _is_template_argument(entry):
                raise InvalidLaunch(
                    f"kernel {self.name}: template has {entry!r}, expected a name with a bool, an int of 32 bits or a "
                    "dtype of Metal."
                )
        return generate(
            self.name,
            self.input_names,
            self.output_names,
            self.header,
            self.source,
            self.atomic_outputs,
            inputs,
            output_dtypes,
            template,
        )


def _is_template_argument(entry: object) -> bool:
    if not isinstance(entry, tuple | list) or len(entry) != 2 or not _is_name(entry[0]):
        return False
    value = entry[1]
    return value in TYPES and value != mx.float64 if isinstance(value, mx.Dtype) else _is_int32(value)


def _is_int32(value: object) -> bool:
    return isinstance(value, int) and -(2**31) <= value < 2**31


def _is_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
) -> MetalKernel:
    """As mx.fast.metal_kernel; compile_options are accepted and change nothing."""
    for what, text in (("source", source), ("header", header)):
        if not text.isascii():
            raise InvalidLaunch(f"kernel {name}: {what} is not ASCII, which Metal's compiler refuses.")
    if not output_names:
        raise InvalidLaunch(f"kernel {name}: output_names is empty, expected at least one.")
    return MetalKernel(
        name, tuple(input_names), tuple(output_names), source, header, ensure_row_contiguous, atomic_outputs
    )


def metal_source(
    kernel: MetalKernel,
    inputs: Sequence[mx.array | bool | int | float],
    output_dtypes: Sequence[mx.Dtype],
    template: Template | None = None,
    with_preamble: bool = False,
) -> str:
    """The text that MLX would compile for this call: what it prints with verbose=True, and before it the preamble."""
    arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    text = kernel.text(arrays, output_dtypes, template or ()).text
    return preamble() + text if with_preamble else text
