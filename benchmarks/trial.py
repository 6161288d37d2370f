"""The trial of the kernels (qwen_mlx/ops/trial) on random weights of the published shapes: its time, and each case's.

Nothing is kept, and the model is not run. On NVIDIA this is the trial that a Mac would hold, with NVIDIA's own cuts.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict

from qwen_mlx.backend import mx
from qwen_mlx.cli import command
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.loading.kernels import spec_of
from qwen_mlx.ops.trial import Verdict, identity, machine
from qwen_mlx.ops.trial.session import hold

from .arguments import Parser, to_write
from .random_models import SHAPES, random_model, raw_model

PACKINGS = ("bfloat16", "4bit", "q4_k_m")


def main() -> int:
    """Parses the arguments, holds the trial and prints it; returns 1 where a part was refused."""
    parser = Parser("trial", __doc__)
    parser.add_argument("--size", choices=SHAPES, default="0.5B", help="(default %(default)s)")
    parser.add_argument("--packing", choices=PACKINGS, default="bfloat16", help="(default %(default)s)")
    parser.add_argument("--output", type=to_write, help="write what was measured as JSON")
    arguments = parser.parse_args()
    if mx.default_device() == mx.cpu:
        raise QwenMLXError("No kernel to try: the default device is the CPU. Run it on a machine with a GPU.")
    model = (
        raw_model(arguments.size)
        if arguments.packing == "q4_k_m"
        else random_model(arguments.size, 4 if arguments.packing == "4bit" else None)
    )
    spec = spec_of(model)
    start = time.perf_counter()
    known = identity(spec)
    verdict = hold(spec)
    seconds = time.perf_counter() - start
    show(verdict)
    where = f"{arguments.size} in {arguments.packing} on {machine()}"
    print(f"{where}: {len(verdict.times)} cases in {seconds:.1f} s: {verdict}")
    if arguments.output:
        arguments.output.write_text(json.dumps({**known, **asdict(verdict)}, indent=1) + "\n")
    return 1 if verdict.refused else 0


def show(verdict: Verdict) -> None:
    """Prints a line for each case and each choice."""
    for name, (kernel, plain) in verdict.times.items():
        print(f"{name:52} {kernel * 1e6:10.1f} us   plain MLX {plain * 1e6:10.1f} us   {plain / kernel:5.2f} times")
    for name, (cut, groups) in verdict.choices.items():
        print(f"{name:52} {cut}, at most {groups} threadgroups")


if __name__ == "__main__":
    command.run(main)
