"""The command `score`: scores of texts, of a classifier, a reranker or a reward model, as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import QwenMLXError
from ..text.files import check_folder, check_utf8
from .command import Parser, ProgressLine, program
from .embed import add_inputs, read_inputs, round_trip, write_json


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = Parser(
        prog=program("score"),
        description="Scores of texts before any softmax, of a model with a classification or reward head: JSON, an "
        "object for each text with its scores by label.",
    )
    add_inputs(p)
    p.add_argument("--query", metavar="TEXT", help="score each text as an answer to this one, for a reranker")
    p.add_argument("--steps", metavar="TOKEN", nargs="?", const="<extra_0>", help="score each step that TOKEN ends")
    p.add_argument("--output", "-o", metavar="FILE", help="write to a .json file; default: JSON on the terminal")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    arguments = parser().parse_args(argv)
    texts = read_inputs(arguments)
    if arguments.query is not None:
        check_utf8(arguments.query, "--query")
    if arguments.query is not None and arguments.steps is not None:
        raise QwenMLXError("--query and --steps are for different models; give one of them.")
    if arguments.output is not None:
        if not arguments.output.endswith(".json"):
            raise QwenMLXError(f"--output is {arguments.output!r}, expected a name that ends in .json.")
        check_folder(arguments.output, "--output")

    from ..encoding.score import score, step_scores
    from ..loading.encoder import load_encoder

    with ProgressLine("Loading"):
        encoder = load_encoder(arguments.model, dtype=arguments.dtype)
    inputs = texts if arguments.query is None else [(arguments.query, text) for text in texts]
    if arguments.steps is not None:
        with ProgressLine("Reading the texts"):
            rows = step_scores(encoder, texts, step=arguments.steps, batch_size=arguments.batch_size)
        report = [{"text": text, "steps": [round_trip(x) for x in row]} for text, row in zip(texts, rows)]
        write_json(arguments.output, report)
        return 0
    scored = []
    with ProgressLine("Reading the texts"):
        scores = score(encoder, inputs, batch_size=arguments.batch_size)
    for text, row in zip(texts, scores):
        labels = encoder.settings.labels
        names = labels if len(labels) == len(row) else [f"LABEL_{i}" for i in range(len(row))]
        scored.append({"text": text, "scores": {name: round_trip(x) for name, x in zip(names, row)}})
    write_json(arguments.output, scored)
    return 0
