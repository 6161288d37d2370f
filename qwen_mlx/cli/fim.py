"""The options of `generate` for fill in the middle, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError, check_integer
from ..parallel.control import launched
from ..text.files import check_utf8, read_text

if TYPE_CHECKING:
    from ..generation.text import GenerationChunk
    from ..model.qwen2 import Qwen2
    from ..text.tokenizer import Tokenizer

CURSOR = "<|cursor|>"


def add_arguments(p: argparse.ArgumentParser, source: argparse._MutuallyExclusiveGroup) -> None:
    """Adds the options; source: the group of those that say what to generate from."""
    source.add_argument(
        "--fim-file", metavar="FILE", help=f"fill in the file at its mark {CURSOR}; - is standard input"
    )
    source.add_argument("--fim-prefix-file", metavar="FILE", help="fill in after this file's text")
    fim = p.add_argument_group("fill in the middle, for models such as Qwen2.5-Coder (greedy unless --temp is given)")
    fim.add_argument("--fim-suffix-file", metavar="FILE", help="fill in before this file's text")
    fim.add_argument("--fim-cursor", metavar="TEXT", help=f"the mark in --fim-file, in place of {CURSOR}")
    fim.add_argument(
        "--fim-context",
        action="append",
        metavar="FILE",
        help="show the model this file too (can be repeated, the most useful one last)",
    )
    fim.add_argument("--fim-repository", metavar="NAME", help="the repository that the files belong to")
    fim.add_argument("--fim-path", metavar="PATH", help="the path of the file that is filled in")
    fim.add_argument(
        "--fim-stop-at",
        choices=("line", "indent"),
        help="end with the first line, or before a line that is indented less than the cursor's",
    )
    fim.add_argument(
        "--fim-max-prompt-tokens", type=int, metavar="N", help="cut the context around the cursor to N tokens"
    )


def read(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of stream_fill that the options ask for; None without one of them. Raises QwenMLXError for options
    that do not go together, and for files that cannot be read."""
    given = {name: value for name, value in vars(arguments).items() if name.startswith("fim_") and value is not None}
    if not given:
        return None
    whole, suffix_file = arguments.fim_file, arguments.fim_suffix_file
    if (whole is None) == (arguments.fim_prefix_file is None and suffix_file is None):
        raise QwenMLXError(
            "Fill in the middle needs --fim-file FILE, or --fim-prefix-file FILE and --fim-suffix-file FILE."
        )
    for option, value in {
        "--prompt": arguments.prompt,
        "--prompt-file": arguments.prompt_file,
        "--system": arguments.system,
        "--raw": arguments.raw or None,
        "--special": arguments.special or None,
        "--reasoning-budget": arguments.reasoning_budget,
        "--fim-cursor": arguments.fim_cursor if whole is None else None,
    }.items():
        if value is not None:
            other = "--fim-file" if whole is not None else "--fim-prefix-file and --fim-suffix-file"
            raise QwenMLXError(f"{option} does not go with {other}; leave one of them out.")
    most = arguments.fim_max_prompt_tokens
    if most is not None:
        check_integer("--fim-max-prompt-tokens", most, 1, float("inf"), "1 or more")
    for name in ("fim_cursor", "fim_repository", "fim_path"):
        check_utf8(given.get(name, ""), f"--{name.replace('_', '-')}")
    if whole is not None:
        mark = CURSOR if arguments.fim_cursor is None else arguments.fim_cursor
        prefix, suffix = _split(_read("--fim-file", whole), whole, mark)
    else:
        prefix = _read("--fim-prefix-file", arguments.fim_prefix_file)
        suffix = _read("--fim-suffix-file", suffix_file)
    return {
        "prefix": prefix,
        "suffix": suffix,
        "files": [(file, _read("--fim-context", file)) for file in arguments.fim_context or []],
        "repository": arguments.fim_repository,
        "path": arguments.fim_path,
        "stop_at": arguments.fim_stop_at,
        "max_prompt_tokens": most,
    }


def stream(
    model: Qwen2, tokenizer: Tokenizer, hole: dict[str, Any], settings: dict[str, Any], name: str | None
) -> Generator[GenerationChunk, None, None]:
    """stream_fill with what `read` and open_model gave. name: the model's on the command line, for its refusal."""
    from ..generation.fill import check_fills, stream_fill

    check_fills(tokenizer, f"--model {name}")
    given = {key: value for key, value in settings.items() if value is not None}  # no temperature: the fill is greedy
    del given["skip_special_tokens"]  # a fill has none
    return stream_fill(model, tokenizer, **hole, **given)


def _read(option: str, file: str | None) -> str:
    if file == "-" and launched():
        raise QwenMLXError(f"{option} - never ends under a launcher such as mlx.launch; give a file.")
    return "" if file is None else read_text(file, option)


def _split(text: str, file: str, mark: str) -> tuple[str, str]:
    """The texts before and after the mark."""
    count = text.count(mark) if mark else 0
    if count != 1:
        raise QwenMLXError(f"--fim-file {file}: holds the mark {mark!r} {count} times, expected once, at the cursor.")
    prefix, _, suffix = text.partition(mark)
    return prefix, suffix
