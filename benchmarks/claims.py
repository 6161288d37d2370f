"""Prints figures of README.md beside fresh ones: `python -m benchmarks.claims`, about a minute.

The download, memory and duration are measured on this machine, with the default model. The speeds on an H200 and the
number of kernel cases are computed anew from benchmarks/results, which `python -m benchmarks.run` and
`qwen-mlx selftest` write.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from qwen_mlx.loading import hub

from .arguments import Parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
# README's rows: the runs' model, and the file that holds them.
MODELS = {
    "0.5B bfloat16": ("0.5B", "run_h200_0.5b"),
    "0.5B 4 bits": ("0.5B:4", "run_h200_0.5b"),
    "1.5B bfloat16": ("1.5B", "run_h200_2048"),
    "7B bfloat16": ("7B", "run_h200_dense"),
    "7B 4 bits": ("7B:4", "run_h200_7b"),
    "7B Q4_K_M (mlx-lm: its own 4 bits)": ("7B:q4_k_m", "run_h200_7b"),
}


def quoted(pattern: str) -> str:
    """The words of README that the first group of a pattern takes. Raises LookupError where README lacks them."""
    found = re.search(pattern, README)
    if found is None:
        raise LookupError(f"README.md holds nothing like {pattern!r}")
    return found[1]


def speeds() -> dict[str, tuple[str, str]]:
    """For each model README's row, "prefill; decode; tokens a second", and the same from the stored runs."""
    rows = {}
    for name, (model, file) in MODELS.items():
        engines = _runs(json.loads((RESULTS / f"{file}.json").read_text()), model)
        (our_prefill, our_decode), (prefill, decode) = engines["qwen_mlx"], engines["mlx-lm"]
        fresh = f"{prefill / our_prefill:.1f} times; {our_decode / decode:.1f} times; {our_decode:.0f}"
        cells = quoted(rf"\| {re.escape(name)} \| (.+) \|")
        rows[name] = cells.replace(" | ", "; "), fresh
    return rows


def _runs(report: dict[str, Any], model: str) -> dict[str, tuple[float, float]]:
    """By engine the medians of a model's runs: seconds of prefill, tokens a second of decoding."""
    if "rows" in report:
        runs = next(row["runs"] for row in report["rows"] if row["model"] == model)
        return {name: (median(p for p, _ in pairs), median(d for _, d in pairs)) for name, pairs in runs.items()}
    rows = [row for row in report["models"][model]["rows"] if row["prompt"] == 512 and row["batch"] == 1]
    return {r["engine"]: (median(r["prefill_seconds"]), median(r["decode_tokens_per_second"])) for r in rows}


def kernel_cases() -> tuple[str, str]:
    """The number of kernel cases on an H200, and of those that failed there."""
    report = json.loads((RESULTS / "selftest_h200.json").read_text())
    return quoted(r"\[all (\d+ cases)\]"), f"{len(report['results'])} cases, {report['failed']} failed"


def download() -> tuple[str, str]:
    """The size of the default model."""
    return quoted(r"fetches (\d+ MB) of weights"), f"{hub.resolve().stat().st_size / 1e6:.0f} MB"


def first_text() -> tuple[str, str]:
    """Memory of README's first command, on a machine that has the model already, and its seconds."""
    claim = quoted(r"needs (\d+ GB of memory)")
    command = [sys.executable, "-m", "qwen_mlx.generate", "--prompt", quoted(r'generate --prompt "([^"]+)"')]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    memory = re.search(r"peak memory: ([\d.]+ GB)", done.stderr)
    return claim, f"{memory[1] if memory else '?'} in {time.perf_counter() - start:.0f} s"


def main() -> None:
    Parser("claims", __doc__).parse_args()
    print("| figure | README | now |\n|---|---|---|")
    for name, (claim, fresh) in speeds().items():
        print(f"| {name} | {claim} | {fresh} |")
    for name, measure in (
        ("kernel cases on an H200", kernel_cases),
        ("download", download),
        ("first command", first_text),
    ):
        claim, fresh = measure()
        print(f"| {name} | {claim} | {fresh} |", flush=True)


if __name__ == "__main__":
    main()
