"""`python -m benchmarks.cpu_speculative`: prompt-lookup decoding against plain decoding, one process, interleaved.

Three tasks about one file of code, two summaries and an edit, and one that has no text to look anything up in. How much
is won depends on how much of the answer stands in the prompt: on "summarise" the 0.5B model quotes most of the code.
Both decode greedily, in turn, `--repeats` times over; the texts must be equal, and the ratio of each pair's decoding
speeds is what counts (the prompt is read once more each time, and left out). Prints a table and writes JSON.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from benchmarks.arguments import Parser, at_least, positive, to_write
from qwen_mlx import load, stream_generate
from qwen_mlx.cli import command as cli
from qwen_mlx.generation.prompt_cache import PromptCache

from .cpu_generate import processor

TASKS = {
    "summarise": (
        "Summarise this code as Markdown: for every function its signature in bold and one sentence on what it does."
        "\n\n```python\n{code}```"
    ),
    "headings": (
        "Summarise this code as Markdown: for every function a heading, its signature in a code block, and one "
        "sentence.\n\n```python\n{code}```"
    ),
    "edit": (
        "Rename the function `mean` to `average` in this code and give the whole code back, nothing else."
        "\n\n```python\n{code}```"
    ),
    "free": "Write a short story about a lighthouse keeper and a storm.",
}
CODE = '''\
import math


def mean(values: list[float]) -> float:
    """The arithmetic mean of the values."""
    if not values:
        raise ValueError("mean() of an empty list")
    return sum(values) / len(values)


def variance(values: list[float], sample: bool = True) -> float:
    """The variance of the values, of a sample or of the whole population."""
    center = mean(values)
    total = sum((value - center) ** 2 for value in values)
    return total / (len(values) - 1 if sample else len(values))


def standard_error(values: list[float]) -> float:
    """The standard error of the mean of the values."""
    return math.sqrt(variance(values) / len(values))


def covariance(first: list[float], second: list[float]) -> float:
    """The covariance of two lists of the same length."""
    if len(first) != len(second):
        raise ValueError(f"lists of {len(first)} and {len(second)} values")
    a, b = mean(first), mean(second)
    return sum((x - a) * (y - b) for x, y in zip(first, second)) / (len(first) - 1)


def correlation(first: list[float], second: list[float]) -> float:
    """Pearson's correlation coefficient of two lists of the same length."""
    return covariance(first, second) / math.sqrt(variance(first) * variance(second))
'''


def main() -> None:
    """Parses the arguments, decodes every task in turn with both, prints the table and writes the JSON."""
    parser = Parser("cpu_speculative", __doc__)
    parser.add_argument("--model", help="a GGUF or a folder (default: the default model)")
    parser.add_argument("--tokens", type=at_least(2), default=200, help="tokens of an answer at most (default 200)")
    parser.add_argument("--num-draft-tokens", type=positive, help="at a time at most (default: prompt-lookup's own)")
    parser.add_argument("--repeats", type=positive, default=3, help="interleaved runs of each (default 3)")
    parser.add_argument("--task", action="append", choices=TASKS, help="only these (default: all)")
    parser.add_argument("--output", type=to_write, default=Path("cpu_speculative.json"))
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    report: dict[str, Any] = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "tokens": arguments.tokens,
        "tasks": {},
    }
    columns = ("plain tok/s", "lookup tok/s", "ratio", "accepted", "paused", "same text")
    print(f"{'task':10}" + "".join(f"{column:>14}" for column in columns))
    for task in arguments.task or TASKS:
        prompt = TASKS[task].format(code=CODE)
        caches = {draft: PromptCache(model) for draft in (None, "prompt-lookup")}
        runs = []
        for repeat in range(arguments.repeats + 1):
            run: dict[str, Any] = {}
            for draft, cache in caches.items():
                settings = {
                    "max_tokens": arguments.tokens,
                    "temperature": 0,
                    "draft_model": draft,
                    "prompt_cache": cache,
                }
                if draft:
                    settings["num_draft_tokens"] = arguments.num_draft_tokens
                chunks = list(stream_generate(model, tokenizer, prompt, **settings))
                stats = chunks[-1].stats
                name = draft or "plain"
                run[name] = {"tok/s": stats.generated_per_second, "ids": [chunk.token for chunk in chunks]}
                if draft:
                    run |= {"drafted": stats.drafted_tokens, "accepted": stats.accepted_tokens}
                    run |= {"paused": stats.paused_tokens}
            run["same"] = run["plain"].pop("ids") == run["prompt-lookup"].pop("ids")
            run["ratio"] = run["prompt-lookup"]["tok/s"] / run["plain"]["tok/s"]
            if repeat:  # the first warms up
                runs.append(run)
        ratio = statistics.median(run["ratio"] for run in runs)
        same = all(run["same"] for run in runs)
        plain, lookup = (statistics.median(run[name]["tok/s"] for run in runs) for name in ("plain", "prompt-lookup"))
        last = runs[-1]
        print(
            f"{task:10}{plain:14.1f}{lookup:14.1f}{ratio:14.2f}{last['accepted']:9}/{last['drafted']:<4}"
            f"{last['paused']:14}{'yes' if same else 'NO':>14}"
        )
        report["tasks"][task] = {"answer_tokens": len(chunks), "ratio": ratio, "same_text": same, "runs": runs}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
