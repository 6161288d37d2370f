"""`python -m benchmarks.run`: qwen_mlx against mlx-lm on the same weights, prefill and decode, in one process.

Random weights of the true shapes, so that no file is needed; both engines hold the very same arrays. Repeats are
interleaved and medians compared. Prints a table and writes JSON with machine and versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from qwen_mlx import ModelConfig, Qwen2, SamplingSettings, ops
from qwen_mlx.backend import describe, mx, nn
from qwen_mlx.generation import generate_ids
from qwen_mlx.layers import QuantizedEmbedding, QuantizedLinear, RawEmbedding, RawLinear, SideBySide

# hidden, intermediate, layers, heads, kv heads, vocabulary, tied: Qwen2.5's published config.json files
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
}


def config_of(size: str) -> ModelConfig:
    """The configuration of a published size."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    return ModelConfig(
        hidden, intermediate, layers, heads, kv_heads, hidden // heads, vocabulary, 1e-6, 1e6, 32768, tied
    )


def random_model(size: str, bits: int | None) -> Qwen2:
    """bfloat16 weights small enough for finite activations; with `bits`, matrices packed in groups of 64."""
    model = Qwen2(config_of(size))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    if bits:
        for name, module in model.named_modules():  # a joined matrix is packed as one
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            packed = mx.quantize(module.weight, group_size=64, bits=bits)
            if isinstance(module, nn.Embedding):
                new = QuantizedEmbedding(*packed, 64, bits, mx.bfloat16)
            else:
                new = QuantizedLinear(*packed, 64, bits)
                if "bias" in module:
                    new.bias = module.bias
            mx.eval(new.parameters())
            *path, last = name.split(".")
            parent = model
            for part in path:
                parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
            setattr(parent, last, new)
    return model


def raw_model(size: str) -> Qwen2:
    """Random Q4_K and Q6_K blocks as in llama.cpp's Q4_K_M: Q6_K for the head and, in half of the layers, v and
    down_proj."""
    config = config_of(size)
    model = Qwen2(config)
    model.set_dtype(mx.bfloat16)
    vocabulary, hidden, intermediate = config.vocab_size, config.hidden_size, config.intermediate_size
    kv = config.n_kv_heads * config.head_dim
    model.model.embed_tokens = RawEmbedding(random_blocks("q4_k", vocabulary, hidden), mx.bfloat16)
    if not config.tie_word_embeddings:
        model.lm_head = RawLinear(random_blocks("q6_k", vocabulary, hidden))
    for n, layer in enumerate(model.model.layers):
        eighth = config.n_layers // 8
        finer = "q6_k" if n < eighth or n >= 7 * eighth or (n - eighth) % 3 == 2 else "q4_k"
        attention, mlp = layer.self_attn, layer.mlp
        rows = {"q4_k": [(hidden + 2 * kv, "q4_k")], "q6_k": [(hidden + kv, "q4_k"), (kv, "q6_k")]}[finer]
        parts = [RawLinear(random_blocks(kind, count, hidden)) for count, kind in rows]
        attention.qkv_proj = parts[0] if len(parts) == 1 else SideBySide(parts)
        attention.o_proj = RawLinear(random_blocks("q4_k", hidden, hidden))
        mlp.gate_up_proj = RawLinear(random_blocks("q4_k", 2 * intermediate, hidden))
        mlp.down_proj = RawLinear(random_blocks(finer, hidden, intermediate))
        mx.eval(model.parameters())
    return model


def random_blocks(kind: str, rows: int, columns: int) -> ops.Matrix:
    """A matrix of random codes, and scales that keep its values within 0.05."""
    words = lambda *shape: mx.random.randint(0, 2**31 - 1, shape).astype(mx.uint32)  # noqa: E731
    if kind == "q4_k":
        blocks = words(rows, columns // 256, 36)
        blocks[..., 0] = mx.array([5e-5, 5e-5 * 7.5], mx.float16).view(mx.uint32)
        return ops.Matrix(ops.Format(kind, rows, columns), (blocks,))
    parts = [words(rows, columns // share) for share in (8, 16, 64)]
    factors = mx.full((rows, columns // 256), 1e-5, mx.float16)
    return ops.Matrix(ops.Format(kind, rows, columns), (*parts, factors))


def model_of(case: str) -> Qwen2:
    """The random model that "size", "size:bits" or "size:q4_k_m" names."""
    size, _, bits = case.partition(":")
    return raw_model(size) if bits == "q4_k_m" else random_model(size, int(bits) if bits else None)


def mlx_lm_twin(model: Qwen2, bits: int | None):
    """mlx-lm's model on the same arrays."""
    from mlx_lm.models import qwen2

    twin = qwen2.Model(qwen2.ModelArgs.from_dict(model.config.to_hf()))
    if bits:
        nn.quantize(twin, group_size=64, bits=bits)
    twin.load_weights(list(model.hf_parameters().items()), strict=True)
    mx.eval(twin.parameters())
    return twin.eval()


def ours(model: Qwen2, prompt: list[int]) -> Iterator[int]:
    return generate_ids(model, prompt, sampling=SamplingSettings(), prefill_chunk=2048)


def theirs(model, prompt: list[int]) -> Iterator[int]:
    from mlx_lm.generate import generate_step

    return (token for token, _ in generate_step(mx.array(prompt), model, max_tokens=-1))


def timed(start: Callable[[], Iterator[int]], tokens: int) -> tuple[float, float, list[int]]:
    """Seconds to the first token, tokens per second after it, and the tokens."""
    mx.synchronize()
    begin = time.perf_counter()
    steps = start()
    made = [next(steps)]
    first = time.perf_counter()
    made += itertools.islice(steps, tokens)
    return first - begin, tokens / (time.perf_counter() - first), made


def main() -> None:
    """Parses the arguments, runs every case, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        default=["0.5B", "0.5B:4", "1.5B", "7B", "7B:4", "7B:q4_k_m"],
        help="size[:bits or :q4_k_m]",
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens after it (default 256)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("run.json"))
    arguments = parser.parse_args()
    rows = []
    print(f"{describe()}\n{ops.explain()}\n")
    print(f"{'model':8} {'prefill ms':>22} {'ratio':>6} {'decode tok/s':>22} {'ratio':>6}  first different token")
    for case in arguments.models:
        size, _, bits = case.partition(":")
        raw = bits == "q4_k_m"
        bits = 4 if raw else int(bits) if bits else None
        model = random_model(size, bits)
        twin = mlx_lm_twin(model, bits)
        if raw:  # mlx-lm reads no GGUF: its own 4 bits stand beside it
            model = raw_model(size)
        prompt = [(7919 * i) % 150000 for i in range(arguments.prompt)]
        engines = {"qwen_mlx": partial(ours, model, prompt), "mlx-lm": partial(theirs, twin, prompt)}
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        made = {}
        for repeat in range(arguments.repeats + 1):
            for name, start in engines.items():
                prefill, decode, made[name] = timed(start, arguments.tokens)
                if repeat:  # the first round warms up
                    runs[name].append((prefill, decode))
        a, b = ([statistics.median(column) for column in zip(*runs[name])] for name in engines)
        same = "-" if raw else next((i for i, (x, y) in enumerate(zip(*made.values())) if x != y), None)
        print(
            f"{case:8} {a[0] * 1e3:10.1f} {b[0] * 1e3:11.1f} {b[0] / a[0]:6.2f} {a[1]:10.1f} {b[1]:11.1f} "
            f"{a[1] / b[1]:6.2f}  {same}",
            flush=True,
        )
        rows.append({"model": case, "runs": runs, "first_different_token": same})
        del model, twin, engines
        mx.clear_cache()
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    report = {"device": describe(), "system": platform.platform(), "versions": versions, "rows": rows}
    report |= {"prompt": arguments.prompt, "tokens": arguments.tokens}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
