"""The text that MLX compiles for a call of a kernel made by mx.fast.metal_kernel.

MLX's own text can be had on Linux too: called with verbose=True while mx.export_function traces it, a kernel prints
what it would compile. The tests compare the two byte for byte.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_mlx.backend import mx

TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.float64: "double",
    mx.complex64: "complex64_t",
}

# In MLX's order; the type of each. One is added to the signature when its name occurs anywhere in the body.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

PREAMBLE_FILES = ("bf16.h", "bf16_math.h", "complex.h", "defines.h", "logging.h", "utils.h")

Template = Sequence[tuple[str, "bool | int | mx.Dtype"]]


@dataclass(frozen=True)
class Buffer:
    """One parameter of the kernel. kind: input, shape, strides, ndim or output; source: the index of its array."""

    name: str
    kind: str
    source: int
    declaration: str


@dataclass(frozen=True)
class Source:
    """A kernel's text in parts, whose concatenation is what MLX prints, and what calling it needs."""

    header: str
    signature: str
    body: str
    tail: str
    function: str
    buffers: tuple[Buffer, ...]
    attributes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The text as MLX prints it with verbose=True, without the preamble."""
        return self.header + self.signature + self.body + self.tail

    @property
    def files(self) -> tuple[str, ...]:
        """The names that a compiler may give to where an error is: the parts, and those of the text's #line."""
        return ("header", "body", "signature", *line_files(self.text))

    def line(self, file: str, number: int) -> str | None:
        """A line of one of these files, None if there is none."""
        for part, text in (("header", self.header), ("body", self.body)):
            name, last = part, 0
            for line in text.splitlines():
                if match := LINE.match(line):
                    name, last = match[2], int(match[1]) - 1
                    continue
                last += 1
                if (name, last) == (file, number):
                    return line.strip()
        return None


LINE = re.compile(r'^[ \t]*#[ \t]*line[ \t]+(\d+)[ \t]+"([^"\n]*)"', re.MULTILINE)


def line_files(text: str) -> list[str]:
    """The files that the text's #line directives name, each once."""
    return list(dict.fromkeys(file for _, file in LINE.findall(text)))


@functools.cache
def preamble() -> str:
    """The text that MLX puts before every kernel, from the headers of the installed mlx."""
    folder = Path(mx.__file__).parent / "include/mlx/backend/metal/kernels"
    text = "".join((folder / name).read_text() for name in PREAMBLE_FILES)
    return re.sub(r'^#pragma once$|^#include "mlx/.*$', "", text, flags=re.MULTILINE)


def generate(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    header: str,
    source: str,
    atomic_outputs: bool,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: Template,
) -> Source:
    """The text for one call: inputs count by dtype, by having an axis and by having fewer than 8 elements."""
    values = [_template_value(value) for _, value in template]
    function = f"custom_kernel_{name}"
    if template:
        function += "_" + "_".join(["", *values]).replace("-", "_")
    buffers: list[Buffer] = []

    def add(name: str, kind: str, index: int, declaration: str) -> None:
        buffers.append(Buffer(name, kind, index, f"  {declaration} {name} [[buffer({len(buffers)})]]"))

    for index, (parameter, array) in enumerate(zip(input_names, inputs)):
        kind = TYPES[array.dtype]
        space = "constant" if array.size < 8 else "device"
        add(parameter, "input", index, f"const {space} {kind}{'*' if array.ndim else '&'}")
        function += f"_{kind}{'s' if array.ndim == 0 else 'c' if array.size < 8 else ''}"
        if array.ndim:
            for suffix, declaration in (
                ("shape", "const constant int*"),
                ("strides", "const constant int64_t*"),
                ("ndim", "const constant int&"),
            ):
                if f"{parameter}_{suffix}" in source:
                    add(f"{parameter}_{suffix}", suffix, index, declaration)
    attributes = tuple(name for name in ATTRIBUTES if name in source)
    n_parameters = len(input_names) + len(output_names)
    lines = [buffer.declaration + ",\n" for buffer in buffers]
    for index, (parameter, dtype) in enumerate(zip(output_names, output_dtypes)):
        kind = TYPES[dtype]
        function += f"_{kind}"
        add(parameter, "output", index, f"device {f'atomic<{kind}>' if atomic_outputs else kind}*")
        # MLX compares with the number of arrays, not of buffers, so shapes without attributes end the list too early.
        more = len(buffers) - 1 < n_parameters - 1 or attributes
        lines.append(buffers[-1].declaration + (",\n" if more else ") {\n"))
    for index, attribute in enumerate(attributes):
        end = ",\n" if index < len(attributes) - 1 else ") {\n"
        lines.append(f"  {ATTRIBUTES[attribute]} {attribute} [[{attribute}]]{end}")

    head = ""
    tail = "\n}\n"
    if template:
        head = f"template <{', '.join(f'{_template_kind(value)} {key}' for key, value in template)}>\n"
        call = function + instance(template)
        tail += f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({call}) {call};\n'
    signature = f"{head}[[kernel]] void {function}(\n{''.join(lines)}"
    return Source(header, signature, source, tail, function, tuple(buffers), attributes)


def instance(template: Template) -> str:
    """The template arguments as they follow the function's name, "" if there are none."""
    return f"<{', '.join(_template_value(value) for _, value in template)}>" if template else ""


def _template_kind(value: bool | int | mx.Dtype) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "typename"


def _template_value(value: bool | int | mx.Dtype) -> str:
    return str(int(value)) if isinstance(value, int) else TYPES[value]
