"""The command `generate`: text from a prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import QwenMLXError
from ..loading import hub
from ..parallel.control import alone, launched, on_first
from ..text.files import check_utf8, read_text
from . import fim, structured
from .arguments import add_model_arguments, check_length, open_model, ranks
from .command import Parser, ProgressLine, counted, cut_at, printable, program

if TYPE_CHECKING:
    from ..backend import mx
    from ..generation.engine import GenerationStats
    from ..generation.text import GenerationChunk
    from ..text.tokenizer import Tokenizer


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    description = "Generate text with Qwen2.5 on MLX. Without --model: Qwen2.5-Coder-0.5B-Instruct, fetched once."
    p = Parser(prog=program("generate"), description=description, usage="%(prog)s --prompt TEXT [options]")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; - reads standard input")
    source.add_argument("--prompt-file", "-f", metavar="FILE", help="read the prompt from a UTF-8 file")
    source.add_argument("--list-models", action="store_true", help="list the models that are on this machine")
    p.add_argument("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    p.add_argument(
        "--logprobs", type=int, metavar="N", help="list each token's ln p and the N likeliest, on standard error"
    )
    add_model_arguments(p, max_tokens=512)
    fim.add_arguments(p, source)
    structured.add_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; mistakes raise QwenMLXError."""
    with ranks() as group:
        return _main(parser().parse_args(argv), group)


def _main(arguments: argparse.Namespace, group: mx.distributed.Group | None) -> int:
    if arguments.list_models:
        print(*hub.cached_models(), sep="\n")
        return 0
    hole = on_first(lambda: fim.read(arguments))
    prompt = on_first(lambda: _read_prompt(arguments)) if hole is None else ""
    form = on_first(lambda: structured.read(arguments))
    if form is not None and hole is not None:
        raise QwenMLXError("Structured output does not go with fill in the middle; leave one of them out.")
    if form is not None:
        structured.check(form)
    if arguments.raw and arguments.system is not None:
        raise QwenMLXError("--system needs the chat template; leave out --raw, or put it into the prompt.")
    check_length(arguments, prompt)
    model, tokenizer, settings = open_model(arguments, group)
    if form is not None:
        settings["schema"] = structured.compiled(tokenizer, form)

    from ..generation.engine import GenerationStats

    stats, token_lines, interrupted, ended = GenerationStats(), [], False, None
    with ProgressLine("Reading the prompt") as line:
        try:
            asked = settings | {"progress": line}
            if hole is None:
                from ..generation.text import stream_generate

                chunks = stream_generate(model, tokenizer, prompt, raw=arguments.raw, **asked)
            else:
                chunks = fim.stream(model, tokenizer, hole, asked, arguments.model)
            for chunk in chunks:
                line.clear()
                stats, ended = chunk.stats, chunk.finish_reason
                text = chunk.answer if arguments.hide_reasoning else chunk.text
                print(printable(text, sys.stdout), end="", flush=True)
                if chunk.logprob is not None:
                    token_lines.append(_describe_token(tokenizer, chunk))
        except KeyboardInterrupt:
            interrupted = True
    # An editor inserts what it gets, without a newline.
    print(end="" if hole is not None and not sys.stdout.isatty() else "\n", flush=True)
    limit = arguments.max_tokens if ended == "length" else None
    for text in [*token_lines, describe_cost(stats, arguments.draft_model is not None, limit, interrupted)]:
        print(text, file=sys.stderr)
    if arguments.prompt_cache is not None and settings["prompt_cache"].ids:
        settings["prompt_cache"].save(arguments.prompt_cache)
    return 130 if interrupted else 0


def _read_prompt(arguments: argparse.Namespace) -> str:
    prompt: str | None = arguments.prompt
    if arguments.prompt_file is not None:
        prompt, source = read_text(arguments.prompt_file), f"--prompt-file {arguments.prompt_file}"
    elif prompt == "-":
        if launched():
            raise QwenMLXError("--prompt - never ends under a launcher such as mlx.launch; use --prompt-file FILE.")
        prompt, source = read_text("-"), "standard input"
    elif prompt is not None:
        check_utf8(prompt, source := "--prompt")
    else:
        raise QwenMLXError("no prompt: give --prompt TEXT, --prompt - for standard input, or --prompt-file FILE.")
    if prompt == "" and not arguments.raw:
        raise QwenMLXError(f"{source} is empty; give at least one character.")
    return prompt


def _describe_token(tokenizer: Tokenizer, chunk: GenerationChunk) -> str:
    """A line about a token: its ln p, id and text, and the likeliest tokens."""

    def name(token: int) -> str:
        return f"{token} {tokenizer.token_text(token)!r}"

    others = "  ".join(f"{name(token)} {value:.3f}" for token, value in chunk.top_logprobs)
    return f"{chunk.logprob:8.3f}  {name(chunk.token)}" + (f"  of  {others}" if others else "")


def describe_cost(stats: GenerationStats, drafted: bool, limit: int | None = None, interrupted: bool = False) -> str:
    """A line about the tokens, speed and memory of a generation, and what cut it off.

    limit: --max-tokens, where the text did not end. interrupted: by Ctrl-C.
    """
    from .. import backend

    if not stats.generated_tokens:
        return "interrupted before the first token"
    reused = f" ({stats.reused_tokens} more from the cache)" if stats.reused_tokens else ""
    draft = shared = end = ""
    if stats.repeated_tokens:
        end = f"; the text repeats itself every {stats.repeated_tokens} tokens: try --repetition-penalty or --temp"
    elif interrupted:
        end = "; interrupted"
    elif limit is not None:
        end = f"; {cut_at(stats.generated_tokens, limit)}"
    if drafted:
        off = f", off for {stats.paused_tokens}" if stats.paused_tokens else ""
        accepted = f"{stats.accepted_tokens} of {stats.drafted_tokens} accepted ({stats.acceptance_rate:.0%})"
        draft = f"draft: {accepted}{off}; "
    if not alone():
        share = stats.communication_seconds / (stats.prompt_seconds + stats.generation_seconds)
        shared = f"communication: {share:.0%} of the time; "
    # The time of the first token is the prompt's.
    speed = f", {stats.generated_per_second:.1f} tok/s" if stats.generated_tokens > 1 else ""
    return (
        f"prompt: {counted(stats.prompt_tokens)}{reused}, {stats.prompt_per_second:.1f} tok/s; "
        f"generation: {counted(stats.generated_tokens)}{speed}; {draft}{shared}"
        f"peak memory: {backend.peak_memory() / 1e9:.2f} GB; backend: {backend.describe()}{end}"
    )
