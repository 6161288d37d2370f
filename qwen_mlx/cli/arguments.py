"""Everything that commands which generate share: arguments, and the model that they describe."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError, check_integer
from ..loading import hub
from ..parallel.control import launched
from ..text.files import check_folder, check_utf8
from .command import ProgressLine, require_at_least

if TYPE_CHECKING:
    from ..backend import mx
    from ..model.qwen2 import Qwen2
    from ..text.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")
SAMPLING = {  # option: its type, its placeholder, its help
    "--temp": (float, "T", "temperature; 0 is greedy"),
    "--top-k": (int, "K", "choose among the K likeliest tokens; 0 is off"),
    "--top-p": (float, "P", "choose among the likeliest tokens that together reach P; 1 is off"),
    "--min-p": (float, "P", "drop tokens less likely than P times the likeliest; 0 is off"),
    "--repetition-penalty": (float, "R", "over 1 discourages repeats; 1 is off"),
    "--typical-p": (float, "P", "keep tokens of expected surprise; 1 is off"),
    "--presence-penalty": (float, "A", "subtract A from the logits of tokens that were generated"),
    "--frequency-penalty": (float, "A", "subtract A for each time that a token was generated"),
    "--no-repeat-ngram-size": (int, "N", "never generate the same N tokens twice; 0 is off"),
    "--xtc-probability": (float, "P", "how often to exclude top choices; 0 is off"),
    "--xtc-threshold": (float, "T", "the probability that makes a top choice (default 0.1)"),
}
SETTINGS = ["temperature", *(option[2:].replace("-", "_") for option in [*SAMPLING][1:])]
# The library's name of an argument: the option that gives it.
OPTIONS = dict(zip(SETTINGS, SAMPLING)) | {
    name: "--" + name.replace("_", "-")
    for name in ("logit_bias", "max_tokens", "min_tokens", "stop", "logprobs", "reasoning_budget", "yarn")
}
OPTIONS |= {"max_size": "--max-kv-size", "json_schema": "--json-schema", "choices": "--choice"}


def add_model_arguments(p: argparse.ArgumentParser, max_tokens: int) -> None:
    """Adds the arguments that every command that generates has: model, sampling, limits."""
    p.add_argument(
        "--model", "-m", metavar="MODEL", help=".gguf file, folder of safetensors, or hub id (org/repo[:quant])"
    )
    add_adapter_argument(p)
    p.add_argument("--system", metavar="TEXT", help="system message")
    p.add_argument(
        "--max-tokens", "-n", type=int, default=max_tokens, metavar="N", help="tokens at most (default %(default)s)"
    )
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text or token (can be repeated)"
    )
    p.add_argument("--hide-reasoning", action="store_true", help="do not show what a model thinks before it answers")
    p.add_argument("--reasoning-budget", type=int, metavar="N", help="end a thought after N tokens")
    p.add_argument("--special", action="store_true", help="show control tokens in the text")
    p.add_argument("--seed", type=int, metavar="N", help="make sampling repeatable on one backend")
    sampling = p.add_argument_group("sampling (default: what the model's file or family says)")
    for (option, (kind, placeholder, text)), name in zip(SAMPLING.items(), SETTINGS):
        options = [option, *(["--temperature"] if option == "--temp" else [])]
        sampling.add_argument(*options, type=kind, dest=name, metavar=placeholder, help=text)
    sampling.add_argument(
        "--logit-bias", action="append", metavar="ID=X", help="add X to a token's logit (can be repeated)"
    )
    sampling.add_argument("--min-tokens", type=int, default=0, metavar="N", help="do not end before N tokens")
    p.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    p.add_argument(
        "--prompt-cache", metavar="FILE", help="keep the computed prompt in this file, and start from what it has"
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


@contextlib.contextmanager
def named_as_options() -> Iterator[None]:
    """Lets the library's sentences about its arguments name the command line's options."""
    try:
        yield
    except QwenMLXError as error:
        words = re.sub(r"^\w+(?= is | gives )|\b[a-z]+_\w+\b", lambda m: OPTIONS.get(m[0], m[0]), str(error))
        raise type(error)(words) from None


def add_adapter_argument(p: argparse.ArgumentParser, required: bool = False) -> None:
    """Adds --adapter to a command that reads a model."""
    p.add_argument(
        "--adapter",
        action="append",
        required=required,
        metavar="PATH[:SCALE]",
        help="a LoRA or DoRA adapter: folder of peft's or mlx-lm's, .gguf file, or hub id (can be repeated)",
    )


def ranks() -> contextlib.AbstractContextManager[mx.distributed.Group | None]:
    """parallel.group.together() where a launcher started several processes; where it did not, MLX is not imported."""
    if not launched():
        return contextlib.nullcontext()
    from ..parallel.group import together

    return together()


def check_length(arguments: argparse.Namespace, prompt: str) -> None:
    """Raises QwenMLXError for a prompt of over a million characters that the model's context cannot hold: before the
    weights are read."""
    if len(prompt) < 1_000_000:
        return
    from ..loading.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(hub.resolve(arguments.model))
    config = checkpoint.config if arguments.yarn is None else checkpoint.config.with_yarn(arguments.yarn)
    checkpoint.tokenizer.check_length(prompt, config.context_length)


@named_as_options()
def open_model(
    arguments: argparse.Namespace, group: mx.distributed.Group | None
) -> tuple[Qwen2, Tokenizer, dict[str, Any]]:
    """The model, its tokenizer and the arguments of stream_generate or Chat that the command line asks for.

    Everything that can be refused without the weights is refused before they are read. Raises QwenMLXError.
    """
    draft, cache_file = arguments.draft_model, arguments.prompt_cache
    for option, texts in {"--system": [arguments.system or ""], "--stop": arguments.stop}.items():
        for text in texts:
            check_utf8(text, option)
    if group is not None and (draft or cache_file):
        raise QwenMLXError("--draft-model and --prompt-cache do not work with several ranks; leave them out.")
    require_at_least(1, "--max-tokens", arguments.max_tokens)
    if arguments.seed is not None and not 0 <= arguments.seed < 2**64:
        raise QwenMLXError(f"--seed is {arguments.seed}, expected an integer from 0 to 2^64 - 1.")
    if draft is None and arguments.num_draft_tokens is not None:
        raise QwenMLXError("--num-draft-tokens needs --draft-model MODEL or --draft-model prompt-lookup.")
    from ..ops.dispatch import switched_off

    switched_off()  # refuses a wrong QWEN_MLX_KERNELS before a model is fetched
    path = hub.resolve(arguments.model)

    from .. import backend, ops
    from ..generation import drafts
    from ..generation.prompt_cache import PromptCache, read_header
    from ..generation.sampling import SamplingSettings
    from ..generation.settings import MAX_DRAFT_TOKENS, GenerationSettings
    from ..loading.load import load
    from ..model.cache import make_caches
    from ..text.tokenizer import Tokenizer, check_vocabulary

    sampling: dict[str, Any] = {name: getattr(arguments, name) for name in SETTINGS}
    sampling["logit_bias"] = _read_bias(arguments.logit_bias)
    logprobs = getattr(arguments, "logprobs", None)
    # A bias may name a token that the vocabulary lacks, which is known later.
    limits = {name: getattr(arguments, name) for name in ("max_tokens", "min_tokens", "stop", "reasoning_budget")}
    GenerationSettings(SamplingSettings().override(**sampling), **limits, logprobs=logprobs)
    cache_kind = {"bits": arguments.kv_bits, "max_size": arguments.max_kv_size}
    caches = make_caches(1, 128, **cache_kind)  # refuses an impossible kind
    if cache_file is not None and any(cache_kind.values()):
        raise QwenMLXError("--prompt-cache keeps the plain cache only: leave out --kv-bits and --max-kv-size.")
    if draft is not None:
        drafts.check_cache(caches)
    if arguments.num_draft_tokens is not None:
        expected = f"1 to {MAX_DRAFT_TOKENS}"
        check_integer("--num-draft-tokens", arguments.num_draft_tokens, 1, MAX_DRAFT_TOKENS, expected)
    draft_path = None if draft in (None, drafts.LOOKUP) else hub.resolve(draft)
    if draft_path is not None:
        check_vocabulary(Tokenizer.read(path).names, Tokenizer.read(draft_path).names, f"--draft-model {draft}")
    saved = cache_file is not None and os.path.exists(cache_file)
    if saved:
        read_header(cache_file)
    elif cache_file is not None:
        check_folder(cache_file, "--prompt-cache")
    with ProgressLine(f"Loading {path.name}") as line:
        load_as_asked = functools.partial(load, dtype=arguments.dtype, yarn=arguments.yarn, progress=line)
        model, tokenizer = load_as_asked(path, adapter=arguments.adapter, group=group)
        if draft_path is not None:
            draft = load_as_asked(draft_path)[0]
    if arguments.verbose:
        dtype = str(model.model.norm.weight.dtype).removeprefix("mlx.core.")
        print(f"model: {path} ({dtype})", file=sys.stderr)
        for name in arguments.adapter or []:
            print(f"adapter: {name}", file=sys.stderr)
        print(f"sampling: {model.generation_defaults.override(**sampling)}", file=sys.stderr)
        print(f"backend: {backend.describe()}", file=sys.stderr)
        print(f"products of float32 numbers: {backend.float32_products()}", file=sys.stderr)
        print(ops.explain(), file=sys.stderr)
    cache = None
    if saved:
        cache = PromptCache.load(cache_file, model)
    elif cache_file is not None or any(cache_kind.values()):
        cache = PromptCache(model, functools.partial(model.make_cache, **cache_kind))
    settings = {name: getattr(arguments, name) for name in ("max_tokens", "stop", "seed", "system", "min_tokens")}
    settings |= {"skip_special_tokens": not arguments.special, "reasoning_budget": arguments.reasoning_budget}
    settings |= {"draft_model": draft, "num_draft_tokens": arguments.num_draft_tokens, "logprobs": logprobs}
    return model, tokenizer, settings | sampling | {"prompt_cache": cache}


def _read_bias(texts: list[str] | None) -> dict[int, float] | None:
    bias = {}
    for text in texts or []:
        token, _, value = text.partition("=")
        try:
            bias[int(token)] = float(value)
        except ValueError:
            raise QwenMLXError(f"--logit-bias is {text!r}, expected ID=X, a token's id and a number.") from None
    return bias or None
