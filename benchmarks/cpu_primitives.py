"""`python -m benchmarks.cpu_primitives`: what each step of the 0.5B model costs on a CPU.

Matrix products in float32 by qwen_mlx, PyTorch and MLX, each in a process of its own; then every other operation of the
model beside MLX's built-in one, for one new token after 300 and for a prompt of 256. Best of several, since what else
runs on a machine only ever adds. Prints Markdown and writes it beside the JSON. About three minutes, most of them MLX's
own products.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.arguments import Parser, to_write
from qwen_mlx.cli import command as cli

HIDDEN, FFN, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 896, 4864, 151936, 14, 2, 64
MATRICES = {  # rows, columns and copies: the model has 24 layers, which no cache holds
    "q, k, v": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, 24),
    "gate, up": (2 * FFN, HIDDEN, 12),
    "down": (HIDDEN, FFN, 12),
    "head": (VOCABULARY, HIDDEN, 1),
}
ROWS = (1, 40, 256)


def best_of(step: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call after a first one."""
    step()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return min(times)


def products(library: str) -> dict[str, dict[str, float]]:
    """GB/s of weights read and GFLOP/s of x W^T, by the number of rows of x and the matrix. In a process of its own."""
    found: dict[str, dict[str, float]] = {}
    if library == "torch":
        import torch

        name = f"PyTorch {torch.__version__}"
        make, multiply = torch.randn, torch.nn.functional.linear
    else:
        from qwen_mlx import ops
        from qwen_mlx.backend import mx

        name = "qwen_mlx" if library == "qwen_mlx" else "MLX"

        def make(rows, columns):
            matrix = mx.random.normal((rows, columns))
            mx.eval(matrix)
            return matrix

        def multiply(x, weight):
            with ops.no_grad():
                y = ops.matmul(x, weight) if library == "qwen_mlx" else x @ weight.T
            mx.eval(y)
            return y

    for matrix, (rows, columns, copies) in MATRICES.items():
        weights = [make(rows, columns) for _ in range(copies if library != "mlx" else 1)]
        for length in ROWS:
            if library == "mlx" and length > 40:
                continue  # minutes
            x = make(length, columns)
            repeats = 1 if library == "mlx" else 7
            seconds = best_of(lambda x=x, weights=weights: [multiply(x, w) for w in weights], repeats) / len(weights)
            found[f"{length} x {matrix}"] = {
                "gb_per_s": rows * columns * 4 / seconds / 1e9,
                "gflop_per_s": 2 * length * rows * columns / seconds / 1e9,
            }
    return {"name": name, "products": found}


def operations() -> dict[str, dict[str, float]]:
    """Microseconds of each operation of the model in float32, one new token after 300 and a prompt of 256."""
    from qwen_mlx import ops
    from qwen_mlx.backend import mx, nn
    from qwen_mlx.model.cache import KVCache, attention_mask
    from qwen_mlx.ops.exponential import exp

    rotary = ops.Rotary.plain(HEAD_DIM, 1e6)
    found: dict[str, dict[str, float]] = {}
    for case, offset, length in (("one token after 300", 300, 1), ("prompt of 256", 0, 256)):
        seen, table = offset + length, rotary.table(offset, length)
        weight, x = mx.ones((HIDDEN,)), mx.random.normal((1, length, HIDDEN))
        qkv, bias = mx.random.normal((1, length, 1152)), mx.random.normal((1152,))
        q = mx.random.normal((1, length, HEADS, HEAD_DIM))
        keys, values = mx.random.normal((2, 1, KV_HEADS, seen, HEAD_DIM))
        gate_up = mx.random.normal((1, length, 2 * FFN))
        gate, up = mx.split(gate_up, 2, axis=-1)
        scores = mx.random.normal((KV_HEADS, HEADS // KV_HEADS * length, seen))
        logits = mx.random.normal((1, VOCABULARY))
        kv = mx.random.normal((1, length, 2, KV_HEADS, HEAD_DIM))
        cache = KVCache()
        if offset:
            cache.update(mx.random.normal((1, offset, 2, KV_HEADS, HEAD_DIM)))
            mx.eval(cache.state)
        mx.eval(weight, x, qkv, bias, q, keys, values, gate_up, scores, logits, kv)
        mask = attention_mask(length, offset, None)

        def write(kv=kv, cache=cache, length=length):
            state = cache.update(kv)
            cache.trim(length)
            return state

        def built_in_attention(q=q, keys=keys, values=values, mask=mask):
            return mx.fast.scaled_dot_product_attention(q.swapaxes(1, 2), keys, values, scale=0.125, mask=mask)

        def built_in_rope(qkv=qkv, bias=bias, offset=offset, length=length):
            both = (qkv + bias)[..., : (HEADS + KV_HEADS) * HEAD_DIM].reshape(1, length, -1, HEAD_DIM).swapaxes(1, 2)
            return mx.fast.rope(both, HEAD_DIM, traditional=False, base=1e6, scale=1.0, offset=offset)

        steps: dict[str, Callable[[], object]] = {
            "rms_norm": lambda x=x, w=weight: ops.rms_norm(x, w, 1e-6),
            "rms_norm, mx.fast": lambda x=x, w=weight: mx.fast.rms_norm(x, w, 1e-6),
            "add_rms_norm": lambda x=x, w=weight: ops.add_rms_norm(x, x, w, 1e-6),
            "qkv_rope": lambda v=qkv, b=bias, t=table: ops.qkv_rope(v, b, t, HEADS, KV_HEADS),
            "qkv_rope, mx.fast": built_in_rope,
            "attention": lambda q=q, k=keys, v=values, m=mask: ops.attention(q, k, v, 0.125, m),
            "attention, mx.fast": built_in_attention,
            "swiglu_joined": lambda v=gate_up: ops.swiglu_joined(v),
            "swiglu, mlx.nn": lambda g=gate, u=up: nn.silu(g) * u,
            "exp of the scores": lambda s=scores: exp(s),
            "exp, mx": lambda s=scores: mx.exp(s),
            "softmax, mx": lambda s=scores: mx.softmax(s, axis=-1),
            "cache write": write,
        }
        if length == 1:
            steps |= {
                "argmax of the logits": lambda v=logits: mx.argmax(v, axis=-1),
                "sum of the logits": lambda v=logits: v.sum(),
                "an operation on 896 numbers": lambda x=x: x + 1,
            }
        for name, step in steps.items():
            count = 10 if length == 1 else 2
            seconds = best_of(lambda step=step, n=count: mx.eval([step() for _ in range(n)]), 15 if length == 1 else 7)
            found.setdefault(name, {})[case] = seconds / count * 1e6
    one = mx.zeros((1,))
    found["mx.eval of one operation, round trip"] = {
        "one token after 300": best_of(lambda: mx.eval(one + 1), 200) * 1e6
    }
    return found


def in_a_process(part: str) -> dict:
    """The JSON that this module's `part` prints in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.cpu_primitives", "--part", part]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(report: dict) -> str:
    """Two tables."""
    lines = [f"{report['machine']}. Best of several, float32. `python -m benchmarks.cpu_primitives`", ""]
    cases = [f"{rows} x {matrix}" for rows in ROWS for matrix in MATRICES]
    names = [entry["name"] for entry in report["products"]]
    lines += ["GB/s of weights for one row, GFLOP/s for more:", "", f"| rows x matrix | {' | '.join(names)} |"]
    lines += ["|---" * (len(names) + 1) + "|"]
    for case in cases:
        unit = "gb_per_s" if case.startswith("1 ") else "gflop_per_s"
        cells = [entry["products"].get(case, {}).get(unit) for entry in report["products"]]
        lines.append(f"| {case} | {' | '.join('' if cell is None else f'{cell:.1f}' for cell in cells)} |")
    lines += [
        "",
        "Microseconds of an operation:",
        "",
        "| operation | one token after 300 | prompt of 256 |",
        "|---|---|---|",
    ]
    for name, row in report["operations"].items():
        cells = (f"{row[case]:.0f}" if case in row else "" for case in ("one token after 300", "prompt of 256"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs every part in a process of its own, prints the tables and writes them."""
    parser = Parser("cpu_primitives", __doc__)
    parser.add_argument("--output", type=to_write, default=Path("cpu_primitives.json"))
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(operations() if arguments.part == "operations" else products(arguments.part)))
        return
    from .cpu_generate import processor

    report = {
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        "products": [in_a_process(name) for name in ("qwen_mlx", "torch", "mlx")],
        "operations": in_a_process("operations"),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    text = markdown(report)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    cli.run(main)
