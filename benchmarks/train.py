"""`python -m benchmarks.train`: training of an adapter, qwen_mlx against mlx-lm's trainer on the same packed weights.

Random weights of the true shapes and random tokens. The two take turns of a few steps, of which the first, that
compiles, does not count, and must agree on the first loss. Prints medians of tokens a second, the most memory of MLX's
allocator (on a GPU), and ratios. Takes under 100 seconds for 7B on an H200; try it with `--size tiny --length 64`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import Parser, positive, require_module, to_write
from benchmarks.engines import mlx_lm_model
from benchmarks.random_models import SHAPES, random_model
from qwen_mlx import Qwen2
from qwen_mlx.backend import describe, mx, optimizers
from qwen_mlx.cli import command as cli
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.training.data import Example
from qwen_mlx.training.lora import LoraSettings, take_away
from qwen_mlx.training.train import Trainer, TrainingSettings

BITS, RATE, SCALE = 4, 1e-4, 2.0
SAME_LOSS = 0.01  # bfloat16 rounds differently in each; another model or other targets would be far off


def examples_of(vocabulary: int, count: int, length: int) -> list[Example]:
    """Random texts that give `length` predictions each, all learnt."""
    rng = np.random.default_rng(0)
    return [Example(rng.integers(0, vocabulary, length + 1).astype(np.int32), 1) for _ in range(count)]


def ours(model: Qwen2, examples: list[Example], rank: int, steps: int) -> Iterator[tuple[float, float]]:
    """The loss of each step and its seconds."""
    settings = TrainingSettings(iters=steps, batch_size=len(examples), learning_rate=RATE)
    trainer = Trainer(model, examples, LoraSettings(rank, SCALE * rank), settings)
    try:
        for _ in range(steps):
            start = time.perf_counter()
            row = trainer.take_step()
            yield float(row.loss or 0), time.perf_counter() - start
    finally:
        take_away(model, trainer.factors)


def mlx_lms(model: Qwen2, examples: list[Example], rank: int, steps: int) -> Iterator[tuple[float, float]]:
    """The same of mlx-lm's train(), as its command calls it."""
    from mlx_lm.tuner import callbacks, trainer, utils

    other = mlx_lm_model(model, BITS)
    other.freeze()
    parameters = {"rank": rank, "scale": SCALE, "dropout": 0.0, "keys": LoraSettings().keys}
    utils.linear_to_lora_layers(other, len(model.model.layers), parameters)
    rows: list[tuple[float, float]] = []

    class Callback(callbacks.TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, float]) -> None:
            rows.append((train_info["train_loss"], 1 / train_info["iterations_per_second"]))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer.train(
            other,
            optimizers.AdamW(RATE, weight_decay=0.01),
            [(example.ids.tolist(), 0) for example in examples],
            args=trainer.TrainingArgs(
                batch_size=len(examples),
                iters=steps,
                steps_per_report=1,
                max_seq_length=len(examples[0].ids),
                adapter_file=f"{folder}/adapters.safetensors",
            ),
            training_callback=Callback(),
        )
    yield from rows


def measure(size: str, batch: int, length: int, rank: int, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """By engine: tokens a second of every counted step, the first loss and the peak in bytes. Raises QwenMLXError
    where the first losses are not the same."""
    model = random_model(size, BITS)
    mx.eval(model.parameters())
    examples = examples_of(model.config.vocab_size, batch, length)
    results: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name, engine in (("qwen_mlx", ours), ("mlx-lm", mlx_lms)):
            gc.collect()
            mx.clear_cache()
            mx.reset_peak_memory()
            losses, seconds = zip(*engine(model, examples, rank, steps + 1))
            result = results.setdefault(name, {"tokens_per_second": [], "first_loss": losses[0], "peak_bytes": 0})
            result["tokens_per_second"] += [batch * length / value for value in seconds[1:]]
            result["peak_bytes"] = max(result["peak_bytes"], mx.get_peak_memory())
    first, second = (result["first_loss"] for result in results.values())
    if not abs(first - second) <= SAME_LOSS * abs(second):
        raise QwenMLXError(f"The first losses differ, {first:.4f} and {second:.4f}: the two do not train the same.")
    return results


def main(argv: list[str] | None = None) -> None:
    """Measures and prints a line for each engine and one of ratios."""
    parser = Parser("train", __doc__)
    parser.add_argument("--size", choices=SHAPES, default="7B", help="default %(default)s")
    parser.add_argument("--batch", type=positive, default=4, help="sequences of a step (default %(default)s)")
    parser.add_argument("--length", type=positive, default=2048, help="tokens of each (default %(default)s)")
    parser.add_argument("--rank", type=positive, default=16, help="of the adapter (default %(default)s)")
    parser.add_argument("--steps", type=positive, default=4, help="of a turn, beside its first (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=2, help="turns of each (default %(default)s)")
    parser.add_argument("--output", type=to_write, default=argparse.SUPPRESS, help="a file for the numbers, as JSON")
    arguments = vars(parser.parse_args(argv))
    output: Path | None = arguments.pop("output", None)
    require_module("mlx_lm", "install the project's extra 'test'")
    results = measure(**arguments)
    print(f"{describe()}: {arguments['size']} in {BITS} bits, rank {arguments['rank']}, ", end="")
    print(f"{arguments['batch']} sequences of {arguments['length']}")
    for name, result in results.items():
        speeds = result["tokens_per_second"]
        rates = f"{statistics.median(speeds):,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f})"
        print(f"{name}: {rates}, peak {result['peak_bytes'] / 1e9:.2f} GB, first loss {result['first_loss']:.4f}")
    own, other = results.values()
    speed = statistics.median(own["tokens_per_second"]) / statistics.median(other["tokens_per_second"])
    print(
        f"qwen_mlx over mlx-lm: {speed:.2f} of its tokens/s, {own['peak_bytes'] / other['peak_bytes']:.2f} of its peak"
    )
    if output is not None:
        output.write_text(json.dumps({"device": describe(), **arguments, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
