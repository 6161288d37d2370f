"""The command `selftest`: is this machine's GPU right?

It runs every kernel and compares it with float64, a small model whose tokens transformers has computed, and the default
model where it is on this machine. It prints a table and one sentence, and writes a JSON file to attach to an issue.
Exit status: 0 if everything is right, 1 if not, 2 if there is no GPU to run on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError
from .command import Parser, ProgressLine, program

if TYPE_CHECKING:
    from multiprocessing.context import SpawnContext

NOT_HERE = "not on this machine (qwen-mlx generate fetches it)"


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = Parser(
        prog=program("selftest"),
        description="Run every kernel and two models on this machine's GPU, and say in a sentence whether it is right.",
    )
    p.add_argument(
        "--json",
        type=Path,
        default=Path("qwen_mlx_selftest.json"),
        metavar="FILE",
        help="write the results to this file (default %(default)s)",
    )
    p.add_argument(
        "--trial",
        action="store_true",
        help="try a model's kernels on this machine once more, and say what is used, instead of the self-test",
    )
    p.add_argument("--model", "-m", metavar="MODEL", help="the model of --trial (default: the default model)")
    p.add_argument(
        "--jobs", type=int, metavar="N", help="compile in N processes at a time (default: half the cores, at most 8)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes and a machine without a GPU raise QwenMLXError."""
    options = parser().parse_args(argv)
    if options.jobs is None:
        options.jobs = min(8, max(1, (os.cpu_count() or 1) // 2))
    if options.jobs < 1:
        raise QwenMLXError(f"--jobs is {options.jobs}, expected 1 or more.")
    if not options.json.parent.is_dir() or options.json.is_dir():
        raise QwenMLXError(f"--json is {options.json}, expected a file in a folder that exists.")

    if options.trial:
        return _trial(options.model, options.json)
    if options.model is not None:
        raise QwenMLXError("--model is the model of --trial; add --trial, or leave it out.")

    os.environ.setdefault("QWEN_MLX_KERNELS", "on")  # kernels that no trial has proven are those to test
    from .. import ops
    from ..backend import exact_float32

    exact_float32()
    if ops.executor() in ("reference", "cpu"):
        reason = ops.explain().splitlines()[0].rpartition("(")[2].rstrip(")")
        raise QwenMLXError(
            f"No kernel to test: {reason}. Run it on a Mac with an Apple GPU, or on an NVIDIA GPU with the extra "
            "cuda12 or cuda13."
        )
    rows = _kernels(options.jobs)
    for row in rows:
        ulp, peer = ("-" if row[key] is None else f"{row[key]:.3g}" for key in ("ulp", "mlx_ulp"))
        verdict = "ok" if row["ok"] else f"FAILED {row.get('error', '')}"
        print(f"{row['case']:44} {row['dtype']:9} {ulp:>9} ulp   mlx's own {peer:>9}   {verdict}")
    _write(options.json, rows, {})  # should a model end this process
    models = _models()
    for name, result in models.items():
        print(f"{name}: {result}")
    _write(options.json, rows, models)
    sentence, code = conclusion(rows, models)
    print(f"{sentence} Wrote {options.json}.")
    return code


def _kernels(jobs: int) -> list[dict[str, Any]]:
    """Runs all cases in processes of their own, which compile side by side."""
    import time

    from .selftest_cases import run_part, share_progress

    context = spawning()
    done, total = context.Value("i", 0), context.Value("i", 0)
    with (
        ProgressLine("Testing the kernels") as line,
        ProcessPoolExecutor(jobs, context, share_progress, (done, total)) as pool,
    ):
        parts = [pool.submit(run_part, part, jobs) for part in range(jobs)]
        while not all(part.done() for part in parts):
            time.sleep(0.1)
            line(done.value, max(total.value, 1))
    return [row for part in parts for row in _results(part)]


def spawning() -> SpawnContext:
    """Processes that do not look for modules in the folder that they run in, from Python 3.11 on."""
    from multiprocessing import get_context

    os.environ["PYTHONSAFEPATH"] = "1"
    return get_context("spawn")


def _results(part: Future[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a process, or one that says that a GPU's fault has ended it."""
    try:
        return part.result()
    except BrokenExecutor:
        ended = {"ulp": None, "mlx_ulp": None, "ok": False, "error": "the process ended, or the GPU ended it"}
        return [{"case": "a process of the self-test", "dtype": "any dtype", **ended}]


def _models() -> dict[str, str]:
    """The words for each model: "right", its fault, or why it was not tried."""
    from .selftest_models import default_model_fault, default_model_path, small_model_fault

    def result(fault: Callable[[], str | None]) -> str:
        try:
            return fault() or "right"
        except (RuntimeError, ValueError) as error:  # of MLX, or of the file
            return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

    with ProgressLine("Testing two models") as line:
        line(0, 2)
        results = {"small model": result(small_model_fault)}
        line(1, 2)
        path = default_model_path()
        if path is None:
            results["default model"] = NOT_HERE
        else:
            results["default model"] = result(lambda: default_model_fault(path))
    return results


def conclusion(rows: Sequence[Mapping[str, Any]], models: Mapping[str, str]) -> tuple[str, int]:
    """The sentence in which the self-test ends, and the exit status."""
    from ..ops.trial import machine

    wrong = [f"{row['case']} in {row['dtype']}" for row in rows if not row["ok"]]
    faults = [f"{name} ({result})" for name, result in models.items() if result not in ("right", NOT_HERE)]
    if not wrong and not faults:
        without = "" if NOT_HERE not in models.values() else f"; the default model is {NOT_HERE}"
        count = sum(result == "right" for result in models.values())
        return f"Right on {machine()}: {len(rows)} cases and {count} model{'s' * (count != 1)}{without}.", 0
    kernels = [f"{len(wrong)} of {len(rows)} cases, the first {wrong[0]}"] if wrong else []
    return f"Wrong on {machine()}: {'; '.join([*kernels, *faults])}.", 1


def _write(path: Path, rows: Sequence[Mapping[str, Any]], models: Mapping[str, str]) -> None:
    from .. import __version__, ops
    from ..backend import describe, mx
    from ..ops.trial import machine
    from .selftest_cases import LIMIT

    # JSON has no infinity; a case that is off by one is told by its "ok".
    finite = [{k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]
    summary = {
        "device": describe(),
        "machine": machine(),
        "executor": ops.executor(),
        "platform": platform.platform(),
        "qwen_mlx": __version__,
        "mlx": mx.__version__,  # type: ignore[attr-defined]  # not in its stub
        "limit_ulp": LIMIT,
        "cases": len(rows),
        "failed": sum(not row["ok"] for row in rows),
        "models": dict(models),
        "results": finite,
    }
    path.write_text(json.dumps(summary, indent=1))


def _trial(name: str | None, path: Path) -> int:
    """Holds a trial of a model's kernels on this machine, prints what it found, and writes it as JSON."""
    from dataclasses import asdict

    from .. import ops
    from ..backend import mx
    from ..loading import kernels
    from ..loading.load import load
    from ..ops import trial

    if mx.default_device() == mx.cpu:
        raise QwenMLXError("No kernel to try: the default device is the CPU. Run it on a machine with a GPU.")
    os.environ["QWEN_MLX_KERNELS"] = "try"  # which is read once, from here on
    with ops.forced("reference"):  # loading would hold the trial too
        model, _ = load(name)
    verdict = kernels.prove(model, again=True)
    assert verdict is not None
    for case, (kernel, plain) in verdict.times.items():
        print(f"{case:48} {kernel * 1e6:10.1f} us   plain MLX {plain * 1e6:10.1f} us")
    print(ops.explain())
    data = {**trial.identity(kernels.spec_of(model)), **asdict(verdict)}
    path.write_text(json.dumps(data, indent=1))
    print(f"Kernels of {name or 'the default model'} on {trial.machine()}: {verdict}; wrote {path}")
    return 1 if verdict.refused else 0
