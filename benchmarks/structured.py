"""`python -m benchmarks.structured`: what structured output costs a decoding step.

A greedy answer with a schema and one without take turns of some steps; then the masks are made alone. Prints medians.
Takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from benchmarks.arguments import at_least, to_write
from qwen_mlx import load
from qwen_mlx.backend import describe, mx
from qwen_mlx.cli import command as cli
from qwen_mlx.generation import structured
from qwen_mlx.generation.engine import Rows
from qwen_mlx.generation.settings import GenerationSettings
from qwen_mlx.generation.text import encode_prompt
from qwen_mlx.model.qwen2 import Qwen2

PROMPT = "List three cities with their country and population as JSON."
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "country": {"type": "string"}, "population": {"type": "integer"}},
    "required": ["name", "country", "population"],
    "additionalProperties": False,
}
TURN = 6
SCHEMA = {"type": "array", "items": CITY, "minItems": 3, "maxItems": 3}


def measure(model: Qwen2, ids: list[int], made: structured.Constraint, steps: int) -> dict[str, float]:
    """Medians in milliseconds a step, over about `steps` steps of one structured row and one free row, and of what the
    structured row's matcher does in a step; and `share`, the median of what the structured row adds. The rows take
    turns of TURN steps."""
    bound, free = Rows(model), Rows(model)
    bound.add([ids], [GenerationSettings(constraint=made, max_tokens=4 * steps)])
    free.add([ids], [GenerationSettings()])
    times: dict[str, list[float]] = {"structured": [], "free": [], "mask": []}
    tokens = []
    for _ in range(-(-steps // TURN)):
        for name, rows in (("structured", bound), ("free", free)):
            start = time.perf_counter()
            ids_now = [rows.step()[0].id for _ in range(TURN)]
            mx.synchronize()  # the step after the last one is under way, and belongs to this row
            times[name].append((time.perf_counter() - start) / TURN)
            tokens += ids_now if name == "structured" else []
    share = statistics.median(a / b for a, b in zip(times["structured"], times["free"])) - 1
    matcher = made.start(4 * steps)
    for token in tokens:
        start = time.perf_counter()
        matcher.mask()
        matcher.accept(token)
        times["mask"].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()} | {"share": share}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the built-in model")
    parser.add_argument("--steps", type=at_least(2), default=60, help="tokens that are made")
    parser.add_argument("--output", type=to_write, help="a file for the numbers")
    arguments = parser.parse_args(argv)
    model, tokenizer = load(arguments.model)
    start = time.perf_counter()
    structured.constraint(tokenizer, choices=["x"])
    vocabulary = time.perf_counter() - start
    start = time.perf_counter()
    made = structured.constraint(tokenizer, json_schema=SCHEMA)
    compiled = time.perf_counter() - start
    result = measure(model, encode_prompt(tokenizer, PROMPT), made, arguments.steps)
    print(f"{describe()}: the vocabulary {vocabulary:.2f} s, once; the schema {1e3 * compiled:.1f} ms")
    share = result.pop("share")
    print(f"a step {result['free']:.2f} ms, structured {result['structured']:.2f} ms ({share:+.3f})")
    print(f"its mask {result['mask']:.3f} ms")
    if arguments.output is not None:
        about = {"backend": describe(), "vocabulary_seconds": vocabulary, "schema_seconds": compiled}
        arguments.output.write_text(
            json.dumps(about | {f"{name}_ms": v for name, v in result.items()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    cli.run(main)
