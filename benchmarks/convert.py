"""Speed and memory of the converter on a file of Qwen2.5-7B's shape in Q4_K_M, beside gguf2mlx.

    python -m benchmarks.convert [--layers 28 | --source FILE] [--folder FOLDER] [--json FILE]

The file (4.7 GB) is made in a temporary folder from random blocks with sane scales, and removed afterwards with what
was converted from it. Each converter runs in a process of its own, under `--cores` cores; memory is the process's
largest resident set, with the pages of a file that it maps. gguf2mlx runs if its package is installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

from benchmarks.arguments import Parser, positive, to_write
from qwen_mlx.cli import command as cli
from qwen_mlx.gguf.reader import GGUFFile

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 3584, 18944, 152064, 28, 4, 128


def tensors(layers: int) -> list[tuple[str, tuple[int, ...], T]]:
    """Names, shapes and types of Qwen2.5-7B as llama.cpp's Q4_K_M gives them: Q6_K for the head and, in the layers that
    its `use_more_bits` picks, for v and ffn_down.
    """
    kv = KV_HEADS * HEAD_DIM
    rows = [("token_embd.weight", (VOCABULARY, HIDDEN), T.Q4_K)]
    for n in range(layers):
        more = T.Q6_K if n < layers // 8 or n >= 7 * layers // 8 or (n - layers // 8) % 3 == 2 else T.Q4_K
        block = f"blk.{n}"
        rows += [
            (f"{block}.attn_norm.weight", (HIDDEN,), T.F32),
            (f"{block}.attn_q.weight", (HIDDEN, HIDDEN), T.Q4_K),
            (f"{block}.attn_q.bias", (HIDDEN,), T.F32),
            (f"{block}.attn_k.weight", (kv, HIDDEN), T.Q4_K),
            (f"{block}.attn_k.bias", (kv,), T.F32),
            (f"{block}.attn_v.weight", (kv, HIDDEN), more),
            (f"{block}.attn_v.bias", (kv,), T.F32),
            (f"{block}.attn_output.weight", (HIDDEN, HIDDEN), T.Q4_K),
            (f"{block}.ffn_norm.weight", (HIDDEN,), T.F32),
            (f"{block}.ffn_gate.weight", (INTERMEDIATE, HIDDEN), T.Q4_K),
            (f"{block}.ffn_up.weight", (INTERMEDIATE, HIDDEN), T.Q4_K),
            (f"{block}.ffn_down.weight", (HIDDEN, INTERMEDIATE), more),
        ]
    return [*rows, ("output_norm.weight", (HIDDEN,), T.F32), ("output.weight", (VOCABULARY, HIDDEN), T.Q6_K)]


def write_model(path: Path, layers: int, tokenizer: dict[str, object]) -> None:
    """A GGUF of random blocks; gguf-py writes the header, the tensors follow a few megabytes at a time."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    for name, value in tokenizer.items():
        getattr(writer, f"add_{name}")(value)
    rows = tensors(layers)
    for name, shape, kind in rows:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, (*shape[:-1], shape[-1] // block * size), np.dtype(np.uint8), nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    patterns = {kind: _pattern(kind) for kind in (T.F32, T.Q4_K, T.Q6_K)}
    with open(path, "ab") as file:
        file.write(bytes(-file.tell() % 32))
        for _, shape, kind in rows:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            left = int(np.prod(shape)) // block * size
            while left > 0:
                file.write(patterns[kind][:left])
                left -= len(patterns[kind])
            file.write(bytes(-file.tell() % 32))


def _pattern(kind: T) -> bytes:
    """About 8 MB of random blocks with scales of about 0.001."""
    rng = np.random.default_rng(int(kind))
    if kind == T.F32:
        return rng.standard_normal(INTERMEDIATE).astype(np.float32).tobytes()
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = rng.integers(0, 256, ((8 << 20) // size, size), np.uint8)
    scale = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    for at in {T.Q4_K: (0, 2), T.Q6_K: (208,)}[kind]:
        blocks[:, at : at + 2] = scale
    return blocks.tobytes()


def small_tokenizer() -> dict[str, object]:
    """The 256 bytes and two control tokens: what is measured is the tensors."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = [*bytes_to_unicode().values(), "he", "<|endoftext|>", "<|im_end|>"]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "qwen2",
        "token_list": names,
        "token_types": [1] * 257 + [3, 3],
        "token_merges": ["h e"],
        "eos_token_id": 258,
    }


def measure(command: list[str], cores: int) -> dict[str, float]:
    """Seconds, processor seconds, peak resident bytes and exit code (minus the signal, if one ended it)."""
    available = sorted(os.sched_getaffinity(0))[:cores] if hasattr(os, "sched_getaffinity") else None
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=(lambda: os.sched_setaffinity(0, available)) if available else None,
    )
    _, status, usage = os.wait4(process.pid, 0)
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "exit_code": os.waitstatus_to_exitcode(status),
    }


def compare(source: Path, output: Path, largest: int, cores: int) -> list[dict[str, object]]:
    """Runs every converter on `source` and prints a line for each. largest: weights of its largest tensor."""
    size, limit = source.stat().st_size, 1.5e9 + 2 * 4 * largest
    commands = {"qwen_mlx": ["qwen_mlx.convert", str(source), str(output)]}
    commands["qwen_mlx, Q6_K as 8 bits"] = [*commands["qwen_mlx"], "--requantize", "8"]
    if importlib.util.find_spec("gguf2mlx"):
        theirs = ["gguf2mlx", "--input", str(source), "--output", str(output), "--preserve-source-quant"]
        commands["gguf2mlx, preserve"] = theirs
    rows: list[dict[str, object]] = []
    print(f"{size / 1e9:.2f} GB in, {cores} cores; memory allowed: {limit / 1e9:.2f} GB")
    print(f"{'':26}  seconds  CPU s  MB/s of input  peak GB  GB out")
    for name, command in commands.items():
        row = measure([sys.executable, "-m", *command], cores)
        written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
        shutil.rmtree(output, ignore_errors=True)
        speed = (
            f"{size / row['seconds'] / 1e6:13.0f}"
            if not row["exit_code"]
            else f"{'exit code':>10}{row['exit_code']:3d}"
        )
        figures = f"{row['seconds']:7.1f}  {row['cpu_seconds']:5.1f}  {speed}  {row['peak_bytes'] / 1e9:7.2f}"
        print(f"{name:26}  {figures}  {written / 1e9:6.2f}", flush=True)
        rows.append({"name": name, **row, "bytes_in": size, "bytes_out": written, "allowed_bytes": limit})
    return rows


def main() -> None:
    parser = Parser("convert", __doc__)
    parser.add_argument("--layers", type=positive, default=28, help="of the synthetic model (default 28: 4.7 GB)")
    parser.add_argument("--source", type=Path, help="convert this GGUF file and not a synthetic one")
    parser.add_argument("--cores", type=positive, default=2)
    parser.add_argument("--folder", help="where to make the files (about 15 GB are needed)")
    parser.add_argument("--json", type=to_write, help="write the figures here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="qwen_mlx_convert.") as folder:
        source = arguments.source or Path(folder, "model.gguf")
        if arguments.source is None:
            write_model(source, arguments.layers, small_tokenizer())
        largest = max(math.prod(info.shape) for info in GGUFFile(source).tensors.values())
        rows = compare(source, Path(folder, "out"), largest, arguments.cores)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
