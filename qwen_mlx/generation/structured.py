"""Structured output: only tokens that a JSON schema, a regular expression, a list of choices or a grammar allows.

llguidance (the extra `structured`) compiles them and computes which tokens may come next. A Constraint is compiled
once, a Matcher is the state of one answer, and `allowed` applies what it says to logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend import mx
from ..errors import QwenMLXError
from ..text.tokenizer import Tokenizer
from .closing import Closer
from .grammars import grammar_source, library, limits, on_deep_stack, one_line, tool_calls_source, unusable
from .tools import Tool, tools_by_name
from .vocabulary import llguidance_tokenizer

LEAP = 16  # spare tokens that one token may cost: itself, and what it adds to the way to the end


class Constraint:
    """A compiled grammar. `start` gives each answer a matcher of its own; many may run at once.

    must_end: the grammar is a JSON schema's, of which an answer that is cut is worthless.
    """

    def __init__(self, compiled: Any, tokenizer: Tokenizer, must_end: bool = False) -> None:
        self._compiled, self._size, self._must_end = compiled, tokenizer.vocab_size, must_end
        self._eos_token_ids, self._closer = sorted(tokenizer.eos_token_ids), Closer(tokenizer, must_end)

    def start(self, max_tokens: int) -> Matcher:
        """A matcher of an answer that has no tokens yet and gets `max_tokens` at most."""
        return Matcher(self._compiled.deep_copy(), self._size, self._eos_token_ids, self._closer, max_tokens)

    def check_fits(self, max_tokens: int) -> None:
        """Raises QwenMLXError where `max_tokens` are too few for JSON."""
        if self._must_end and not self.start(max_tokens).closes:
            raise QwenMLXError(
                f"No JSON that satisfies the schema fits into max_tokens, {max_tokens}; give more, or a simpler schema."
            )


class Matcher:
    """The state of one answer: `mask` says which tokens may come next, `accept` adds the one that came.

    Where its tokens run out the answer is closed: then only the next token of a short way to its end is allowed.
    closes: such a way was seen. closing: it has begun. error: why the answer cannot go on, where a grammar becomes too
    complex on the way or a token came that it does not allow; only end tokens may follow then.
    """

    def __init__(self, compiled: Any, size: int, eos_token_ids: Sequence[int], closer: Closer, max_tokens: int) -> None:
        self._compiled, self._eos_token_ids, self._closer = compiled, eos_token_ids, closer
        self._mask = np.zeros((1, (size + 31) // 32), np.int32)
        self._left, self._way, self._ended = max_tokens, list[int](), False
        self._next_look = max_tokens  # tokens that are left when it is time to look for the end again
        self.closes, self.closing = True, False
        self.error: str | None = None
        self._look()

    @property
    def finished(self) -> bool:
        """True where the answer is complete and nothing but an end token may follow."""
        return bool(self._ended or self._compiled.is_stopped())

    def mask(self) -> npt.NDArray[np.int32]:
        """The tokens that may come next: int32, a bit for each token, the lowest first. It is valid until the next
        call; after the end every token is allowed."""
        if self._ended:
            self._mask[:] = -1
        elif self.closing:
            self._allow(self._way[:1] or self._eos_token_ids)
        else:
            from llguidance.numpy import fill_next_token_bitmask

            fill_next_token_bitmask(self._compiled, self._mask)
            self._check()
            if self.error is None and not self._mask.any():
                self.error = "no token may follow"
            if self.error is not None:
                self._allow(self._eos_token_ids)
        return self._mask.reshape(-1)

    def accept(self, token: int) -> None:
        """Adds the token that was chosen; one that is negative is none."""
        if self._ended or token < 0:
            return
        self._left -= 1
        self._ended = token in self._eos_token_ids
        if self.error is None and not self._compiled.consume_token(token):
            self._check()
            self.error = self.error or f"token {token} is not allowed"
        if self.closing:
            self._way = self._way[1:]
        elif self._left <= self._next_look and self.closes and not self._ended and self.error is None:
            self._look()

    def _look(self) -> None:
        """Looks for the end, and begins to close if the tokens that are left could not be enough after the next one."""
        way = self._closer.way(self._compiled, self._left)
        self.closes = way is not None
        if way is not None:
            spare = self._left - len(way)
            self.closing, self._way = spare < LEAP, way
            self._next_look = self._left - spare // LEAP

    def _allow(self, tokens: Sequence[int]) -> None:
        self._mask[:] = 0
        bits = self._mask.view(np.uint32)[0]
        for token in tokens:
            bits[token // 32] |= np.uint32(1 << token % 32)

    def _check(self) -> None:
        if self._compiled.is_error():
            self.error = one_line(self._compiled.get_error())


def allowed(logits: mx.array, masks: Sequence[npt.NDArray[np.int32]]) -> mx.array:
    """Logits (B, V) with -inf for the tokens that their row's mask does not allow; what lies beyond a mask is not."""
    words = np.stack(masks)
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=logits.shape[-1], bitorder="little")
    return mx.where(mx.array(bits.view(np.bool_)), logits, -mx.inf)


def constraint(
    tokenizer: Tokenizer,
    *,
    json_schema: Any = None,
    json_object: bool = False,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
) -> Constraint:
    """Compiles what an answer must be; exactly one of these says it.

    json_schema: a JSON schema as a mapping, as JSON text or as a class of pydantic's; True allows any JSON. The answer
    is written as json.dumps writes it. json_object: any JSON object. regex: a regular expression in Rust's syntax that
    all of the answer matches. choices: strings of which the answer is one. grammar: a context-free grammar in
    llguidance's form of Lark, whose first rule is `start`.
    Raises QwenMLXError for what is wrong, too large, not supported or impossible to satisfy, and without llguidance.
    """
    kind, source = grammar_source(json_schema, json_object, regex, choices, grammar)
    return _compiled(tokenizer, kind, source)


def check_grammar(
    *,
    json_schema: Any = None,
    json_object: bool = False,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
) -> None:
    """Raises QwenMLXError for what `constraint` refuses, as far as that is known without a tokenizer."""
    kind, source = grammar_source(json_schema, json_object, regex, choices, grammar)
    validate = library().LLMatcher.validate_grammar
    if error := on_deep_stack(lambda: validate(source, None, limits=limits())):
        raise QwenMLXError(unusable(kind, error))


def tool_call_constraint(
    tokenizer: Tokenizer, sources: Sequence[Callable[..., Any] | Mapping[str, Any] | Tool], most: int = 1
) -> Constraint:
    """Compiles the form of at least one and at most `most` calls of these tools, as parse_tool_calls reads them, their
    arguments as the tools' schemas ask. Raises QwenMLXError as `constraint`, and for what is no tool."""
    tools = list(tools_by_name(sources).values())
    return _compiled(tokenizer, "tools", tool_calls_source(tools, tokenizer.special, most))


def _compiled(tokenizer: Tokenizer, kind: str, source: str) -> Constraint:
    known = llguidance_tokenizer(tokenizer)
    compiled = on_deep_stack(lambda: library().LLMatcher(known, source, log_level=0, limits=limits()))
    error = compiled.get_error()
    if not error:
        first = compiled.deep_copy()
        if not any(first.compute_bitmask()) or first.is_error():
            error = first.get_error() or "NoExtension"
    if error:
        raise QwenMLXError(unusable(kind, "nothing satisfies it" if "NoExtension" in error else error))
    return Constraint(compiled, tokenizer, must_end=kind in ("json_schema", "json_object", "tools"))
