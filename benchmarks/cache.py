"""`python -m benchmarks.cache`: what each kind of cache costs: error, memory, time.

Error: logits of a text read in pieces of 256 tokens, against the same model on the plain cache, whose logits the
reference harness compares with Hugging Face's. KL divergence in nats per token (mean and largest), relative L2 of the
logits, how often the likeliest token is the same, and perplexity. mlx-lm's quantized cache runs in the same model.
Memory and time: the cache at `--context` tokens, the peak above it while 256 more are read, and a decoded token there.
Prints a table and writes JSON. Takes about three minutes on two cores.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import Parser, at_least, to_write
from qwen_mlx import load
from qwen_mlx.backend import describe, mx
from qwen_mlx.cli import command as cli
from qwen_mlx.loading import hub
from qwen_mlx.model.cache import KVCache
from qwen_mlx.model.qwen2 import Qwen2
from reference.measures import measure

from .cpu_generate import processor

PIECE = 256  # tokens read at once
KINDS: dict[str, dict[str, int]] = {
    "plain": {},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "rotating, half": {},
    "mlx-lm, 8 bits": {"bits": 8},
    "mlx-lm, 4 bits": {"bits": 4},
}


class Peer(KVCache):
    """mlx-lm's QuantizedKVCache under this package's model: each token's keys share a scale over 64 channels."""

    def __init__(self, bits: int) -> None:
        from mlx_lm.models.cache import QuantizedKVCache

        super().__init__()
        self._peer = QuantizedKVCache(group_size=64, bits=bits)

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        stored = self._peer.update_and_fetch(*(kv[:, :, i].swapaxes(1, 2) for i in (0, 1)))
        self.offset += kv.shape[1]
        keys, values = (mx.dequantize(*arrays, group_size=64, bits=self._peer.bits) for arrays in stored)
        return keys, values

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return (*self._peer.keys, *self._peer.values)

    @property
    def nbytes(self) -> int:
        return self._peer.nbytes


def make(model: Qwen2, kind: str, tokens: int) -> Sequence[KVCache]:
    if kind.startswith("mlx-lm"):
        return [Peer(**KINDS[kind]) for _ in range(model.config.num_hidden_layers)]
    return model.make_cache(**KINDS[kind], max_size=tokens // 2 if kind.startswith("rotating") else None)


def logits(model: Qwen2, ids: list[int], cache: Sequence[KVCache]) -> np.ndarray:
    """(tokens, vocab_size), read in pieces."""
    pieces = (mx.array(ids[start : start + PIECE])[None] for start in range(0, len(ids), PIECE))
    return np.concatenate([np.array(model(piece, cache)[0].astype(mx.float32)) for piece in pieces])


def error(logits: np.ndarray, plain: np.ndarray, ids: list[int]) -> dict[str, float]:
    """The distance of the logits (tokens, vocab_size) of `ids` from the plain cache's, in float64, a row at a time."""
    divergence, loss, same = [], [], []
    for ours, theirs, following in zip(logits, plain, [*ids[1:], None]):
        log_p, log_q = (row - np.logaddexp.reduce(row) for row in (theirs.astype(np.float64), ours.astype(np.float64)))
        divergence.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
        same.append(ours.argmax() == theirs.argmax())
        loss += [] if following is None else [-log_q[following]]
    return {
        "kl_mean": statistics.fmean(divergence),
        "kl_max": max(divergence),
        "relative_l2": measure(logits, plain).l2,
        "same_top_token": float(np.mean(same)),
        "perplexity": float(np.exp(np.mean(loss))),
    }


def cost(model: Qwen2, kind: str, context: int) -> dict[str, float]:
    """Memory and time with a cache of `context` random tokens."""
    config = model.config
    cache = make(model, kind, context)
    dtype = model.model.norm.weight.dtype
    for layer in cache:
        layer.reserve(context + PIECE + 8)
        for _ in range(context // PIECE):
            layer.update(mx.random.normal((1, PIECE, 2, config.num_key_value_heads, config.head_dim), dtype))
            mx.eval(layer.arrays)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(model(mx.zeros((1, PIECE), mx.int32), cache, logits_to_keep=1))
    peak = mx.get_peak_memory() - before
    times = []
    for _ in range(4):
        start = time.perf_counter()
        mx.eval(model(mx.zeros((1, 1), mx.int32), cache), [layer.arrays for layer in cache])
        times.append(time.perf_counter() - start)
    return {
        "bytes": sum(layer.nbytes for layer in cache),
        "peak_bytes_while_reading": peak,
        "token_seconds": statistics.median(times[1:]),
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser("cache", __doc__)
    parser.add_argument("--model", help="default: the built-in model")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "qwen_mlx" / "text" / "tokenizer.py")
    parser.add_argument("--tokens", type=at_least(2), default=768, help="of the text, for the error")
    parser.add_argument("--context", type=at_least(2), default=4096, help="tokens in the cache, for memory and time")
    parser.add_argument("--output", type=to_write, default=Path("cache.json"))
    arguments = parser.parse_args(argv)
    model, tokenizer = load(hub.resolve(arguments.model), dtype=arguments.dtype)
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"))[: arguments.tokens]
    plain = logits(model, ids, model.make_cache())
    rows: dict[str, dict[str, Any]] = {}
    print("| cache | KL mean | KL max | rel. L2 | same top | perplexity | MB | peak above, MB | ms a token |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        row = error(logits(model, ids, make(model, kind, len(ids))), plain, ids)
        row |= cost(model, kind, arguments.context)
        rows[kind] = row
        print(
            f"| {kind} | {row['kl_mean']:.2g} | {row['kl_max']:.2g} | {row['relative_l2']:.2g} "
            f"| {row['same_top_token']:.1%} | {row['perplexity']:.3f} | {row['bytes'] / 1e6:.0f} "
            f"| {row['peak_bytes_while_reading'] / 1e6:.0f} | {row['token_seconds'] * 1e3:.0f} |",
            flush=True,
        )
    result = {
        "machine": processor(),
        "backend": describe(),
        "dtype": str(model.model.norm.weight.dtype),
        "tokens": len(ids),
        "context": arguments.context,
        "caches": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
