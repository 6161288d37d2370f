"""The script that every rank runs in tests/parallel/test_parallel.py: it loads models and writes down what it computed.

python -m tests.helpers.parallel_worker JOBS.json FOLDER: FOLDER/RANK.json gets the results of each job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlx.utils import tree_flatten

from qwen_mlx import Qwen2, batch_generate, load, ops
from qwen_mlx.backend import mx
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.generation.engine import generate_tokens
from qwen_mlx.generation.sampling import SamplingSettings
from qwen_mlx.generation.settings import GenerationSettings
from qwen_mlx.model.fused import FusedModel

PROMPTS = [list(range(3, 23)), [7, 1, 9]]


def peak() -> int:
    """The most bytes this process has had in memory; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(job: dict, group: mx.distributed.Group | None) -> dict:
    """The results of one model: greedy ids, sampled ids, a batch's, and the bytes of this rank's parameters."""
    ops.compile_ahead([], [mx.float32], mx.float32)()  # the compiler's memory is no model's
    before = peak()
    try:
        model, tokenizer = load(job["model"], quantized=job.get("quantized"), group=group)
    except QwenMLXError as error:
        return {"error": str(error)}
    found: dict = {"peak": peak() - before}
    found["bytes"] = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    tokens = job.get("tokens", 6)
    prompt = job.get("prompt", PROMPTS[0])
    # Without a seed each rank would draw its own tokens; a chunk of 8 makes several passes of the prompt.
    for name, sampling in (("greedy", SamplingSettings(temperature=0)), ("sampled", SamplingSettings(temperature=1.5))):
        if name in job.get("kinds", ("greedy",)):
            settings = GenerationSettings(sampling, prefill_step_size=job.get("chunk", 8))
            made = generate_tokens(model, prompt, settings)
            found[name] = [next(made).id for _ in range(tokens)]
            made.close()
    if "batch" in job.get("kinds", ()):
        results = batch_generate(model, tokenizer, PROMPTS, max_tokens=tokens, temperature=0)
        found["batch"] = [result.token_ids for result in results]
        found["communication"] = results[0].stats.communication_seconds
    if "step" in job.get("kinds", ()):
        found["step"] = step_error(model)
    return found


def step_error(model: Qwen2) -> float:
    """The distance of the fused step's logits from the plain equations', relative to the largest."""
    from reference.emulator import emulate

    plain, fused, worst = model.make_cache(), model.make_cache(), 0.0
    with ops.no_grad():
        mx.eval(model(mx.array([PROMPTS[0]]), plain), model(mx.array([PROMPTS[0]]), fused))
        for token in (9, 250):
            expected = model(mx.array([[token]]), plain)
            mx.eval(expected)
            with emulate():
                form = FusedModel.of(model)
                assert form.supports_step(mx.array([[token]]), fused)
                logits = form(mx.array([[token]]), fused)
                mx.eval(logits)
            worst = max(worst, float(mx.abs(logits - expected).max() / mx.abs(expected).max()))
    return worst


def main() -> None:
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    group = mx.distributed.init()
    results = {job["name"]: run(job, group) for job in jobs}
    (folder / f"{group.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
