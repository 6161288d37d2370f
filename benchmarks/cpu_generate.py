"""`python -m benchmarks.cpu_generate`: qwen_mlx, mlx-lm and transformers on a CPU, the same weights, one run.

Every engine runs in a process of its own, in turn, `--repeats` times over, and medians are compared: what else the
machine does hits all of them. mlx-lm runs as it comes, with the reference BLAS; it is so slow that it runs
once, for a few tokens. The engines must agree on the first tokens in float32, or nothing is compared. Also: a process's
start to its first text for a prompt of about 40 tokens, and its peak memory. Prints a table and writes JSON. Needs the
extras `cpu` and `bench`, 2 GB of disk for the weights as mlx-lm and transformers read them, and about ten minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.arguments import positive, to_write
from qwen_mlx.cli import command as cli

ENGINES = ("qwen_mlx", "transformers float32", "mlx-lm float32", "mlx-lm float16")
WORDS = "The quick brown fox jumps over the lazy dog, and nobody minds. "
PROMPT = "Write a function that reverses a string."  # 38 tokens with the chat template
SLOW_TOKENS = 3  # mlx-lm takes seconds a token
ROUNDS = 4  # in each process; the first warms up


def measure(engine: str, model: Path, prefill: int, decode: int) -> dict[str, Any]:
    """Runs in the engine's own process: tok/s of a prompt and of the tokens after it, peak resident GB, the tokens."""
    note = ""
    start: Callable[[], Iterator[int]]
    if engine == "qwen_mlx":
        from qwen_mlx import load
        from qwen_mlx.generation.engine import generate_tokens
        from qwen_mlx.generation.settings import GenerationSettings

        weights, tokenizer = load(model)
        ids = tokenizer.encode(WORDS * prefill)[:prefill]

        def start():
            return (token.id for token in generate_tokens(weights, ids, GenerationSettings()))

    elif engine.startswith("mlx-lm"):
        import mlx.core as mx
        from mlx_lm import load as mlx_lm_load
        from mlx_lm.generate import generate_step

        weights, tokenizer = mlx_lm_load(str(model))
        weights.set_dtype(mx.float32 if engine.endswith("float32") else mx.float16)
        mx.eval(weights.parameters())
        ids = mx.array(tokenizer.encode(WORDS * prefill)[:prefill])

        def start():
            return (token for token, _ in generate_step(ids, weights, max_tokens=decode + 8))

    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        ids = torch.tensor([AutoTokenizer.from_pretrained(model).encode(WORDS * prefill)[:prefill]])
        torch.set_grad_enabled(False)

        def start():
            token, cache = ids, None
            while True:
                out = weights(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                yield int(token)

    rounds = []
    for _ in range(1 if engine.startswith("mlx-lm") else ROUNDS):
        steps = start()
        begin = time.perf_counter()
        tokens = [next(steps)]
        first = time.perf_counter()
        tokens += [next(steps) for _ in range(decode)]
        rounds.append((prefill / (first - begin), decode / (time.perf_counter() - first)))
    warm = rounds[1:] or rounds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "prefill": statistics.median(speed for speed, _ in warm),
        "decode": statistics.median(speed for _, speed in warm),
        "peak_gb": _bytes(peak) / 1e9,
        "tokens": tokens,
        "note": note,
    }


def start_to_first_token(model: Path) -> dict[str, Any]:
    """Seconds from starting `python -m qwen_mlx.generate` to its first text, and the process's peak resident GB."""
    command = [sys.executable, "-m", "qwen_mlx.generate", "--model", str(model), "--max-tokens", "8", "--temp", "0"]
    begin = time.perf_counter()
    process = subprocess.Popen([*command, "--prompt", PROMPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    seconds = time.perf_counter() - begin
    _, log = process.stdout.read(), process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"qwen_mlx.generate failed:\n{log}")
    return {"seconds": seconds, "peak_gb": _bytes(usage.ru_maxrss) / 1e9, "statistics": log.strip()}


def reference_folder(gguf: Path, folder: Path) -> None:
    """The file's weights in float32, as transformers reads them, for the engines that read no GGUF."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, default=str))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    """Parses the arguments, runs every engine in turn, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a GGUF in one file (default: the default model)")
    parser.add_argument("--prefill", type=positive, default=256, help="tokens of the prompt (default 256)")
    parser.add_argument("--decode", type=positive, default=16, help="tokens after it (default 16)")
    parser.add_argument("--repeats", type=positive, default=3, help="interleaved runs of each engine (default 3)")
    parser.add_argument("--without", action="append", default=[], choices=ENGINES[1:], help="leave an engine out")
    parser.add_argument("--output", type=to_write, default=Path("benchmarks/results/cpu_generate.json"))
    parser.add_argument("--part", nargs=2, metavar=("ENGINE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part, model = arguments.part
        if part == "prepare":
            reference_folder(Path(arguments.model), Path(model))
            return
        tokens = min(SLOW_TOKENS, arguments.decode) if part.startswith("mlx-lm") else arguments.decode
        print(json.dumps(measure(part, Path(model), arguments.prefill, tokens)))
        return

    from qwen_mlx.loading import hub

    gguf = hub.resolve(arguments.model)
    engines = [engine for engine in ENGINES if engine not in arguments.without]
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    starts = []
    sizes = ["--prefill", str(arguments.prefill), "--decode", str(arguments.decode), "--model", str(gguf)]
    with tempfile.TemporaryDirectory() as folder:
        _part("prepare", folder, sizes)
        for repeat in range(arguments.repeats):
            starts.append(start_to_first_token(gguf))
            for engine in engines:
                if repeat and engine.startswith("mlx-lm"):
                    continue
                found = json.loads(_part(engine, str(gguf) if engine == "qwen_mlx" else folder, sizes))
                runs[engine].append(found)
                speeds = f"prefill {found['prefill']:.1f} tok/s, decode {found['decode']:.2f} tok/s"
                print(f"round {repeat + 1} of {arguments.repeats}, {engine}: {speeds}", file=sys.stderr, flush=True)
    same = {tuple(found[0]["tokens"][:SLOW_TOKENS]) for engine, found in runs.items() if "float16" not in engine}
    if len(same) > 1:
        sys.exit(f"The engines do not agree on the first tokens: { ({e: f[0]['tokens'] for e, f in runs.items()}) }")
    medians = {
        engine: {key: statistics.median(run[key] for run in found) for key in ("prefill", "decode", "peak_gb")}
        for engine, found in runs.items()
    }
    ours = medians["qwen_mlx"]
    print(f"{'':22} prefill {arguments.prefill}, tok/s       decode, tok/s        peak GB")
    for engine, row in medians.items():
        print(
            f"{engine:22} {row['prefill']:8.1f} ({ours['prefill'] / row['prefill']:7.2f} x) "
            f"{row['decode']:10.2f} ({ours['decode'] / row['decode']:7.2f} x) {row['peak_gb']:12.2f}"
        )
    first = statistics.median(start["seconds"] for start in starts)
    peak = max(start["peak_gb"] for start in starts)
    print(f"process start to first text: {first:.1f} s, peak {peak:.2f} GB; {runs['qwen_mlx'][0]['note']}")
    packages = ("mlx", "mlx-lm", "torch", "transformers", "numpy", "numba")
    report = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "prefill_tokens": arguments.prefill,
        "decode_tokens": arguments.decode,
        "medians": medians,
        "runs": runs,
        "start_to_first_token": starts,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _part(part: str, model: str, sizes: list[str]) -> str:
    """The last line that `part` prints in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu_generate", *sizes, "--part", part, model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} failed:\n{done.stderr}")
    return "".join(done.stdout.splitlines()[-1:])


def _bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    cli.run(main)
