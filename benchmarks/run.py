"""`python -m benchmarks.run`: qwen_mlx against mlx-lm, transformers and llama.cpp on the same weights, in one run.

Random weights of the true shapes, so that no file is needed; or a file of yours. Each case is a prompt's length (which
is the context that decoding starts from) and a number of sequences. Engines take turns, medians are compared. Prints a
table, writes JSON with machine and versions, to send us, and with --plot a picture. `--full` is the whole matrix:
prompts of 1 to 32,768 tokens and up to 64 sequences. On two cores `--models 0.5B` takes about 20 minutes, nearly all of
them mlx-lm's, and with `--prompts 128 --tokens 32 --repeats 1` about two.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from benchmarks.arguments import Parser, positive, require_module, to_write
from benchmarks.engines import Tokens, engines_of, llama_bench
from benchmarks.random_models import SHAPES, random_model, raw_model
from qwen_mlx import Qwen2, load, ops
from qwen_mlx.backend import describe, mx
from qwen_mlx.cli import command as cli
from qwen_mlx.errors import QwenMLXError

MODELS = ("0.5B", "0.5B:4", "1.5B", "7B", "7B:4", "7B:q4_k_m")
ENGINES = ("qwen_mlx", "mlx-lm", "transformers", "transformers-static")
FULL_PROMPTS = (1, 128, 512, 2048, 8192, 32768)
FULL_BATCHES = (1, 4, 16, 32, 64)
COLUMNS = ("model", "prompt x n", "engine", "prefill", "ours", "decode", "least to most", "ours", "of copy", "peak GB")
WIDTHS = (12, 10, 20, 8, 6, 8, 18, 6, 7, 7)
BATCH_PROMPT = 128  # tokens of each prompt where there are several


def require_case(case: str) -> None:
    """Raises QwenMLXError unless `case` is one that model_of knows."""
    size, _, bits = case.partition(":")
    if not Path(case).exists() and (size not in SHAPES or bits not in ("", "4", "8", "q4_k_m")):
        sizes = ", ".join(SHAPES)
        raise QwenMLXError(f"No model {case!r}: expected a file, or {sizes}, optionally with :4, :8 or :q4_k_m.")


def model_of(case: str) -> tuple[Qwen2, Qwen2, int | None, float]:
    """Makes what "size", "size:bits", "size:q4_k_m" or a path names: the model, one with weights that mlx-lm can hold,
    their bits (None: dense), and the seconds it took to load."""
    begin = time.perf_counter()
    if Path(case).exists():
        model = load(case)[0]
        mx.eval(model.parameters())
        seconds = time.perf_counter() - begin
        return model, load(case, quantized=False)[0], None, seconds
    require_case(case)
    size, _, bits = case.partition(":")
    if bits == "q4_k_m":  # mlx-lm reads no GGUF: its own 4 bits stand beside it
        return raw_model(size), random_model(size, 4), 4, 0.0
    model = random_model(size, int(bits) if bits else None)
    return model, model, int(bits) if bits else None, 0.0


def timed(start: Callable[[], Tokens], tokens: int) -> tuple[float, float, list[list[int]]]:
    """Seconds to the first token, tokens per second and sequence after it, and the tokens."""
    mx.synchronize()
    begin = time.perf_counter()
    steps = start()
    made = [next(steps)]
    first = time.perf_counter()
    made += itertools.islice(steps, tokens)
    return first - begin, tokens / (time.perf_counter() - first), made


def copy_bandwidth(size: int = 1 << 30, repeats: int = 5) -> float | None:
    """Bytes per second read and written by negating `size` bytes, at best; None on a CPU, where MLX negates on one core
    into new memory."""
    if mx.default_device() == mx.cpu:
        return None
    x = mx.zeros((size // 4,), mx.float32)
    best = float("inf")
    for _ in range(repeats + 1):
        mx.eval(x)
        mx.synchronize()
        begin = time.perf_counter()
        mx.eval(mx.negative(x))
        mx.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size / best


def weight_bytes(model: Qwen2) -> int:
    """Bytes that a decoded token reads of the weights: all, but of an embedding that is not the head only a row."""
    nbytes = lambda module: sum(array.nbytes for _, array in tree_flatten(module.parameters()))  # noqa: E731
    return nbytes(model) - (0 if model.config.tie_word_embeddings else nbytes(model.model.embed_tokens))


def cases_of(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """(tokens of a prompt, prompts) of each case."""
    prompts = arguments.prompts or (FULL_PROMPTS if arguments.full else (512,))
    batches = arguments.batches or (FULL_BATCHES if arguments.full else (1,))
    return [(prompt, 1) for prompt in prompts] + [(BATCH_PROMPT, size) for size in batches if size > 1]


def measure(model: Qwen2, makers: Any, cases: list[tuple[int, int]], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each case and engine."""
    engines = [maker() for maker in makers]
    rows = []
    for prompt, batch in cases:
        prompts = [
            [(7919 * i + 104729 * n) % 150000 % model.config.vocab_size for i in range(prompt)] for n in range(batch)
        ]
        runs: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine in engines}
        made, peaks = {}, {}
        for repeat in range(repeats + 1):
            for engine in engines:
                engine.peak()
                prefill, decode, made[engine.name] = timed(partial(engine.start, prompts), tokens)
                gc.collect()  # a generator that was left midway holds its cache
                peaks[engine.name] = engine.peak()
                if repeat:  # the first round warms up
                    runs[engine.name].append((prefill, decode))
                measured = f"prefill {prompt * batch / prefill:.0f} tok/s, decode {decode * batch:.1f} tok/s"
                turn = f"round {repeat} of {repeats}" if repeat else "warm-up"
                print(f"{prompt} x {batch}, {turn}, {engine.name}: {measured}", file=sys.stderr, flush=True)
        first = made[engines[0].name]
        for engine in engines:
            seconds, speeds = zip(*runs[engine.name])
            different = next((i for i, (a, b) in enumerate(zip(first, made[engine.name])) if list(a) != list(b)), None)
            row = {"prompt": prompt, "batch": batch, "engine": engine.name, "peak_bytes": peaks[engine.name]}
            row |= {"prefill_seconds": seconds, "decode_tokens_per_second": speeds, "first_different_token": different}
            rows.append(row)
    return rows


def show(case: str, rows: list[dict[str, Any]], copy: float | None, weights: int) -> None:
    """One line a row; ratios are qwen_mlx's speed over the engine's."""
    for (prompt, batch), group in itertools.groupby(rows, key=lambda row: (row["prompt"], row["batch"])):
        ours = None
        for row in group:
            prefill, decode = (statistics.median(row[key]) for key in ("prefill_seconds", "decode_tokens_per_second"))
            ours = ours or (prefill, decode)
            low, high = min(row["decode_tokens_per_second"]), max(row["decode_tokens_per_second"])
            spread = f"{low * batch:.1f} to {high * batch:.1f}"
            cells = case, f"{prompt} x {batch}", row["engine"], f"{prompt * batch / prefill:.0f}"
            cells += f"{prefill / ours[0]:.2f}", f"{decode * batch:.1f}", spread, f"{ours[1] / decode:.2f}"
            cells += f"{weights * decode / copy:.0%}" if copy else "-", f"{row['peak_bytes'] / 1e9:.2f}"
            print(line(cells), flush=True)


def line(cells: Iterable[str]) -> str:
    """A line of the table: names on the left of their columns, numbers on the right."""
    columns = enumerate(zip(cells, WIDTHS))
    return "  ".join(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in columns)


def plot(report: dict[str, Any], path: Path) -> None:
    """Decoding speed by context and by number of sequences, a line for each model and engine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for model, found in report["models"].items():
        for engine in dict.fromkeys(row["engine"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["engine"] == engine]
            for axis, key, chosen in (
                (axes[0], "prompt", [row for row in rows if row["batch"] == 1]),
                (axes[1], "batch", [row for row in rows if row["prompt"] == BATCH_PROMPT]),
            ):
                speeds = [statistics.median(row["decode_tokens_per_second"]) * row["batch"] for row in chosen]
                if chosen:
                    axis.plot([row[key] for row in chosen], speeds, marker="o", label=f"{model}, {engine}")
    for axis, label in zip(axes, ("tokens before", f"sequences of {BATCH_PROMPT} tokens"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="decoded tokens per second")
        axis.grid(alpha=0.3, which="both")
        if axis.lines:
            axis.legend(fontsize="small")
    figure.suptitle(f"{report['device']}, MLX {report['versions']['mlx']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parses the arguments, runs every case, prints the table and writes the JSON."""
    parser = Parser("run", __doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="size[:4, :8 or :q4_k_m], or a file of yours")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES[:2])
    parser.add_argument("--full", action="store_true", help="every prompt length and number of sequences, all engines")
    parser.add_argument("--prompts", nargs="+", type=positive, help="tokens of the prompt (default 512)")
    parser.add_argument("--batches", nargs="+", type=positive, help="sequences at once (default 1)")
    parser.add_argument("--tokens", type=positive, default=256, help="tokens made after it (default 256)")
    parser.add_argument("--repeats", type=positive, default=3, help="interleaved rounds after a first that warms up")
    parser.add_argument("--output", type=to_write, default=Path("run.json"))
    parser.add_argument("--plot", type=to_write, help="also a picture, for which matplotlib is needed")
    arguments = parser.parse_args()
    names = ENGINES if arguments.full else arguments.engines
    if names[0] != "qwen_mlx":
        raise QwenMLXError("The first of --engines must be qwen_mlx, of whose speed the others' are shares.")
    if "transformers-static" in names and arguments.tokens > 1000:
        raise QwenMLXError("--tokens must be at most 1,000 with transformers-static, whose cache has room for that.")
    if arguments.plot:
        require_module("matplotlib", "pip install matplotlib")
    if "mlx-lm" in names:
        require_module("mlx_lm", "pip install -e '.[bench]', or choose --engines qwen_mlx")
    for case in arguments.models:
        require_case(case)
    copy = copy_bandwidth()
    versions = {}
    for name in ("mlx", "mlx-lm", "transformers", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    report: dict[str, Any] = {"device": describe(), "system": platform.platform(), "versions": versions}
    report |= {"kernels": ops.explain(), "tokens": arguments.tokens, "copy_bytes_per_second": copy, "models": {}}
    print(f"{describe()}\n{ops.explain()}\n{f'copy: {copy / 1e9:.0f} GB/s' if copy else ''}\n")
    print("Speeds are tokens a second. ours: qwen_mlx's, as a multiple of the engine's. of copy: the weights' bytes a")
    print("second, as a share of a copy's.\n")
    if "mlx-lm" in names and mx.default_device() == mx.cpu:
        print("On a CPU mlx-lm has MLX's own products, which are slow there; on a GPU the difference is smaller.\n")
    print(line(COLUMNS), flush=True)
    for case in arguments.models:
        model, fallback, bits, seconds = model_of(case)
        weights = weight_bytes(model)
        makers = engines_of(model, bits, fallback, names)
        rows = measure(model, makers, cases_of(arguments), arguments.tokens, arguments.repeats)
        show(case, rows, copy, weights)
        found = {"weight_bytes": weights, "load_seconds": seconds, "rows": rows}
        if case.endswith(".gguf"):
            found["llama.cpp"] = llama_bench(Path(case), 512, arguments.tokens, arguments.repeats)
            print(f"{case}: loaded in {seconds:.1f} s; llama-bench: {found['llama.cpp'] or 'not installed'}")
        report["models"][case] = found
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")  # what there is, should a later case fail
        del model, fallback, makers, rows
        gc.collect()
        mx.clear_cache()
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    cli.run(main)
