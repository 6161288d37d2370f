"""`python -m benchmarks.cpu_sampling`: what choosing a token costs, as a share of a step of the real 0.5B file.

Steps and choices alternate in one run; medians are compared. All features together means every setting at once.
"""

from __future__ import annotations

import statistics
import time

from benchmarks.arguments import Parser, positive
from qwen_mlx import SamplingSettings, load, ops
from qwen_mlx.backend import describe, mx
from qwen_mlx.cli import command as cli
from qwen_mlx.generation.sampling import log_probabilities, rule_out, sample

SETTINGS = {
    "greedy": SamplingSettings(),
    "Qwen2.5-Instruct's": SamplingSettings(0.7, 20, 0.8, 0.0, 1.05),
    "all features": SamplingSettings(
        *(0.7, 40, 0.95, 0.02, 1.05, 0.95),
        presence_penalty=0.5,
        frequency_penalty=0.2,
        no_repeat_ngram_size=4,
        xtc_probability=0.5,
        logit_bias={11: -1.0, 13: 2.0},
    ),
}


def main() -> None:
    """Prints a line for each kind of settings."""
    parser = Parser("cpu_sampling", __doc__)
    parser.add_argument("--repeats", type=positive, default=20)
    repeats = parser.parse_args().repeats
    model, tokenizer = load()
    ids = tokenizer.encode("def reverse(text):\n    return text[::-1]\n" * 20)
    seen, cache, end_ids = mx.array([ids]), model.make_cache(), tuple(tokenizer.eos_token_ids)
    key = mx.random.key(0)
    seconds: dict[str, list[float]] = {name: [] for name in ("step", *SETTINGS)}
    with ops.no_grad():
        mx.eval(model(mx.array([ids]), cache, 1))
        for _ in range(repeats + 2):
            start = time.perf_counter()
            logits = model(mx.array([[ids[0]]]), cache, 1)[:, -1]
            mx.eval(logits)
            seconds["step"].append(time.perf_counter() - start)
            for name, settings in SETTINGS.items():
                start = time.perf_counter()
                allowed = rule_out(logits, end_ids)
                token = sample(allowed, settings, seen, key, n_prompt=100, eos_token_ids=end_ids)
                mx.eval(token, log_probabilities(logits, token, 5) if name == "all features" else [])
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values[2:]) for name, values in seconds.items()}  # the first two warm up
    print(f"{describe()}; a decoding step: {median['step'] * 1e3:.1f} ms")
    for name in SETTINGS:
        print(f"{name:20} {median[name] * 1e3:6.2f} ms, {median[name] / median['step']:.1%} of a step")


if __name__ == "__main__":
    cli.run(main)
