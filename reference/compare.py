"""`python -m reference.compare --model X`: is this port right? A table, an exit code, and on request a picture.

Runs Hugging Face's Qwen2ForCausalLM in float32 and this package's model in the dtype asked for on the same token ids,
and compares every activation of every layer. Exit code 0: every tap is within its tolerance. 1: the first diverging tap
is named, with its likeliest cause where one can be shown. 2: nothing could be compared, and why.
"""

from __future__ import annotations

import datetime
import functools
import gc
import json
import os
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from qwen_mlx.cli import command as cli
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.loading import hub
from qwen_mlx.model.config import ModelConfig
from qwen_mlx.text.tokenizer import Tokenizer

from . import tolerances
from .comparison import Comparison, compare, logits_line
from .inputs import PROMPT, config_of, runs_of, tokenizer_of
from .taps import TAPS, Run

HEAD = ("max abs", "rel L2", "worst row", "1 - cos", "tolerance", "floor")
RUNS = ("prefill", "chunked", "decode", "padded")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    _check_outputs(options)
    start = time.monotonic()
    path = hub.resolve(options.model)
    reference = hub.resolve(options.reference) if options.reference else path
    config, tokenizer = config_of(path), tokenizer_of(path)
    ids = _ids(options, config, tokenizer)
    _check_same_vocabulary(path, reference, config, tokenizer, ids)
    runs = [run for name, run in runs_of(ids).items() if name in options.runs]
    _check_memory(sum(trace_bytes(config, run) for run in runs), len(ids))

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' GGUF reader has a bar of its own
    from . import torch_side  # a sentence if torch is missing, after what can be said without it

    torch_side.transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        torch_side.transformers.utils.logging.disable_progress_bar()
    folder = Path(options.cache) if options.cache else hub.cache_folder() / "reference"
    digest = torch_side.content_hash(reference)
    traces, floors = _reference(torch_side, reference, digest, runs, folder, options)
    times = {"reference": time.monotonic() - start}

    from qwen_mlx import load

    start = time.monotonic()
    model, _ = load(path, dtype=options.dtype, quantized=options.quantized)
    times["load"] = time.monotonic() - start
    limits = tolerances.from_floors(floors, options.dtype) if floors else tolerances.tolerances("real", options.dtype)
    start = time.monotonic()
    comparisons = []
    for run, trace in zip(runs, traces):
        comparison = compare(model, run, trace, limits, options.dtype)
        if comparison.first:
            from .diagnose import diagnose

            comparison.diagnosis = diagnose(model, run, trace, comparison.first.key, options.dtype)
        comparisons.append(comparison)
        print(table(comparison))
    times["comparison"] = time.monotonic() - start
    print("; ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items()))
    about = {
        "model": path.name,
        "reference": reference.name,
        "reference_sha256": digest,
        "dtype": options.dtype,
        "limits": "this model's own noise" if floors else f"reference/{tolerances.FILE.name}",
        "ids": ids,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: metadata.version(name) for name in ("mlx", "torch", "transformers")},
        "seconds": times,
    }
    try:
        if options.json:
            document = {**about, "comparisons": [comparison.json() for comparison in comparisons]}
            _write(Path(options.json), json.dumps(document, indent=1))
        if options.report:
            from .report import write_report

            page = write_report(Path(options.report), comparisons, about)
    except OSError as error:
        print(verdict(comparisons))
        place = error.filename or options.report
        raise QwenMLXError(f"{place}: cannot be written ({error.strerror}); name another place.") from None
    if options.report:
        print(f"report: {page}")
    passed = all(comparison.passed for comparison in comparisons)
    if not floors and (not passed or not tolerances.measured("real", options.dtype).startswith(f"{path.name},")):
        print("The limits are those of the 0.5B model on 64 tokens; --noise measures this model's own.")
    print(verdict(comparisons))
    return 0 if passed else 1


def _write(file: Path, text: str) -> None:
    """Writes a file; none is left if it cannot be whole."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        if file.is_file():
            file.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from None


def _check_outputs(options) -> None:
    """Checks, before minutes of work, that what is asked for at the end can be written."""
    if options.report:
        from . import report  # noqa: F401  (a sentence if matplotlib is missing)
    for place, folder in ((options.report, options.report), (options.json, options.json and Path(options.json).parent)):
        try:
            if place:
                Path(folder).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise QwenMLXError(f"{place}: cannot be written ({error.strerror}); name another place.") from None
    if options.json and Path(options.json).is_dir():
        raise QwenMLXError(f"{options.json}: is a folder, expected the name of a file for --json.")


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m reference.compare",
        description="Is this port right? Every activation of every layer against Hugging Face's, for any Qwen2.5 file.",
        epilog="Exit code 0: all are within their tolerances; 1: the first that diverges is named; 2: nothing could be "
        "compared, and why.",
    )
    parser.add_argument("--model", help="a .gguf file, a folder or a hub id; the default model if not given")
    parser.add_argument("--reference", help="what Hugging Face reads, if not the same: a .gguf file or a folder")
    parser.add_argument("--dtype", default="float32", choices=tolerances.DTYPES, help="of our activations")
    parser.add_argument("--quantized", action="store_true", help="keep packed weights packed")
    parser.add_argument("--prompt", help="text to run on; else code and Chinese, repeated to --tokens")
    parser.add_argument("--tokens", type=int, default=64, help="at most so many tokens of the prompt (default 64)")
    parser.add_argument("--runs", nargs="+", default=["prefill"], choices=RUNS, help="default: prefill")
    parser.add_argument("--noise", action="store_true", help="measure this model's own noise floor and use it")
    parser.add_argument("--json", metavar="FILE", help="write every measure")
    parser.add_argument("--report", metavar="FOLDER", help="write an HTML page and pictures")
    parser.add_argument(
        "--cache", metavar="FOLDER", help="where the reference's activations are kept (0.5B: 3 MB a token)"
    )
    return parser


def _ids(options, config: ModelConfig, tokenizer: Tokenizer) -> list[int]:
    if options.tokens < 2:
        raise QwenMLXError(f"--tokens is {options.tokens}, expected at least 2.")
    text = PROMPT if options.prompt is None else options.prompt
    ids = tokenizer.encode(text)
    if not ids:
        raise QwenMLXError("--prompt is empty; give some text.")
    if options.prompt is None and options.tokens <= config.max_position_embeddings:
        ids = (ids * -(-options.tokens // len(ids)))[: options.tokens]
    elif len(ids) > options.tokens and len(ids) <= config.max_position_embeddings:
        ids = ids[: options.tokens]
    asked = len(ids) if options.prompt is not None else options.tokens
    if asked > config.max_position_embeddings:
        raise QwenMLXError(
            f"The prompt has {asked} tokens, more than the model's context of {config.max_position_embeddings}; "
            "give a shorter --prompt or fewer --tokens."
        )
    return ids


def _check_same_vocabulary(path: Path, reference: Path, config, tokenizer: Tokenizer, ids: list[int]) -> None:
    if reference == path:
        return
    other = config_of(reference)
    if other.vocab_size != config.vocab_size:
        raise QwenMLXError(
            f"{path} has a vocabulary of {config.vocab_size} and {reference} one of {other.vocab_size}; "
            "compare two forms of one model."
        )
    text = tokenizer.decode(ids, skip_special=False)
    if tokenizer_of(reference).encode(text) != tokenizer.encode(text):
        raise QwenMLXError(
            f"{path} and {reference} split the prompt into different tokens; compare two forms of one model."
        )


def trace_bytes(config: ModelConfig, run: Run) -> int:
    """Size of a float32 trace of a run."""
    hidden, wide = config.hidden_size, 3 * config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    values = seen = 0
    for size in run.chunks:
        seen += size
        layer = size * (6 * hidden + 3 * q + 3 * kv + wide + config.num_attention_heads * seen) + 2 * kv * seen
        values += config.num_hidden_layers * layer + size * (2 * hidden + config.vocab_size)
    return 4 * len(run.ids) * values


def _check_memory(needed: int, tokens: int) -> None:
    """Probabilities grow with the square of the prompt: a sentence instead of a process killed for its memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise QwenMLXError(
            f"The activations of {tokens} tokens take {needed / 1e9:.1f} GB and this machine has {memory / 1e9:.1f}; "
            "give fewer --tokens, or fewer --runs."
        )


def _reference(torch_side, path: Path, digest: str, runs: list[Run], folder: Path, options):
    """The reference's traces and, on request, its noise floor. The reference is loaded once, if at all, and freed."""

    @functools.cache
    def model():
        print(f"loading {path.name} with transformers ...", file=sys.stderr)
        return torch_side.load(path)

    traces = [torch_side.cached_trace(path, run, folder, model, digest)[0] for run in runs]
    floors = None
    if options.noise:
        from .noise import measure_floors

        floors = measure_floors(model(), runs, options.dtype)
    model.cache_clear()
    gc.collect()
    return traces, floors


def table(comparison: Comparison) -> str:
    """One line for each kind of tap: its worst result in all layers and calls."""
    lines = [
        f"{comparison.run}, {comparison.dtype}: {len(comparison.results)} taps",
        f"{'tap':<14}" + "".join(f"{name:>10}" for name in HEAD) + "  worst",
    ]
    worst = comparison.worst_by_tap()
    for tap in TAPS:
        if tap not in worst:
            continue
        result, m = worst[tap], worst[tap].measure
        numbers = f"{m.max_abs:>10.1e}{m.l2:>10.1e}{m.row:>10.1e}{abs(1 - m.cosine):>10.1e}"
        limits = f"{result.tolerance.l2:>10.1e}{result.tolerance.l2_floor:>10.1e}"
        at = m.problem or (f"{list(m.worst[0])} ours {m.worst[1]:.6g}, theirs {m.worst[2]:.6g}" if m.worst else "")
        mark = "" if result.passed else "  FAILED"
        lines.append(f"{tap:<14}{numbers}{limits}  {result.key} {at}{mark}")
    if comparison.logits:
        lines.append(logits_line(comparison))
    return "\n".join(lines)


def verdict(comparisons: list[Comparison]) -> str:
    failed = [comparison for comparison in comparisons if not comparison.passed]
    if not failed:
        return f"PASSED: all {sum(len(c.results) for c in comparisons)} taps are within their tolerances"
    first = failed[0]
    if first.first is None:
        return f"FAILED: {first.run} compared nothing"
    m = first.first.measure
    ratio = first.first.ratio
    beyond = f"{ratio:.3g} times its tolerance" if ratio < float("inf") else "where none is tolerated"
    what = m.problem or f"relative L2 {m.l2:.1e}, worst row {m.row:.1e}, {beyond}"
    cause = f"; likeliest cause: {first.diagnosis}" if first.diagnosis else ""
    return f"FAILED: {first.run}, {first.dtype}: the first diverging tap is {first.first.key} ({what}){cause}"


if __name__ == "__main__":
    cli.run(main)
