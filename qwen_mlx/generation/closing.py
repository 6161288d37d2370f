"""A short way to a complete answer, for structured output that runs out of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..text.tokenizer import Tokenizer

# Texts that end a JSON value, or are a short one, the best first. Within a string only a quotation mark ends it, and a
# letter is allowed nowhere else.
SHORT = ("}", "]", '"', *"0123456789", "null", "true", "false", *"ntf-", "[", "{")
QUOTE, LETTER = '"', "a"
OTHERS = 8  # ids that are tried where none of SHORT is allowed
STEPS = 8192  # of a search: a string whose pattern has no end would take all of max_tokens
OPTIONAL_STEPS = 512  # where an answer may be cut


class Closer:
    """Finds tokens that complete an answer. The search is greedy: for JSON it closes what is open and adds what is
    required; it may miss the shortest way, and in another grammar every way.

    must_end: an answer that is cut is worthless.
    """

    def __init__(self, tokenizer: Tokenizer, must_end: bool) -> None:
        self._must_end = must_end
        ids = [tokenizer.encode(text) for text in SHORT]
        self._short = [tokens[0] for tokens in ids if len(tokens) == 1]
        self._quote, self._letter = (tokenizer.encode(text)[0] for text in (QUOTE, LETTER))

    def way(self, compiled: Any, most: int) -> list[int] | None:
        """Ids after which the answer of `compiled`, a matcher of llguidance's that stays as it is, is complete; None
        where they would be more than `most` or are not to be seen."""
        way: list[int] = []
        matcher = compiled.deep_copy()
        for _ in range(STEPS if self._must_end else OPTIONAL_STEPS):
            if matcher.is_accepting():
                return way
            following = matcher.compute_ff_tokens() or self._shortest(matcher)
            if not following or len(way) + len(following) > most or not matcher.consume_tokens(following):
                return None
            way += following
        return None

    def _shortest(self, matcher: Any) -> list[int]:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        in_string = mask[self._letter // 8] >> self._letter % 8 & 1
        for token in [self._quote] if in_string else self._short:
            if mask[token // 8] >> token % 8 & 1:
                return [token]
        others: list[int] = np.flatnonzero(np.unpackbits(mask, bitorder="little"))[:OTHERS].tolist()
        for token in others:
            matcher.consume_token(token)
            complete = matcher.is_accepting()
            matcher.rollback(1)
            if complete:
                return [token]
        return others[:1]
