"""`python -m benchmarks.cpu_generate`: qwen_mlx, mlx-lm and transformers on a CPU, the same weights, one run.

Every engine runs in a process of its own, one after another, `--repeats` times over, and the medians are compared:
the machine's noise hits all of them. mlx-lm runs as it comes (without the BLAS that qwen_mlx loads). Prints a table and
writes JSON. Needs the extras `cpu` and `bench`, 12 GB of disk for the weights that mlx-lm and transformers read, and
about ten minutes.
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
from pathlib import Path

ENGINES = ("qwen_mlx", "transformers float32", "mlx-lm float32", "mlx-lm float16")
WORDS = "The quick brown fox jumps over the lazy dog, and nobody minds. "
SLOW_TOKENS = 3  # mlx-lm takes seconds a token


def measure(engine: str, model: Path, prefill: int, decode: int) -> dict[str, float]:
    """Runs in the engine's own process: tok/s of a prompt and of the tokens after it, peak resident GB."""
    if engine == "qwen_mlx":
        from qwen_mlx import SamplingSettings, load
        from qwen_mlx.generation import generate_ids

        weights, tokenizer = load(model)
        ids = tokenizer.encode(WORDS * prefill)[:prefill]

        def start():
            return generate_ids(weights, ids, sampling=SamplingSettings())

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

        def start():
            with torch.inference_mode():
                token, cache = ids, None
                while True:
                    out = weights(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
                    yield int(token)

    rounds = []
    for _ in range(1 if engine.startswith("mlx-lm") else 3):  # the first round warms up
        steps = start()
        begin = time.perf_counter()
        next(steps)
        first = time.perf_counter()
        for _ in range(decode):
            next(steps)
        rounds.append((prefill / (first - begin), decode / (time.perf_counter() - first)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    best = rounds[1:] or rounds
    return {
        "prefill": statistics.median(r[0] for r in best),
        "decode": statistics.median(r[1] for r in best),
        "peak_gb": peak / 1e9,
    }


def start_to_first_token(model: Path) -> dict[str, float]:
    """Seconds from starting `python -m qwen_mlx.generate` to the first token of a 40-token prompt, and its peak GB."""
    command = [sys.executable, "-m", "qwen_mlx.generate", "--model", str(model), "--max-tokens", "1", "--temp", "0"]
    begin = time.perf_counter()
    done = subprocess.run([*command, "--prompt", WORDS[:50]], capture_output=True, text=True, check=True)
    return {"seconds": time.perf_counter() - begin, "statistics": done.stderr.strip()}


def reference_folder(gguf: Path, folder: Path) -> None:
    """The file's weights in float32, as transformers reads them, for the engines that read no GGUF."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, default=str))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    """Parses the arguments, runs every engine in turn, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt (default 256)")
    parser.add_argument("--decode", type=int, default=24, help="tokens after it (default 24)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved runs of each engine (default 3)")
    parser.add_argument("--without", action="append", default=[], choices=ENGINES[1:], help="leave an engine out")
    parser.add_argument("--output", type=Path, default=Path("cpu_generate.json"))
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        engine, model = arguments.one
        slow = engine.startswith("mlx-lm")
        tokens = SLOW_TOKENS if slow else arguments.decode
        print(json.dumps(measure(engine, Path(model), arguments.prefill, tokens)))
        return

    from qwen_mlx import hub

    gguf = hub.resolve()
    engines = [engine for engine in ENGINES if engine not in arguments.without]
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    starts = []
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run([sys.executable, "-c", _PREPARE, str(gguf), temporary], check=True, capture_output=True)
        for repeat in range(arguments.repeats):
            starts.append(start_to_first_token(gguf))
            for engine in engines:
                if engine.startswith("mlx-lm") and repeat:
                    continue  # a minute each, and 40 times away from the others: once is enough
                model = gguf if engine == "qwen_mlx" else Path(temporary)
                command = [sys.executable, "-m", "benchmarks.cpu_generate", "--one", engine, str(model)]
                command += ["--prefill", str(arguments.prefill), "--decode", str(arguments.decode)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{engine} failed:\n{done.stderr}")
                runs[engine].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{repeat + 1}/{arguments.repeats} {engine}: {runs[engine][-1]}", file=sys.stderr)
    medians = {
        engine: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for engine, found in runs.items()
    }
    ours = medians["qwen_mlx"]
    print(f"{'':22} prefill {arguments.prefill}, tok/s      decode, tok/s        peak GB")
    for engine, row in medians.items():
        print(
            f"{engine:22} {row['prefill']:8.1f} ({ours['prefill'] / row['prefill']:6.2f} x) "
            f"{row['decode']:10.2f} ({ours['decode'] / row['decode']:6.2f} x) {row['peak_gb']:12.2f}"
        )
    seconds = statistics.median(start["seconds"] for start in starts)
    print(f"process start to first token: {seconds:.1f} s\n{starts[-1]['statistics']}")
    packages = ("mlx", "mlx-lm", "torch", "transformers", "numpy", "mkl")
    report = {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "prefill_tokens": arguments.prefill,
        "medians": medians,
        "runs": runs,
        "start_to_first_token": starts,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


_PREPARE = (
    "import sys; from pathlib import Path; from benchmarks.cpu_generate import reference_folder; "
    "reference_folder(Path(sys.argv[1]), Path(sys.argv[2]))"
)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
