"""`python -m benchmarks.profile`: where one decoded token's time goes on an NVIDIA GPU, kernel by kernel.

Random weights of the true shapes. The kernels of some tokens are traced by CUPTI through torch's profiler, which sees
all of a process, MLX's too. Prints a table for each model and writes JSON. "gaps" is when no kernel ran; the share is a
product's bytes per second over a copy's.
"""

from __future__ import annotations

import itertools
import json
import platform
import re
import statistics
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.arguments import Parser, positive, require_module, to_write
from benchmarks.engines import QwenMLX
from benchmarks.run import copy_bandwidth, model_of
from qwen_mlx import Qwen2, ops
from qwen_mlx.backend import describe, mx
from qwen_mlx.cli import command as cli
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.model.layers import join_rows


def traced(tokens, count: int) -> list[tuple[str, int, int]]:
    """Name, start and duration in ns of every kernel that ran while `count` tokens were made."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        list(itertools.islice(tokens, count))
        mx.synchronize()
    events = trace.profiler.kineto_results.events()
    kernels = [(e.name(), e.start_ns(), e.duration_ns()) for e in events if "CUDA" in str(e.device_type())]
    return sorted(kernels, key=lambda kernel: kernel[1])


def summary(kernels: list[tuple[str, int, int]], count: int) -> dict:
    """Totals in microseconds a token, by kernel."""
    busy, end = 0, 0
    by_name = defaultdict(list)
    for name, start, duration in kernels:
        busy += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
        by_name[re.sub(r"\s+", " ", name)[:160]].append(duration / 1e3)
    whole = end - kernels[0][1]
    rows = [
        {
            "kernel": name,
            "launches": len(times) / count,
            "us": statistics.median(times),
            "us_a_token": sum(times) / count,
        }
        for name, times in by_name.items()
    ]
    rows.sort(key=lambda row: -row["us_a_token"])
    return {"us_a_token": whole / count / 1e3, "gaps_us_a_token": (whole - busy) / count / 1e3, "kernels": rows}


def bytes_read(model: Qwen2, kernel: str) -> int | None:
    """Bytes of a matrix that a launch must read at least, by the sizes in its kernel's name; None: no matrix."""
    layer = model.model.layers[0]
    head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    attention, mlp = layer.self_attn, layer.mlp
    qkv, gate_up = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
    for place, modules in enumerate((qkv, [attention.o_proj], gate_up, [mlp.down_proj], [head])):
        for matrix in join_rows(modules):
            rows, columns = matrix.rows, matrix.columns
            sizes = f"matvec_qkv.*_{columns}" if place == 0 else f"(_swiglu.*_{rows // 2}|_{rows}_[tf]_[tf])_{columns}"
            if re.search(f"_{matrix.packing.kind}_", kernel) and re.search(f"{sizes}_", kernel):
                return sum(array.nbytes for array in matrix.arrays)
    return None


def main() -> None:
    """Parses the arguments, profiles every case, prints the tables and writes the JSON."""
    parser = Parser("profile", __doc__)
    parser.add_argument("--models", nargs="+", default=["0.5B", "0.5B:4", "1.5B", "7B", "7B:4", "7B:q4_k_m"])
    parser.add_argument("--prompt", type=positive, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("--tokens", type=positive, default=16, help="tokens traced (default 16)")
    parser.add_argument("--output", type=to_write, default=Path("profile.json"))
    arguments = parser.parse_args()
    require_module("torch", "pip install -e '.[bench]'")
    import torch

    if not torch.cuda.is_available():
        raise QwenMLXError("This needs an NVIDIA GPU, and a PyTorch with CUDA to read its clock.")
    torch.cuda.init()
    report = {"device": describe(), "system": platform.platform(), "prompt": arguments.prompt, "models": {}}
    copy = report["copy_bytes_per_second"] = copy_bandwidth()
    for case in arguments.models:
        model = model_of(case)[0]
        tokens = QwenMLX(model).start([[(7919 * i) % 150000 for i in range(arguments.prompt)]])
        list(itertools.islice(tokens, 24))
        begin = time.perf_counter()
        list(itertools.islice(tokens, 64))
        untraced = (time.perf_counter() - begin) / 64 * 1e6
        traced(tokens, 2)  # the profiler's own start
        found = summary(traced(tokens, arguments.tokens), arguments.tokens)
        for row in found["kernels"]:  # the roofline of a product with one vector is the reading of its matrix
            if (size := bytes_read(model, row["kernel"])) is not None:
                row |= {"bytes": size, "share_of_copy": size / (row["us"] * 1e-6) / copy}
        report["models"][case] = {"untraced_us_a_token": untraced, **found}
        whole, gaps = found["us_a_token"], found["gaps_us_a_token"]
        print(f"\n{case}: {untraced:.0f} us a token, traced {whole:.0f}, gaps {gaps:.0f}")
        for row in found["kernels"][:14]:
            share = f"{row['share_of_copy']:5.0%}" if "share_of_copy" in row else "     "
            counts = f"{row['us_a_token']:8.1f} = {row['launches']:6.1f} x {row['us']:7.2f}"
            print(f"  {counts} {share}  {row['kernel'][:100]}", flush=True)
        del model, tokens
        mx.clear_cache()
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")  # what is cut short keeps the cases before


if __name__ == "__main__":
    with ops.no_grad():
        cli.run(main)
