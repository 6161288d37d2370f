"""`python -m benchmarks.cpu_chat`: what a conversation computes, with its prompt cache and without, and a saved cache.

Ten turns with greedy answers. With the cache every token is computed once: tokens read and tokens written (but the last
of an answer, which belongs to the next turn) add up to the conversation's length. Without it each turn reads everything
again; both must give the same answers. Then a prompt of 2,000 tokens is computed, saved, and loaded in a new process.
Prints tables and writes JSON. Takes about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import Parser, positive, to_write
from qwen_mlx.cli import command as cli

from .cpu_generate import processor

QUESTIONS = (
    "Write a Python function that reverses a string.",
    "Now let it keep the case of the first letter.",
    "What is its complexity?",
    "Add type hints.",
    "Write a test for it.",
    "What does it do with an empty string?",
    "And with an emoji of several code points?",
    "Name a library that handles those.",
    "Translate the docstring to French.",
    "Sum up what we did in one sentence.",
)
TEXT = "The quick brown fox jumps over the lazy dog, and nobody minds. "
LOADS = 5


def conversation(model: Any, tokenizer: Any, max_tokens: int, reuse: bool) -> list[dict[str, Any]]:
    """Figures of every turn; without `reuse` each turn begins with an empty cache."""
    from qwen_mlx.generation.chat import Chat
    from qwen_mlx.generation.prompt_cache import PromptCache

    chat = Chat(model, tokenizer, max_tokens=max_tokens, temperature=0)
    turns = []
    for question in QUESTIONS:
        if not reuse:
            chat.prompt_cache = PromptCache(model)
        for _ in chat.send(question):
            pass
        (stats,) = chat.turn
        turns.append(
            {
                "reused": stats.reused_tokens,
                "read": stats.prompt_tokens,
                "written": stats.generated_tokens,
                "seconds_to_first_text": stats.prompt_seconds,
                "length": len(chat.prompt_cache.ids),
                "answer": chat.messages[-1]["content"],
            }
        )
    return turns


def saved(model: Any, tokenizer: Any, arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Seconds to compute, save and load a prompt, and bytes of the file."""
    from qwen_mlx.generation.prompt_cache import PromptCache
    from qwen_mlx.generation.text import stream_generate

    ids = tokenizer.encode(TEXT * arguments.saved_tokens)[: arguments.saved_tokens]
    cache = PromptCache(model)
    start = time.perf_counter()
    for chunk in stream_generate(model, tokenizer, ids, max_tokens=1, temperature=0, prompt_cache=cache):
        token = chunk.token
    computed, start = time.perf_counter() - start, time.perf_counter()
    cache.save(file)
    written = time.perf_counter() - start
    command = [sys.executable, "-m", "benchmarks.cpu_chat", "--load", str(file)]
    command += ["--model", arguments.model] if arguments.model else []
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    if found.pop("token") != token:
        sys.exit("error: the loaded cache goes on differently.")
    return {"tokens": len(cache.ids), "bytes": file.stat().st_size, "compute": computed, "save": written, **found}


def load_only(path: str | None, file: str) -> dict[str, Any]:
    """In a process of its own: the first and the median time to load a cache, and the token that follows."""
    from qwen_mlx import load
    from qwen_mlx.generation.prompt_cache import PromptCache
    from qwen_mlx.generation.text import stream_generate

    model, tokenizer = load(path)
    seconds = []
    for _ in range(LOADS):
        start = time.perf_counter()
        cache = PromptCache.load(file, model)
        seconds.append(time.perf_counter() - start)
    (chunk,) = stream_generate(model, tokenizer, list(cache.ids), max_tokens=1, temperature=0, prompt_cache=cache)
    if chunk.stats.prompt_tokens != 1:
        sys.exit("error: more than the last token was computed.")
    return {"first_load": seconds[0], "load": statistics.median(seconds), "token": chunk.token}


def main() -> None:
    """Parses the arguments, measures, prints the tables and writes the JSON."""
    parser = Parser("cpu_chat", __doc__)
    parser.add_argument("--model", help="as for qwen_mlx.generate (default: the default model)")
    parser.add_argument("--max-tokens", type=positive, default=40, help="of an answer (default 40)")
    parser.add_argument("--saved-tokens", type=positive, default=2000, help="of the saved prompt (default 2000)")
    parser.add_argument("--output", type=to_write, default=Path("cpu_chat.json"))
    parser.add_argument("--load", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load_only(arguments.model, arguments.load)))
        return
    from qwen_mlx import load

    model, tokenizer = load(arguments.model)
    cached, plain = (conversation(model, tokenizer, arguments.max_tokens, reuse) for reuse in (True, False))
    same = sum(a["answer"] == b["answer"] for a, b in zip(cached, plain))
    print("turn  reused  read  written  first text s  without a cache: read  first text s")
    for number, (turn, other) in enumerate(zip(cached, plain), 1):
        figures = f"{turn['reused']:6}  {turn['read']:4}  {turn['written']:7}  {turn['seconds_to_first_text']:12.2f}"
        print(f"{number:4}  {figures}  {other['read']:21}  {other['seconds_to_first_text']:12.2f}")
    read, kept = sum(turn["read"] for turn in cached), sum(turn["written"] - 1 for turn in cached)
    length = cached[-1]["length"]
    waited, waited_plain = (sum(turn["seconds_to_first_text"] for turn in turns) for turns in (cached, plain))
    print(
        f"read {read} + written and kept {kept} = {read + kept}, conversation {length}; {same} of {len(cached)} "
        f"answers the same; {waited_plain / waited:.1f} times less waiting for the first text of answers"
    )
    if read + kept != length:
        sys.exit("error: a token was computed twice, or left out.")
    with tempfile.TemporaryDirectory() as folder:
        disk = saved(model, tokenizer, arguments, Path(folder) / "cache")
    print(
        f"a prompt of {disk['tokens']} tokens: computed in {disk['compute']:.2f} s, saved in {disk['save']:.3f} s "
        f"({disk['bytes'] / 1e6:.1f} MB), loaded in {disk['first_load']:.3f} s at first, median {disk['load']:.3f} s"
    )
    report = {"processor": processor(), "cores": os.cpu_count(), "cached": cached, "plain": plain, "saved": disk}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
