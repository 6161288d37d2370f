"""The options of `generate` for structured output, and what they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError
from ..text.files import check_utf8, read_text
from .arguments import named_as_options

if TYPE_CHECKING:
    from ..generation.structured import Constraint
    from ..text.tokenizer import Tokenizer


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = p.add_argument_group("structured output (needs the extra structured)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--json-schema", metavar="FILE", help="answer with JSON that satisfies this JSON schema")
    one.add_argument("--json-object", action="store_true", help="answer with a JSON object")
    one.add_argument("--regex", metavar="REGEX", help="answer with text that this matches as a whole (Rust's syntax)")
    one.add_argument("--choice", action="append", metavar="TEXT", help="answer with one of these (can be repeated)")
    one.add_argument(
        "--grammar", metavar="FILE", help="answer with text of this grammar (Lark, as llguidance reads it)"
    )


def read(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of structured.constraint that the options ask for; None without one of them. Raises QwenMLXError
    for files that cannot be read, and for options that do not go together."""
    schema, grammar = arguments.json_schema, arguments.grammar
    for option, texts in {"--regex": [arguments.regex or ""], "--choice": arguments.choice or []}.items():
        for text in texts:
            check_utf8(text, option)
    given = {
        "json_schema": None if schema is None else read_text(schema, "--json-schema"),
        "json_object": arguments.json_object,
        "regex": arguments.regex,
        "choices": arguments.choice,
        "grammar": None if grammar is None else read_text(grammar, "--grammar"),
    }
    if all(value is None or value is False for value in given.values()):
        return None
    if arguments.min_tokens:
        raise QwenMLXError("--min-tokens does not go with structured output, which ends where it is complete.")
    return given


def check(form: dict[str, Any]) -> None:
    """Raises QwenMLXError for a form that no text can have, before a model is fetched."""
    from ..generation.structured import check_grammar

    with named_as_options():
        check_grammar(**form)


def compiled(tokenizer: Tokenizer, form: dict[str, Any]) -> Constraint:
    """The form for stream_generate."""
    from ..generation.structured import constraint

    return constraint(tokenizer, **form)
