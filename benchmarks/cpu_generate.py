"""`python -m benchmarks.cpu_generate`: qwen_mlx, llama.cpp, transformers and mlx-lm on a CPU, one file, one run.

Every engine runs in a process of its own, in turn, `--repeats` times over, and medians are compared: what else the
machine does hits all of them. A row is a prompt's length: reading it, and the tokens after it. llama.cpp runs where
llama-cpp-python is installed (pip builds it from source for eight minutes or more); it multiplies activations of 8
bits. mlx-lm runs as it comes, with the reference BLAS; it is so slow that it reads the shortest prompt, once. The
engines must agree on the first tokens in float32, or nothing is compared. Also: a process's start to its first text for
a prompt of about 40 tokens, and its peak memory. Prints a table, writes JSON. Needs the extras `cpu` and `bench`, 2 GB
of disk for the weights as mlx-lm and transformers read them, and about fifteen minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
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

from benchmarks.arguments import positive, require_module, to_write
from qwen_mlx.cli import command as cli

ENGINES = ("qwen_mlx", "llama.cpp", "transformers float32", "mlx-lm float32", "mlx-lm float16")
READ_GGUF = ENGINES[:2]
PROMPTS = (32, 64, 256, 2048)  # tokens
WORDS = "The quick brown fox jumps over the lazy dog, and nobody minds. "
PROMPT = "Write a function that reverses a string."  # 38 tokens with the chat template
SLOW_TOKENS = 3  # mlx-lm takes seconds a token

Start = Callable[[list[int]], Iterator[int]]  # a prompt's ids -> the tokens after it, greedy


def qwen_mlx(model: Path, _: str) -> tuple[Callable[[str], list[int]], Start]:
    """The engine's tokenizer, and what makes tokens."""
    from qwen_mlx import load
    from qwen_mlx.generation.engine import generate_tokens
    from qwen_mlx.generation.settings import GenerationSettings

    weights, tokenizer = load(model)
    return tokenizer.encode, lambda ids: (token.id for token in generate_tokens(weights, ids, GenerationSettings()))


def llama_cpp(model: Path, _: str) -> tuple[Callable[[str], list[int]], Start]:
    """As qwen_mlx, on as many threads as there are cores."""
    from llama_cpp import Llama

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    engine = Llama(str(model), n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)

    def start(ids: list[int]) -> Iterator[int]:
        engine.reset()
        return engine.generate(ids, temp=0.0)

    return lambda text: engine.tokenize(text.encode(), add_bos=False), start


def mlx_lm(model: Path, dtype: str) -> tuple[Callable[[str], list[int]], Start]:
    """As qwen_mlx."""
    import mlx.core as mx
    from mlx_lm import load as mlx_lm_load
    from mlx_lm.generate import generate_step

    weights, tokenizer = mlx_lm_load(str(model))
    weights.set_dtype(getattr(mx, dtype))
    mx.eval(weights.parameters())
    return tokenizer.encode, lambda ids: (token for token, _ in generate_step(mx.array(ids), weights, max_tokens=4096))


def transformers(model: Path, _: str) -> tuple[Callable[[str], list[int]], Start]:
    """As qwen_mlx."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.set_grad_enabled(False)

    def start(ids: list[int]) -> Iterator[int]:
        token, cache = torch.tensor([ids]), None
        while True:
            out = weights(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield int(token)

    return AutoTokenizer.from_pretrained(model).encode, start


def measure(engine: str, model: Path, prompts: list[int], decode: int) -> dict[str, Any]:
    """Runs in the engine's own process: for each prompt's length tok/s of it and of the tokens after it, and these; and
    the process's peak resident GB."""
    name, _, dtype = engine.partition(" ")
    makers = {"qwen_mlx": qwen_mlx, "llama.cpp": llama_cpp, "transformers": transformers, "mlx-lm": mlx_lm}
    tokenize, start = makers[name](model, dtype)
    rows = {}
    for prompt in prompts:
        ids, speeds = tokenize(WORDS * prompt)[:prompt], []
        for _ in range(1 if name == "mlx-lm" or prompt > 1000 else 3):
            steps = start(ids)
            begin = time.perf_counter()
            tokens = [next(steps)]
            first = time.perf_counter()
            tokens += itertools.islice(steps, decode)
            speeds.append((prompt / (first - begin), decode / (time.perf_counter() - first)))
        best = [max(column) for column in zip(*speeds)]  # the first one warms up
        rows[str(prompt)] = {"prefill": best[0], "decode": best[1], "tokens": list(map(int, tokens))}
    return {"rows": rows, "peak_gb": _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9}


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
    parser.add_argument("--prompts", nargs="+", type=positive, default=PROMPTS, help="tokens (default 32 64 256 2048)")
    parser.add_argument("--decode", type=positive, default=16, help="tokens after each (default 16)")
    parser.add_argument("--repeats", type=positive, default=3, help="interleaved runs of each engine (default 3)")
    parser.add_argument("--without", action="append", default=[], choices=ENGINES[1:], help="leave an engine out")
    parser.add_argument("--output", type=to_write, default=Path("cpu_generate.json"))
    parser.add_argument("--part", nargs=2, metavar=("ENGINE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part, model = arguments.part
        if part == "prepare":
            reference_folder(Path(arguments.model), Path(model))
        else:
            slow = part.startswith("mlx-lm")
            prompts = [min(arguments.prompts)] if slow else arguments.prompts
            tokens = min(SLOW_TOKENS, arguments.decode) if slow else arguments.decode
            print(json.dumps(measure(part, Path(model), prompts, tokens)))
        return

    from qwen_mlx.loading import hub

    missing = ["llama.cpp"] if importlib.util.find_spec("llama_cpp") is None else []
    engines = [engine for engine in ENGINES if engine not in (*arguments.without, *missing)]
    if set(engines) - set(READ_GGUF):
        for module in ("torch", "transformers", "mlx_lm"):
            require_module(module, "pip install -e '.[cpu,bench]'")
    gguf = hub.resolve(arguments.model)
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    starts = []
    sizes = ["--prompts", *map(str, arguments.prompts), "--decode", str(arguments.decode), "--model", str(gguf)]
    with tempfile.TemporaryDirectory() as folder:
        if set(engines) - set(READ_GGUF):
            _part("prepare", folder, sizes)
        for repeat in range(arguments.repeats):
            starts.append(start_to_first_token(gguf))
            for engine in engines:
                if repeat and engine.startswith("mlx-lm"):
                    continue
                found = json.loads(_part(engine, str(gguf) if engine in READ_GGUF else folder, sizes))
                runs[engine].append(found)
                for prompt, row in found["rows"].items():
                    speeds = f"prefill {row['prefill']:.1f} tok/s, decode {row['decode']:.2f} tok/s"
                    where = f"round {repeat + 1} of {arguments.repeats}, {engine}, prompt of {prompt}"
                    print(f"{where}: {speeds}", file=sys.stderr, flush=True)
    shortest = str(min(arguments.prompts))
    exact = [engine for engine in engines if engine == "qwen_mlx" or engine.endswith("float32")]
    first = {engine: runs[engine][0]["rows"][shortest]["tokens"][:SLOW_TOKENS] for engine in exact}
    if len(set(map(tuple, first.values()))) > 1:
        sys.exit(f"The engines do not agree on the first tokens: {first}")
    medians = {engine: _medians(found) for engine, found in runs.items()}
    show(medians)
    seconds, peak = statistics.median(s["seconds"] for s in starts), max(s["peak_gb"] for s in starts)
    print(f"process start to first text: {seconds:.1f} s, peak {peak:.2f} GB")
    packages = ("mlx", "mlx-lm", "llama-cpp-python", "torch", "transformers", "numpy", "numba")
    report = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "decode_tokens": arguments.decode,
        "medians": medians,
        "runs": runs,
        "start_to_first_token": starts,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {
        prompt: {key: statistics.median(run["rows"][prompt][key] for run in runs) for key in ("prefill", "decode")}
        for prompt in runs[0]["rows"]
    }
    return {"rows": rows, "peak_gb": statistics.median(run["peak_gb"] for run in runs)}


def show(medians: dict[str, dict[str, Any]]) -> None:
    """Prints a line for each prompt and engine; a ratio is qwen_mlx's speed over the engine's."""
    print(f"{'prompt, engine':28} prefill tok/s  qwen_mlx  decode tok/s  qwen_mlx  peak GB")
    for prompt, ours in medians["qwen_mlx"]["rows"].items():
        for engine, found in medians.items():
            row = found["rows"].get(prompt)
            if row is not None:
                ratios = [f"{ours[key] / row[key]:8.2f}x" for key in ("prefill", "decode")]
                print(
                    f"{prompt:>5} {engine:22} {row['prefill']:13.1f} {ratios[0]} {row['decode']:13.2f} {ratios[1]} "
                    f"{found['peak_gb']:8.2f}"
                )


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
