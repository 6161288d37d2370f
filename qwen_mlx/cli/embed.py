"""The command `embed`: texts become vectors, as JSON or as a NumPy file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..errors import QwenMLXError
from ..text.files import atomic_write, check_folder, check_utf8, read_text
from .arguments import DTYPES
from .command import Parser, ProgressLine, program, require_at_least


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = Parser(
        prog=program("embed"),
        description="Vectors of texts, of an embedding model such as gte-Qwen2: JSON, a list of lists, or a .npy file.",
    )
    add_inputs(p)
    p.add_argument(
        "--prompt", metavar="TEXT", help="put before each text; or the name of one of the model's own prompts"
    )
    p.add_argument("--pooling", choices=("last", "mean", "first", "max"), help="default: what the model's folder says")
    p.add_argument("--no-normalize", action="store_true", help="leave the vectors as long as they are")
    p.add_argument("--dimensions", type=int, metavar="N", help="only the first N, for Matryoshka models")
    p.add_argument(
        "--output", "-o", metavar="FILE", help="write to a .npy or .json file; default: JSON on the terminal"
    )
    return p


def add_inputs(p: Parser) -> None:
    """Arguments that `embed` and `score` share."""
    p.add_argument("texts", nargs="*", metavar="TEXT", help="the texts")
    p.add_argument("--model", "-m", metavar="MODEL", required=True, help=".gguf file, folder of safetensors, or hub id")
    p.add_argument("--input", "-i", metavar="FILE", help="UTF-8 text with one input a line; - reads standard input")
    p.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts computed together (default 16)")
    p.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")


def read_inputs(arguments: argparse.Namespace) -> list[str]:
    """The texts of the command line and of --input. Raises QwenMLXError if there are none."""
    require_at_least(1, "--batch-size", arguments.batch_size)
    for text in arguments.texts:
        check_utf8(text, "TEXT")
    texts = list(arguments.texts)
    if arguments.input is not None:
        texts += [line for line in read_text(arguments.input, "--input").splitlines() if line.strip()]
    if not texts:
        raise QwenMLXError("there is no text; give some, or --input FILE with one a line.")
    return texts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    arguments = parser().parse_args(argv)
    texts = read_inputs(arguments)
    require_at_least(1, "--dimensions", arguments.dimensions)
    output = arguments.output
    if output is not None:
        if not output.endswith((".npy", ".json")):
            raise QwenMLXError(f"--output is {output!r}, expected a name that ends in .npy or .json.")
        check_folder(output, "--output")

    from ..encoding.embed import embed
    from ..loading.encoder import load_encoder

    with ProgressLine("Loading"):
        encoder = load_encoder(arguments.model, dtype=arguments.dtype)
    with ProgressLine("Reading the texts"):
        vectors = embed(
            encoder,
            texts,
            prompt=arguments.prompt,
            pooling=arguments.pooling,
            normalize=False if arguments.no_normalize else None,
            dimensions=arguments.dimensions,
            batch_size=arguments.batch_size,
        )
    if output is not None and output.endswith(".npy"):
        import numpy as np

        with atomic_write(output) as file, open(file, "wb") as opened:
            np.save(opened, vectors)
    else:
        write_json(output, [[round_trip(x) for x in vector] for vector in vectors])
    return 0


def round_trip(value: Any) -> float:
    """The shortest decimal that is this float32."""
    return float(str(value))


def write_json(output: str | None, value: Any) -> None:
    """Writes JSON to a file, or to standard output for None. Raises QwenMLXError if the file cannot be written."""
    text = json.dumps(value, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    with atomic_write(output) as file:
        file.write_text(text, encoding="utf-8")
