"""The command `selftest`: runs every kernel on this machine's GPU and compares it with float64.

Prints a table and writes a JSON file to attach to an issue. Exit status: 0 if every case is within its limit, 1 if not,
2 if there is no GPU to run on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path

from ..errors import QwenMLXError
from .command import Parser, program


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = Parser(
        prog=program("selftest"),
        description="Run every kernel on this machine's GPU, compare it with float64, and write what was measured.",
    )
    p.add_argument("--json", type=Path, default=Path("qwen_mlx_selftest.json"), help="where to write the results")
    p.add_argument(
        "--trial",
        action="store_true",
        help="try a model's kernels on this machine once more, and say what is used, instead of the self-test",
    )
    p.add_argument("--model", "-m", metavar="MODEL", help="the model of --trial (default: the default model)")
    p.add_argument("--jobs", type=int, default=1, help="processes that compile kernels side by side (default 1)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes and a machine without a GPU raise QwenMLXError."""
    options = parser().parse_args(argv)
    if options.jobs < 1:
        raise QwenMLXError(f"--jobs is {options.jobs}, expected 1 or more.")
    if not options.json.parent.is_dir() or options.json.is_dir():
        raise QwenMLXError(f"--json is {options.json}, expected a file in a folder that exists.")

    if options.trial:
        return _trial(options.model, options.json)
    if options.model is not None:
        raise QwenMLXError("--model is the model of --trial; add --trial, or leave it out.")

    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from .. import ops
    from ..backend import describe, mx
    from .selftest_cases import LIMIT, run_part

    if ops.executor() == "reference":
        reason = ops.explain().splitlines()[0].rpartition("(")[2].rstrip(")")
        raise QwenMLXError(
            f"No kernel to test: {reason}. Run it on a Mac with an Apple GPU, or on an NVIDIA GPU with the extra "
            "cuda12 or cuda13."
        )
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        parts = pool.map(run_part, range(options.jobs), [options.jobs] * options.jobs)
        rows = [row for part in parts for row in part]
    for row in rows:
        ulp, peer = ("-" if row[key] is None else f"{row[key]:.3g}" for key in ("ulp", "mlx_ulp"))
        verdict = "ok" if row["ok"] else f"FAILED {row.get('error', '')}"
        print(f"{row['case']:44} {row['dtype']:9} {ulp:>9} ulp   mlx's own {peer:>9}   {verdict}")
    failed = sum(not row["ok"] for row in rows)
    summary = {
        "device": describe(),
        "executor": ops.executor(),
        "platform": platform.platform(),
        "mlx": mx.__version__,  # type: ignore[attr-defined]  # not in its stub
        "limit_ulp": LIMIT,
        "cases": len(rows),
        "failed": failed,
    }
    # JSON has no infinity; a case that is off by one is told by its "ok".
    rows = [{k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    options.json.write_text(json.dumps({**summary, "results": rows}, indent=1))
    print(f"{len(rows) - failed} of {len(rows)} within {LIMIT:g} ulp of float64 on {describe()}; wrote {options.json}")
    return 1 if failed else 0


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
    os.environ["QWEN_MLX_KERNELS"] = "on"  # loading would hold the trial too
    model, _ = load(name)
    os.environ["QWEN_MLX_KERNELS"] = "try"
    verdict = kernels.prove(model, again=True)
    assert verdict is not None
    for case, (kernel, plain) in verdict.times.items():
        print(f"{case:48} {kernel * 1e6:10.1f} us   plain MLX {plain * 1e6:10.1f} us")
    print(ops.explain())
    data = {**trial.identity(kernels.spec_of(model)), **asdict(verdict)}
    path.write_text(json.dumps(data, indent=1))
    print(f"Kernels of {name or 'the default model'} on {trial.machine()}: {verdict}; wrote {path}")
    return 1 if verdict.refused else 0
