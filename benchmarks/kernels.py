"""Times every kernel on this machine's GPU beside the MLX functions it replaces: `python -m benchmarks.kernels`.

Decode is one token, prefill `--tokens`. A measurement evaluates many calls on rotating inputs at once and takes the
median of several. Decode counts building the graph as well, in Python ("eager") and replayed by mx.compile
("compiled"): there the GPU waits for the CPU. "gpu" is the sum of what the GPU's own clock says of each kernel, where
PyTorch with CUDA is there to read it. Prefill counts evaluation only, and on the GPU's clock one call after another:
MLX lets independent kernels overlap. Bandwidth counts every input and output byte once, by the GPU's clock where it can
be read, and is given as a share of a measured copy (negating 256 MiB) and of a copy of as many bytes. Exit status 2
without a GPU.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.arguments import Parser, positive, to_write
from qwen_mlx import ops
from qwen_mlx.backend import describe, mx, nn
from qwen_mlx.cli import command as cli

EPS = 1e-6
# hidden: (intermediate, query heads, key/value heads, head size) of Qwen2.5 0.5B, 1.5B, 7B, 32B and 72B
MODELS = {
    896: (4864, 14, 2, 64),
    1536: (8960, 12, 2, 128),
    3584: (18944, 28, 4, 128),
    5120: (27648, 40, 8, 128),
    8192: (29568, 64, 8, 128),
}

Arrays = tuple[mx.array, ...]


@dataclass(frozen=True)
class Subject:
    """A kernel, the MLX functions it replaces, and the inputs that differ from call to call."""

    name: str
    hidden: int
    fused: Callable[..., object]
    unfused: Callable[..., object]
    shapes: tuple[tuple[int, ...], ...]
    bytes_moved: int


def _silu_times(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


_mlx_lm_swiglu = mx.compile(_silu_times, shapeless=True)  # one kernel


def subjects(tokens: int, dtype: mx.Dtype) -> Iterator[Subject]:
    """Every kernel at every model's sizes."""
    for hidden, (inner, heads, kv, head_dim) in MODELS.items():
        weight = mx.random.normal((hidden,)).astype(dtype)
        row = tokens * hidden * dtype.size
        x = (1, tokens, hidden)

        def add_then_norm(x: mx.array, residual: mx.array, weight: mx.array = weight) -> Arrays:
            h = x + residual
            return h, mx.fast.rms_norm(h, weight, EPS)

        yield Subject(
            "rms_norm",
            hidden,
            lambda x, weight=weight: ops.rms_norm(x, weight, EPS),
            lambda x, weight=weight: mx.fast.rms_norm(x, weight, EPS),
            (x,),
            2 * row,
        )
        yield Subject(
            "add_rms_norm",
            hidden,
            lambda x, residual, weight=weight: ops.add_rms_norm(x, residual, weight, EPS),
            add_then_norm,
            (x, x),
            4 * row,
        )
        mlp = tokens * inner * dtype.size
        yield Subject(
            "swiglu",
            hidden,
            ops.swiglu,
            _silu_times,
            ((1, tokens, inner), (1, tokens, inner)),
            3 * mlp,
        )
        for label, peer in (("", _silu_times), (" against mlx-lm's", _mlx_lm_swiglu)):
            yield Subject(
                f"swiglu_joined{label}",
                hidden,
                ops.swiglu_joined,
                lambda joined, peer=peer: peer(*mx.split(joined, 2, axis=-1)),
                ((1, tokens, 2 * inner),),
                3 * mlp,
            )
        width = (heads + 2 * kv) * head_dim
        bias = mx.random.normal((width,)).astype(dtype)
        table = ops.Rotary.plain(head_dim, 1e6).table(100, tokens)

        def split_then_turn(
            qkv: mx.array,
            bias: mx.array = bias,
            heads: int = heads,
            kv: int = kv,
            head_dim: int = head_dim,
        ) -> Arrays:
            q, k, v = mx.split(qkv + bias, [heads * head_dim, (heads + kv) * head_dim], axis=-1)
            q, k, v = (y.reshape(*y.shape[:2], -1, head_dim).swapaxes(1, 2) for y in (q, k, v))
            turn = {"traditional": False, "base": 1e6, "scale": 1.0, "offset": 100}
            return mx.fast.rope(q, head_dim, **turn), mx.fast.rope(k, head_dim, **turn), mx.contiguous(v)

        yield Subject(
            "rope",
            hidden,
            lambda x, table=table: ops.rope(x, table),
            lambda x, head_dim=head_dim: mx.fast.rope(
                x.swapaxes(1, 2), head_dim, traditional=False, base=1e6, scale=1.0, offset=100
            ),
            ((1, tokens, heads, head_dim),),
            2 * tokens * heads * head_dim * dtype.size,
        )
        yield Subject(
            "qkv_rope",
            hidden,
            lambda x, bias=bias, table=table, heads=heads, kv=kv: ops.qkv_rope(x, bias, table, heads, kv),
            split_then_turn,
            ((1, tokens, width),),
            2 * tokens * width * dtype.size,
        )


def inputs_for(shapes: Sequence[tuple[int, ...]], dtype: mx.Dtype, sets: int) -> list[Arrays]:
    """Random inputs, `sets` times."""
    made = [tuple(mx.random.normal(shape).astype(dtype) for shape in shapes) for _ in range(sets)]
    mx.eval(made)
    return made


def time_calls(function: Callable[..., object], inputs: Sequence[Arrays], calls: int, repeats: int, mode: str) -> float:
    """Median seconds a call. mode: "eager", "compiled" or "evaluation" (the graph is built before the clock starts)."""

    def together(*sets: Arrays) -> list[object]:
        return [function(*sets[i % len(sets)]) for i in range(calls)]

    run = mx.compile(together) if mode == "compiled" else together
    mx.eval(run(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = run(*inputs)
        if mode == "evaluation":
            start = time.perf_counter()
        mx.eval(outputs)
        times.append((time.perf_counter() - start) / calls)
        del outputs
    return statistics.median(times)


def copy_seconds(size: int, repeats: int = 7) -> float:
    """Seconds to negate `size` bytes, of which as many are read as written, by the GPU's clock where it can be read."""
    inputs = inputs_for([(size // 4,)], mx.float32, max(2, min(8, 2**30 // size)))
    time_calls(mx.negative, inputs, 16, 3, "evaluation")  # allocates what the outputs need
    return gpu_time(mx.negative, inputs, apart=True) or time_calls(mx.negative, inputs, 16, repeats, "evaluation")


def gpu_time(function: Callable[..., object], inputs: Sequence[Arrays], apart: bool = False) -> float | None:
    """Seconds of GPU time a call, from CUPTI through PyTorch's profiler; None without it. apart: none overlap."""
    try:
        import torch
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    torch.cuda.init()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for some in [[arguments] for arguments in inputs] * 5 if apart else [inputs]:
            mx.eval([function(*arguments) for arguments in some])
        mx.synchronize()
    calls = len(inputs) * (5 if apart else 1)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / calls or None


def measure(tokens: int, dtype: mx.Dtype, copy: float, repeats: int) -> Iterator[dict[str, object]]:
    """Rows of the table for one number of tokens."""
    decode = tokens == 1
    for subject in subjects(tokens, dtype):
        # Calls with inputs of their own where mx.compile would merge equal calls; else enough sets that the inputs do
        # not stay in the cache, and enough calls for a clear time within 4 GiB of results.
        calls = 100 if decode else max(4, min(40, 2**32 // subject.bytes_moved))
        sets = calls if decode else max(2, min(8, 2**30 // subject.bytes_moved))
        inputs = inputs_for(subject.shapes, dtype, sets)
        row: dict[str, object] = {"kernel": subject.name, "hidden": subject.hidden, "tokens": tokens}
        for mode in ("eager", "compiled") if decode else ("evaluation",):
            fused, unfused = (
                time_calls(function, inputs, calls, repeats, mode) for function in (subject.fused, subject.unfused)
            )
            row |= {f"{mode}_us": fused * 1e6, f"{mode}_mlx_us": unfused * 1e6, f"{mode}_ratio": unfused / fused}
        fused_gpu, unfused_gpu = (gpu_time(f, inputs, apart=not decode) for f in (subject.fused, subject.unfused))
        if fused_gpu and unfused_gpu:
            row |= {"gpu_us": fused_gpu * 1e6, "gpu_mlx_us": unfused_gpu * 1e6, "gpu_ratio": unfused_gpu / fused_gpu}
        if not decode:
            seconds = fused_gpu or fused
            row["gb_s"] = subject.bytes_moved / seconds / 1e9
            row["share_of_copy"] = subject.bytes_moved / seconds / copy
            row["share_of_equal_copy"] = copy_seconds(subject.bytes_moved // 2) / seconds
        yield row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("kernels", __doc__)
    parser.add_argument("--tokens", type=positive, default=8192, help="tokens of the prefill shapes (default 8192)")
    parser.add_argument("--repeats", type=positive, default=9)
    parser.add_argument("--json", type=to_write, default=Path("kernels.json"))
    options = parser.parse_args(arguments)
    if ops.executor() in ("reference", "cpu"):
        print(
            "No kernel to time: this needs an Apple GPU, or an NVIDIA GPU with the extra cuda12 or cuda13, and "
            "QWEN_MLX_KERNELS other than off.",
            file=sys.stderr,
        )
        return 2
    copy = 2**29 / copy_seconds(2**28)
    print(f"{describe()}, MLX {metadata.version('mlx')}, bfloat16; copy: {copy / 1e9:.0f} GB/s")
    rows: list[dict[str, object]] = []
    report: dict[str, object] = {
        "command": f"python -m benchmarks.kernels --tokens {options.tokens} --repeats {options.repeats}",
        "device": describe(),
        "executor": ops.executor(),
        "platform": platform.platform(),
        "mlx": metadata.version("mlx"),
        "dtype": "bfloat16",
        "copy_gb_s": copy / 1e9,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with ops.no_grad():
        for tokens in (1, options.tokens):
            for row in measure(tokens, mx.bfloat16, copy, options.repeats):
                rows.append(row)
                print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
                options.json.write_text(json.dumps(report, indent=1))  # each time: what was measured is not lost
    return 0


if __name__ == "__main__":
    cli.run(main)
