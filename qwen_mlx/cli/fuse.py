"""The command `fuse`: a model and its adapters become one MLX model folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .arguments import add_adapter_argument
from .command import Parser, program
from .convert import FLOATS, bar, print_report, print_use, settle_group_size, stop_once


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = Parser(
        prog=program("fuse"),
        description="Merge adapters into a model, in float32, and write a folder that qwen_mlx, mlx-lm and, without "
        "--quantize, transformers load. The error of every tensor is printed and written to conversion.json.",
    )
    p.add_argument("source", help="the base: .gguf file (the first part, if split), folder, or hub id")
    p.add_argument("output", help="folder to write; it appears complete or not at all")
    add_adapter_argument(p, required=True)
    p.add_argument("--dtype", choices=FLOATS, default="bfloat16", help="of what is not packed (default bfloat16)")
    p.add_argument("--quantize", type=int, choices=(2, 3, 4, 5, 6, 8), help="pack every matrix")
    p.add_argument("--group-size", type=int, choices=(32, 64, 128), help="of --quantize (default 64)")
    p.add_argument("--force", action="store_true", help="replace an existing model folder")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    arguments = vars(parser().parse_args(argv))
    source, output = arguments.pop("source"), arguments.pop("output")
    settle_group_size(arguments, "quantize")
    stop_once()
    from ..conversion.convert import convert

    with bar("Fusing") as progress:
        report = convert(source, output, **arguments, dense=not arguments["quantize"], progress=progress)
    print_report(report)
    print_use(output)
    return 0
