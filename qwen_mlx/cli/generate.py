"""`python -m qwen_mlx.generate`: text from a prompt, on the command line."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError
from ..loading import hub
from ..parallel.link import alone, launched, on_first
from ..text.files import check_folder, check_utf8, read_text
from . import command as cli

if TYPE_CHECKING:
    from ..backend import mx
    from ..generation.engine import GenerationStats
    from ..generation.prompt_cache import PromptCache
    from ..generation.text import GenerationChunk
    from ..model.qwen2 import Qwen2
    from ..text.tokenizer import Tokenizer


SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "typical_p", "presence_penalty"),
    *("frequency_penalty", "no_repeat_ngram_size", "xtc_probability", "xtc_threshold"),
)


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = cli.Parser(
        prog="python -m qwen_mlx.generate",
        description="Generate text with Qwen2.5 on MLX. Without --model: Qwen2.5-Coder-0.5B-Instruct, fetched once.",
    )
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; - reads standard input")
    source.add_argument("--prompt-file", "-f", metavar="FILE", help="read the prompt from a UTF-8 file")
    source.add_argument("--list-models", action="store_true", help="show the models that are on this machine")
    p.add_argument("--raw", action="store_true", help="the prompt as it is, without the chat template")
    p.add_argument(
        "--logprobs", type=int, metavar="N", help="list each token's ln p and the N likeliest, on standard error"
    )
    add_arguments(p)
    return p


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments that every command that generates has: model, sampling, limits."""
    p.add_argument(
        "--model", "-m", metavar="MODEL", help=".gguf file, folder of safetensors, or hub id (org/repo[:quant])"
    )
    p.add_argument("--system", metavar="TEXT", help="system message")
    p.add_argument(
        "--max-tokens", "-n", type=int, default=512, metavar="N", help="tokens at most (default %(default)s)"
    )
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (can be repeated)")
    p.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable on one backend")
    sampling = p.add_argument_group("sampling (default: what the model's file or family says)")
    sampling.add_argument("--temp", type=float, dest="temperature", metavar="T", help="temperature; 0 is greedy")
    sampling.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens; 0 is off")
    sampling.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest that reach P; 1 is off")
    sampling.add_argument(
        "--min-p", type=float, metavar="P", help="drop tokens less likely than P times the best; 0 is off"
    )
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="over 1 discourages repeats; 1 is off")
    sampling.add_argument("--typical-p", type=float, metavar="P", help="keep tokens of expected surprise; 1 is off")
    sampling.add_argument("--presence-penalty", type=float, metavar="A", help="taken from tokens generated already")
    sampling.add_argument("--frequency-penalty", type=float, metavar="A", help="taken for each time they were")
    sampling.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="no run of N tokens twice; 0 is off")
    sampling.add_argument(
        "--xtc-probability", type=float, metavar="P", help="how often top choices are excluded; 0: off"
    )
    sampling.add_argument("--xtc-threshold", type=float, metavar="T", help="what counts as one (default 0.1)")
    sampling.add_argument(
        "--logit-bias", action="append", metavar="ID=X", help="add X to a token's logit (can be repeated)"
    )
    sampling.add_argument("--min-tokens", type=int, default=0, metavar="N", help="do not end before N tokens")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on CPU, bfloat16 on GPU"
    )
    p.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="keep the computed prompt in this file, and start from what it has",
    )
    p.add_argument(
        "--yarn", type=float, metavar="F", help="extend the context F times by YaRN; Qwen documents 4 (131,072 tokens)"
    )
    p.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 4),
        help="keep the attention cache in 8 or 4 bits: 0.28 or 0.16 of float32's memory, slower in a long context",
    )
    p.add_argument(
        "--max-kv-size",
        type=int,
        metavar="N",
        help="attend to the first 4 and the newest tokens, N in all: bounded memory, the middle of a long text is lost",
    )
    p.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="guess tokens with a smaller model of the same vocabulary, or with prompt-lookup; the same output, faster",
    )
    p.add_argument("--num-draft-tokens", type=int, metavar="N", help="guess at most N tokens at a time, 1 to 32")
    p.add_argument("--verbose", "-v", action="store_true", help="say what is used: model, dtype, sampling, libraries")


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt's text from wherever it was said to be. Raises QwenMLXError if it cannot be read, or is not UTF-8."""
    if arguments.prompt_file is not None:
        return read_text(arguments.prompt_file)
    prompt: str | None = arguments.prompt
    if prompt is None:
        raise QwenMLXError("no prompt: give --prompt TEXT, --prompt - for standard input, or --prompt-file FILE.")
    if prompt != "-":
        check_utf8(prompt, "--prompt")
        return prompt
    if launched():
        raise QwenMLXError("--prompt - never ends under a launcher such as mlx.launch; use --prompt-file FILE.")
    return read_text("-")


def list_models() -> None:
    """Prints the models that are cached on this machine, one a line."""
    models = hub.cached_models()
    for model in models:
        print(model)
    if not models:
        print(f"no models yet in {hub.cache_folder()}")


def read_bias(texts: list[str] | None) -> dict[int, float] | None:
    """--logit-bias ID=X as a mapping. Raises QwenMLXError if one is not of that form."""
    bias = {}
    for text in texts or []:
        token, _, value = text.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise QwenMLXError(f"--logit-bias is {text!r}, expected ID=X, a token's id and a number.") from None
    return bias or None


def ranks() -> contextlib.AbstractContextManager[mx.distributed.Group | None]:
    """parallel.together() where a launcher started several processes, without MLX where it did not."""
    if not launched():
        return contextlib.nullcontext()
    from ..parallel.group import together

    return together()


def open_model(
    arguments: argparse.Namespace, group: mx.distributed.Group | None = None
) -> tuple[Qwen2, Tokenizer, dict[str, Any], PromptCache | None]:
    """(model, tokenizer, arguments for stream_generate, prompt cache) as the command line says. Raises QwenMLXError,
    for what can be known without the weights before they are read."""
    if arguments.system is not None:
        check_utf8(arguments.system, "--system")
    for text in arguments.stop:
        check_utf8(text, "--stop")
    if group is not None and (arguments.draft_model or arguments.prompt_cache):
        raise QwenMLXError("--draft-model and --prompt-cache do not work with several ranks; leave them out.")
    if arguments.max_tokens < 1:
        raise QwenMLXError(f"--max-tokens is {arguments.max_tokens}, expected 1 or more.")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**64:
        raise QwenMLXError(f"--seed is {arguments.seed}, expected an integer from 0 to 2^64 - 1.")
    if arguments.draft_model is None and arguments.num_draft_tokens is not None:
        raise QwenMLXError("--num-draft-tokens needs --draft-model MODEL or --draft-model prompt-lookup.")
    from ..ops.dispatch import switched_off

    switched_off()  # refuses a wrong QWEN_MLX_KERNELS before a model is fetched
    path = hub.resolve(arguments.model)

    from .. import backend, ops
    from ..backend import blas
    from ..generation import drafts
    from ..generation.prompt_cache import PromptCache, check
    from ..generation.sampling import SamplingSettings
    from ..generation.text import check_choices
    from ..loading.load import load
    from ..model.cache import make_caches
    from ..text.tokenizer import Tokenizer, check_vocabulary

    sampling: dict[str, Any] = {name: getattr(arguments, name) for name in SAMPLING}
    sampling["logit_bias"] = read_bias(arguments.logit_bias)
    # Refuses what is impossible before the model is loaded; only a bias's token needs its vocabulary.
    given, logprobs = SamplingSettings().override(**sampling), getattr(arguments, "logprobs", None)
    check_choices(given, arguments.min_tokens, logprobs, arguments.max_tokens, 2**31)
    kind = {"bits": arguments.kv_bits, "max_size": arguments.max_kv_size}
    caches = make_caches(1, 128, **kind)  # refuses an impossible kind, too
    if arguments.prompt_cache is not None and any(kind.values()):
        raise QwenMLXError("--prompt-cache keeps the plain cache only: leave out --kv-bits and --max-kv-size.")
    draft = arguments.draft_model
    if draft is not None:
        drafts.check_cache(caches)
    if arguments.num_draft_tokens is not None:
        drafts.check_draft_tokens(arguments.num_draft_tokens, "--num-draft-tokens")
    if draft not in (None, drafts.LOOKUP):
        draft_path = hub.resolve(draft)
        check_vocabulary(Tokenizer.read(path).names, Tokenizer.read(draft_path).names, f"--draft-model {draft}")
    kept = arguments.prompt_cache is not None and os.path.exists(arguments.prompt_cache)
    if kept:
        check(arguments.prompt_cache)
    elif arguments.prompt_cache is not None:
        check_folder(arguments.prompt_cache, "--prompt-cache")
    line = cli.ProgressLine("Loading")
    try:
        model, tokenizer = load(path, dtype=arguments.dtype, yarn=arguments.yarn, progress=line, group=group)
        if draft not in (None, drafts.LOOKUP):
            draft = drafts.ModelDraft(load(draft_path, dtype=arguments.dtype, yarn=arguments.yarn, progress=line)[0])
    finally:
        line.clear()
    if arguments.verbose:
        dtype = str(model.model.norm.weight.dtype).removeprefix("mlx.core.")
        print(f"model: {path} ({dtype})", file=sys.stderr)
        print(f"sampling: {model.generation_defaults.override(**sampling)}", file=sys.stderr)
        print(f"backend: {backend.describe()}; BLAS: {blas.report()}", file=sys.stderr)
        print(ops.explain(), file=sys.stderr)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? instead of failing
    settings = {"max_tokens": arguments.max_tokens, "stop": arguments.stop, "seed": arguments.seed, **sampling}
    settings |= {"min_tokens": arguments.min_tokens, "logprobs": logprobs}
    if draft is not None:  # one object, so that what it has read is kept from answer to answer
        settings |= drafts.check_draft(draft, arguments.num_draft_tokens)
    cache = None
    if any(kind.values()):
        cache = PromptCache(model, functools.partial(model.make_cache, **kind))
    elif arguments.prompt_cache is not None:
        cache = PromptCache.load(arguments.prompt_cache, model) if kept else PromptCache(model)
    return model, tokenizer, settings, cache


def chance(tokenizer: Tokenizer, chunk: GenerationChunk) -> str:
    """A line on a token: ln p, its id and text, and the likeliest tokens."""

    def name(token: int) -> str:
        return f"{token} {(tokenizer.decode([token]) or tokenizer.names[token])!r}"

    others = "  ".join(f"{name(token)} {value:.3f}" for token, value in chunk.top_logprobs)
    return f"{chunk.logprob:8.3f}  {name(chunk.token)}" + (f"  of  {others}" if others else "")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    with ranks() as group:
        return _main(parser().parse_args(argv), group)


def _main(arguments: argparse.Namespace, group: mx.distributed.Group | None) -> int:
    if arguments.list_models:
        list_models()
        return 0
    prompt = on_first(lambda: read_prompt(arguments))
    model, tokenizer, settings, cache = open_model(arguments, group)

    from ..generation.engine import GenerationStats
    from ..generation.text import stream_generate

    stats, chances = GenerationStats(), []
    interrupted = False
    line = cli.ProgressLine("Reading the prompt")
    try:
        for chunk in stream_generate(
            model,
            tokenizer,
            prompt,
            system=arguments.system,
            raw=arguments.raw,
            prompt_cache=cache,
            progress=line,
            **settings,
        ):
            stats = chunk.stats
            print(cli.shown(chunk.text, sys.stdout), end="", flush=True)
            if chunk.logprob is not None:
                chances.append(chance(tokenizer, chunk))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        line.clear()
    print(flush=True)
    for text in chances:
        print(text, file=sys.stderr)
    print(statistics(stats, arguments.draft_model is not None), file=sys.stderr)
    if arguments.prompt_cache is not None and cache is not None and cache.ids:
        cache.save(arguments.prompt_cache)
    return 130 if interrupted else 0


def statistics(stats: GenerationStats, drafted: bool) -> str:
    """What it cost, in a line."""
    from .. import backend

    if not stats.generated_tokens:
        return "interrupted before the first token"
    reused = f" ({stats.reused_tokens} more from the cache)" if stats.reused_tokens else ""
    draft = ""
    if drafted:
        off = f", off for {stats.paused_tokens}" if stats.paused_tokens else ""
        accepted = f"{stats.accepted_tokens} of {stats.drafted_tokens} accepted ({stats.acceptance_rate:.0%})"
        draft = f"draft: {accepted}{off}; "
    together = stats.prompt_seconds + stats.generation_seconds
    shared = f"communication: {stats.communication_seconds / together:.0%} of the time; " if not alone() else ""
    return (
        f"prompt: {stats.prompt_tokens} tokens{reused}, {stats.prompt_per_second:.1f} tok/s; "
        f"generation: {stats.generated_tokens} tokens, {stats.generated_per_second:.1f} tok/s; {draft}{shared}"
        f"peak memory: {backend.peak_memory() / 1e9:.2f} GB; backend: {backend.describe()}"
    )
