"""A bound on the tokens of a thought: at the bound the closing mark is written for the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..text.tokenizer import Tokenizer


class ThoughtLimit:
    """The end of thoughts after `budget` tokens, in answers to one prompt. `start` gives each answer a matcher."""

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], budget: int) -> None:
        self._tokenizer, self._ids, self._budget = tokenizer, ids, budget

    def start(self, max_tokens: int) -> ThoughtMatcher:
        """A matcher of an answer that has no tokens yet."""
        return ThoughtMatcher(self._tokenizer, self._ids, self._budget)

    def check_fits(self, max_tokens: int) -> None:
        """Raises nothing: any number of tokens will do."""


class ThoughtMatcher:
    """The state of one answer, with the methods of structured.Matcher: `mask` allows every token, and where the text
    still is a thought after `budget` of them, only the next token of the closing mark."""

    error: str | None = None
    closing = False

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], budget: int) -> None:
        thoughts = tokenizer.thoughts(ids)
        if thoughts is None or tokenizer.think_marks is None:
            raise ValueError("The model does not think.")
        self._thoughts, self._detokenizer, self._left = thoughts, tokenizer.detokenizer(skip_special=False), budget
        self._mark = tokenizer.encode(f"\n{tokenizer.think_marks[1]}\n\n", allow_special=True)
        self._forced: list[int] = []  # what is left of the mark
        self._done = False
        self._mask = np.empty((tokenizer.vocab_size + 31) // 32, np.uint32)
        self._look()

    def mask(self) -> npt.NDArray[np.int32]:
        """The tokens that may come next, as structured.Matcher's."""
        if self._forced:
            self._mask[:] = 0
            self._mask[self._forced[0] // 32] = 1 << self._forced[0] % 32
        else:
            self._mask[:] = 2**32 - 1
        return self._mask.view(np.int32)

    def accept(self, token: int) -> None:
        """Adds the token that was chosen; one that is negative is none."""
        if self._forced:
            self._forced.pop(0)
        elif not self._done and token >= 0:
            self._left -= 1
            self._thoughts.add(self._detokenizer.add(token))
            self._look()

    def _look(self) -> None:
        if self._left <= 0 and self._thoughts.thinking:
            self._forced, self._done = list(self._mark), True
