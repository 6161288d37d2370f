"""The command `export`: a model, with its adapters if there are some, becomes a GGUF file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .arguments import add_adapter_argument
from .command import Parser, program
from .convert import bar, print_report, print_use, stop_once

TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k", "keep")


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = Parser(
        prog=program("export"),
        description="Write a model as one GGUF file, for llama.cpp, Ollama and whatever else reads GGUF. The error of "
        "every tensor is printed.",
    )
    p.add_argument("source", help=".gguf file (the first part, if split), folder of safetensors, or hub id")
    p.add_argument("output", help="file to write; it appears complete or not at all")
    p.add_argument(
        "--type",
        choices=TYPES,
        default="q4_k_m",
        help="mixed as llama.cpp mixes them (default q4_k_m); keep changes no value: it copies a GGUF's tensors, and "
        "writes what MLX has packed in a type with the same arithmetic",
    )
    add_adapter_argument(p)
    p.add_argument("--force", action="store_true", help="replace an existing GGUF file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    arguments = vars(parser().parse_args(argv))
    source, output = arguments.pop("source"), arguments.pop("output")
    stop_once()
    from ..conversion.export import export

    with bar("Exporting") as progress:
        report = export(source, output, **arguments, progress=progress)
    print_report(report)
    print_use(output)
    return 0
