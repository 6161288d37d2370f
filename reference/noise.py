"""`python -m reference.noise`: measures how far the reference is from itself, and writes reference/tolerances.toml.

float32 is measured against float64, bfloat16 and float16 against float32, on the same weights and ids. Small random
models and a real file have sections of their own; of all layers and runs the largest counts.
"""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import numpy as np

from qwen_mlx.cli import command as cli
from qwen_mlx.errors import QwenMLXError

from . import tolerances
from .inputs import load_tokens, runs_of
from .measures import measure
from .taps import Run

SMALL_SHAPES = {
    "base": {},
    "gqa 1": {"num_key_value_heads": 4},
    "gqa 7, tied": {
        "hidden_size": 224,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "one layer, theta 1e4": {"num_hidden_layers": 1, "rope_theta": 10000.0},
    "five layers": {"num_hidden_layers": 5},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        },
        "max_position_embeddings": 256,
    },
    "sliding window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}


def small_ids(count: int, seed: int = 0) -> list[int]:
    """Random ids of the small models' vocabulary."""
    return [int(i) for i in np.random.default_rng(seed).integers(0, 256, count)]


def small_runs() -> list[Run]:
    """Every kind of run, short: one pass, chunks, token by token, a batch."""
    ids = small_ids(40)
    return [
        Run.prefill(ids),
        Run.chunked(ids, 16),
        Run.decode(ids[:14], 8),
        Run.padded([small_ids(9, 1), small_ids(14, 2), small_ids(5, 3)], 3),
    ]


def by_tap(*floors: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The largest of each kind of tap."""
    largest: dict[str, tuple[float, float]] = {}
    for one in floors:
        for key, (l2, row) in one.items():
            tap = key.rpartition(".")[2]
            old = largest.get(tap, (0.0, 0.0))
            largest[tap] = (max(old[0], l2), max(old[1], row))
    return largest


def floors_of_run(model, run: Run, dtype: str) -> dict[str, tuple[float, float]]:
    """(l2, row) by key of a float32 transformers model in `dtype`. Raises QwenMLXError where that overflows."""
    from . import torch_side

    rough_dtype, exact_dtype = (dtype, "float64") if dtype == "float32" else (dtype, "float32")
    exact, rough = (torch_side.record(torch_side.in_dtype(model, each), run) for each in (exact_dtype, rough_dtype))
    found = {}
    for key, array in exact.items():
        result = measure(run.valid(rough[key], key), run.valid(array, key))
        if result.problem:
            raise QwenMLXError(f"Hugging Face's own {dtype} has no noise floor at {key} ({result.problem}).")
        found[key] = (result.l2, result.row)
    return found


def measure_floors(model, runs: list[Run], dtype: str) -> dict[str, tuple[float, float]]:
    """Floors by tap of a float32 transformers model in `dtype`: the largest of all layers, calls and runs."""
    return by_tap(*(floors_of_run(model, run, dtype) for run in runs))


def small_floors(dtype: str) -> dict[str, tuple[float, float]]:
    """Floors over the sweep of small random models, which the tests' own maker makes."""
    from reference.small_models import hf_model

    models = (hf_model(seed, **shape) for seed, shape in enumerate(SMALL_SHAPES.values()))
    return by_tap(*(measure_floors(model, small_runs(), dtype) for model in models))


def main(arguments: list[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m reference.noise", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the real file of the section 'real'; the default model if not given")
    parser.add_argument("--small-only", action="store_true", help="keep the section 'real' as it is")
    options = parser.parse_args(arguments)
    from . import torch_side  # a sentence if torch is missing

    now = datetime.datetime.now().isoformat(" ", "minutes")  # two measurements of one day differ in it
    versions = f"torch {torch_side.torch.__version__}, transformers {torch_side.transformers.__version__}"
    about = f"{now}, {versions}, {platform.machine()}"
    dtypes = ("float32", "bfloat16", "float16")
    inputs = f"{len(SMALL_SHAPES)} small random models, {len(small_runs())} runs each"
    parts = [tolerances.section_text("small", d, small_floors(d), f"{inputs}; {about}") for d in dtypes]
    if options.small_only:
        known = tolerances.read() if tolerances.FILE.exists() else {}
        for dtype, section in known.get("real", {}).items():
            floors = {tap: (line["l2_floor"], line["row_floor"]) for tap, line in tolerances.lines(section)}
            parts.append(tolerances.section_text("real", dtype, floors, section["measured"]))
    else:
        from qwen_mlx.loading import hub

        path = hub.resolve(options.model)
        runs = list(runs_of(load_tokens(path, 64)).values())  # what the command compares if nothing else is asked for
        model = torch_side.load(Path(path))
        for dtype in dtypes:
            # transformers' float16 mask overflows to -inf within padding, and its NaN reaches what is none
            measured = [run for run in runs if dtype != "float16" or run.padding is None]
            floors = measure_floors(model, measured, dtype)
            parts.append(
                tolerances.section_text("real", dtype, floors, f"{path.name}, 64 tokens, {len(measured)} runs; {about}")
            )
    head = "# Written by `python -m reference.noise`; what the numbers mean stands in reference/tolerances.py.\n\n"
    tolerances.FILE.write_text(head + "\n".join(parts), encoding="utf-8")
    print(f"wrote {tolerances.FILE}")
    return 0


if __name__ == "__main__":
    cli.run(main)
