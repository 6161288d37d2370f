"""The command `evaluate`: perplexity on a text, and the divergence from a reference model."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError
from ..loading import hub
from ..text.files import atomic_write, check_folder, read_text
from .arguments import DTYPES, add_adapter_argument
from .command import Parser, ProgressLine, program, require_at_least

if TYPE_CHECKING:
    from ..evaluation.perplexity import Estimate, Evaluation


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = Parser(
        prog=program("evaluate"),
        description="Perplexity of a model on a text; with --reference, what quantizing the original costs.",
    )
    p.add_argument("--model", "-m", metavar="MODEL", help=".gguf file, folder of safetensors, or hub id")
    add_adapter_argument(p)
    p.add_argument("--text", "-t", metavar="FILE", required=True, help="UTF-8 text; - reads standard input")
    p.add_argument("--reference", metavar="MODEL", help="the model to compare with, such as the one not quantized")
    p.add_argument("--context", type=int, metavar="N", help="tokens of a window (default 1024, or the model's context)")
    p.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (default half the context)")
    p.add_argument("--tokens", type=int, metavar="N", help="only the first N tokens of the text")
    p.add_argument("--json", metavar="FILE", help="write the numbers to this file too")
    p.add_argument("--yarn", type=float, metavar="F", help="extend both contexts F times by YaRN; Qwen documents 4")
    p.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    arguments = parser().parse_args(argv)
    require_at_least(2, "--context", arguments.context, " tokens")
    require_at_least(2, "--tokens", arguments.tokens)
    longest = math.inf if arguments.context is None else arguments.context - 1
    if arguments.stride is not None and not 1 <= arguments.stride <= longest:
        raise QwenMLXError(f"--stride is {arguments.stride}, expected 1 or more, and less than the context.")
    if arguments.json is not None:
        check_folder(arguments.json, "--json")
    text = read_text(arguments.text, "--text")
    if not text:
        raise QwenMLXError(f"--text {arguments.text}: is empty.")
    paths = [hub.resolve(arguments.model)]
    if arguments.reference is not None:
        paths.append(hub.resolve(arguments.reference))

    from ..evaluation.perplexity import check_windows, evaluate
    from ..loading.load import load
    from ..text.tokenizer import Tokenizer, check_vocabulary

    if len(paths) > 1:
        names, others = (Tokenizer.read(path).names for path in paths)
        check_vocabulary(names, others, f"--reference {arguments.reference}", "reference")
    models = []
    for path, adapter in zip(paths, (arguments.adapter, None)):
        with ProgressLine(f"Loading {path.name}") as line:
            model, tokenizer = load(path, dtype=arguments.dtype, yarn=arguments.yarn, adapter=adapter, progress=line)
        models.append(model)
        check_windows(model, arguments.context, arguments.stride, str(path))
    ids = tokenizer.with_prefix(tokenizer.encode(text))
    with ProgressLine("Reading the text") as line:
        evaluation = evaluate(
            models[0],
            ids[: arguments.tokens],
            reference=models[1] if len(models) > 1 else None,
            context=arguments.context,
            stride=arguments.stride,
            progress=line,
        )
    print(f"model: {paths[0]}")
    print(describe(evaluation))
    if arguments.json:
        asked = {"model": str(paths[0]), "adapter": arguments.adapter, "reference": arguments.reference}
        write(arguments.json, asked | asdict(evaluation))
    return 0


def describe(evaluation: Evaluation) -> str:
    """The numbers for people, one a line."""

    def with_error(estimate: Estimate, scale: float = 1, unit: str = "") -> str:
        value, error = scale * estimate.value, scale * estimate.error
        digits = 4 if not error or not math.isfinite(error) else max(0, 1 - math.floor(math.log10(error)))
        return f"{value:.{digits}f} ± {error:.{digits}f}{unit}"

    lines = [
        f"text: {evaluation.tokens} tokens, {evaluation.scored} scored; windows of {evaluation.context} every "
        f"{evaluation.stride}",
        f"perplexity: {with_error(evaluation.perplexity)} ({with_error(evaluation.nll)} nats a token)",
    ]
    if evaluation.divergence is not None:
        lines += [
            f"reference's perplexity: {with_error(evaluation.divergence.reference_perplexity)}",
            f"KL divergence from the reference: {with_error(evaluation.divergence.kl)} nats a token",
            f"same likeliest token: {with_error(evaluation.divergence.agreement, 100, ' %')}",
        ]
    return "\n".join(lines)


def write(path: str, report: dict[str, Any]) -> None:
    """Writes the report as JSON; null stands for what is not a number. Raises QwenMLXError if it cannot be written."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with atomic_write(path) as file:
        file.write_text(json.dumps(clean(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
