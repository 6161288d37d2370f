"""A model on several ranks: prefill, decode, communication and memory of each, and which model fits where.

    mlx.launch -n 2 --backend ring -- python -m benchmarks.parallel --model model.gguf
    mlx.launch -n 2 --backend nccl -- python -m benchmarks.parallel --shape 32B --json benchmarks/results/parallel.json
    python -m benchmarks.parallel --shape 32B       # one rank, to compare with
    python -m benchmarks.parallel --table           # the table of docs/parallel.md

--shape: random bfloat16 weights of a published shape, made on the device, each rank its own part.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from benchmarks.arguments import Parser, positive, to_write
from qwen_mlx.cli import command as cli
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.model.config import ModelConfig
from qwen_mlx.parallel.shards import Shard, rank_bytes

# layers, hidden size, heads, key/value heads, MLP width, vocabulary, tied head: as in the models' config.json.
SHAPES = {
    "0.5B": (24, 896, 14, 2, 4864, 151936, True),
    "1.5B": (28, 1536, 12, 2, 8960, 151936, True),
    "3B": (36, 2048, 16, 2, 11008, 151936, True),
    "7B": (28, 3584, 28, 4, 18944, 152064, False),
    "14B": (48, 5120, 40, 8, 13824, 152064, False),
    "32B": (64, 5120, 40, 8, 27648, 152064, False),
    "72B": (80, 8192, 64, 8, 29568, 152064, False),
}
CONTEXT = 8192  # tokens whose keys and values must fit beside the weights
ROOM = 1.5e9  # bytes for activations, MLX and Python
MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GB of memory that are sold
RANKS = (1, 2, 4)


def q4_k_m(config: ModelConfig) -> Callable[[str], float]:
    """Bits of a weight in llama.cpp's Q4_K_M as qwen_mlx keeps them on a GPU: Q4_K and Q6_K as in the file, Q5_0 and
    Q8_0, which stand in where rows are not whole blocks of 256, with scales and biases in float32."""
    shapes, n = config.parameter_shapes(), config.num_hidden_layers
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"

    def bits(name: str) -> float:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        more = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
        fine = name.startswith(head) or (more and (".v_proj." in name or ".down_proj." in name))
        whole = shapes[name][1] % 256 == 0
        return (6.5625 if whole else 10.0) if fine else (4.5 if whole else 7.0)

    return bits


# Bits of the weight `name` as it lies in a GPU's memory, scales included.
TYPES: dict[str, Callable[[ModelConfig], Callable[[str], float]]] = {
    "bfloat16": lambda config: lambda name: 16.0,
    "Q8_0": lambda config: lambda name: 10.0,
    "Q4_K_M": q4_k_m,
    "MLX, 8 bits": lambda config: lambda name: 8.5,
    "MLX, 4 bits": lambda config: lambda name: 4.5,
}


def config_of(shape: str) -> ModelConfig:
    """The configuration of a published size."""
    layers, hidden, heads, kv, mlp, vocabulary, tied = SHAPES[shape]
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
    )


def table() -> str:
    """Which size and type fits which memory on how many machines, in Markdown."""
    lines = ["| model | type | 1 machine | 2 machines | 4 machines |", "|---|---|---|---|---|"]
    for shape in SHAPES:
        config = config_of(shape)
        for kind, bits_of in TYPES.items():
            cells = []
            for n in RANKS:
                try:
                    need = rank_bytes(config, n, bits_of(config), CONTEXT) + ROOM
                except QwenMLXError:
                    cells.append("heads do not divide")
                    continue
                mac = next((gb for gb in MACS if usable(gb) >= need), None)
                cells.append(f"{need / 1e9:.1f} GB: " + (f"{mac} GB" if mac else "none"))
            lines.append(f"| {shape} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def usable(gigabytes: int) -> float:
    """Bytes that macOS lets the GPU use of a machine's memory, unless told otherwise: two thirds up to 36 GB, three
    quarters above."""
    return gigabytes * 2**30 * (2 / 3 if gigabytes <= 36 else 3 / 4)


def random_model(shape: str, group: Any) -> Any:
    """Random weights in bfloat16, scaled so that activations stay finite; only this rank's."""
    from mlx.utils import tree_map

    from qwen_mlx.backend import mx
    from qwen_mlx.generation.sampling import SamplingSettings
    from qwen_mlx.model.qwen2 import Qwen2
    from qwen_mlx.parallel import group as parallel

    config = config_of(shape)
    shard = Shard(group.rank(), group.size(), config) if group.size() > 1 else None
    model = Qwen2(config if shard is None else shard.local)

    def fill(array: Any) -> Any:
        if array.ndim == 1:
            return mx.ones(array.shape, mx.bfloat16)
        weight = mx.random.normal(array.shape, mx.bfloat16, scale=array.shape[-1] ** -0.5)
        mx.eval(weight)
        return weight

    model.update(tree_map(fill, model.parameters()))
    if shard is not None:
        parallel.connect(group)
        parallel.share(model, shard, group)
    model.generation_defaults = SamplingSettings(temperature=0)
    return model.eval()


def measure(model: Any, n_prompt: int, n_new: int) -> dict[str, float]:
    """Tokens a second of reading a prompt and of decoding, and communication's share."""
    from qwen_mlx.generation.engine import generate_tokens
    from qwen_mlx.generation.settings import GenerationSettings

    prompt = [(7 * i) % 1000 for i in range(n_prompt)]
    start = time.perf_counter()
    tokens = generate_tokens(model, prompt, GenerationSettings(prefill_step_size=2048))
    next(tokens)
    read = time.perf_counter() - start
    for _ in range(n_new):
        next(tokens)
    decode = time.perf_counter() - start - read
    tokens.close()
    row = {"prefill tok/s": n_prompt / read, "decode tok/s": n_new / decode}
    if model.ranks is not None:
        row["communication in prefill"] = model.ranks.communication_seconds(read, 0) / read
        row["communication in decode"] = model.ranks.communication_seconds(0, decode) / decode
    return row


def main() -> None:
    parser = Parser("parallel", __doc__)
    parser.add_argument("--model", help="a model's files; without --model and --shape: the default model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--prompt-tokens", type=positive, default=512)
    parser.add_argument("--new-tokens", type=positive, default=64)
    parser.add_argument("--repeat", type=positive, default=2)
    parser.add_argument("--json", type=to_write, help="add the result to this file, under its shape and ranks")
    parser.add_argument("--table", action="store_true", help="print the table of docs/parallel.md and end")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(), end="")
        return

    from mlx.utils import tree_flatten

    from qwen_mlx import backend, load
    from qwen_mlx.backend import mx

    group = mx.distributed.init()
    before = backend.peak_memory()
    if arguments.shape:
        model = random_model(arguments.shape, group)
    else:
        model, _ = load(arguments.model, group=group)
    peak = backend.peak_memory() - before
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    measure(model, min(arguments.prompt_tokens, 64), 4)  # compiles, and warms up
    runs = [measure(model, arguments.prompt_tokens, arguments.new_tokens) for _ in range(arguments.repeat)]
    row: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    row |= {"ranks": group.size(), "GB of weights a rank": weights / 1e9, "GB at loading's peak": peak / 1e9}
    row |= {"backend": backend.describe(), "prompt tokens": arguments.prompt_tokens, "mlx": metadata.version("mlx")}
    if group.rank() == 0:
        print(json.dumps(row, indent=1), flush=True)
        if arguments.json:
            old = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
            old[f"{arguments.shape or arguments.model or 'default'} on {group.size()}"] = row
            arguments.json.write_text(json.dumps(old, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
