"""The settings of a generation, checked once and then passed on."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ..backend import mx
from ..errors import QwenMLXError, check_integer
from .reasoning import ThoughtLimit
from .sampling import SamplingSettings
from .structured import Constraint

MAX_DRAFT_TOKENS = 32  # a quantized cache can take back the newest 64 tokens, which it keeps as floats


@dataclass(frozen=True)
class Proposal:
    """Proposed ids, and the distribution (1, V) float32 that each was drawn from; without distributions, the draft was
    certain of them."""

    ids: list[int]
    distributions: list[mx.array] | None = None


@runtime_checkable
class Draft(Protocol):
    """Proposes tokens; `num_draft_tokens` at a time unless the settings say otherwise."""

    num_draft_tokens: int

    def propose(self, ids: list[int], count: int, sampling: SamplingSettings, key: mx.array) -> Proposal:
        """Proposes up to `count` tokens after `ids`, the whole text so far."""
        ...


@dataclass(frozen=True)
class GenerationSettings:
    """All that shapes a generation besides the prompt; stream_generate describes the fields.

    Raises QwenMLXError for an impossible value. NumPy's integers become ints, and one stop string a tuple of one.
    """

    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    max_tokens: int = 512
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    seed: int | None = None
    prefill_step_size: int | None = None
    draft_model: Draft | None = None
    num_draft_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    constraint: Constraint | ThoughtLimit | None = None
    stop_token_ids: Sequence[int] = ()
    skip_special_tokens: bool = True
    reasoning_budget: int | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "skip_special_tokens", bool(self.skip_special_tokens))
        except (TypeError, ValueError):  # an array has no truth value
            raise QwenMLXError(
                f"skip_special_tokens is {self.skip_special_tokens!r:.80}, expected True or False."
            ) from None
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise QwenMLXError(f"stop is {self.stop!r}, expected a list of strings that are not empty.")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids
        if isinstance(ids, str) or not all(isinstance(i, numbers.Integral) and i >= 0 for i in ids):
            raise QwenMLXError(f"stop_token_ids is {ids!r}, expected a list of token ids.")
        object.__setattr__(self, "stop_token_ids", tuple(map(int, ids)))
        if self.draft_model is not None and self.num_draft_tokens is None:
            object.__setattr__(self, "num_draft_tokens", self.draft_model.num_draft_tokens)
        for name, low, high, expected in (
            ("max_tokens", 1, math.inf, "1 or more"),
            ("min_tokens", 0, self.max_tokens, f"0 to max_tokens, {self.max_tokens}"),
            ("prefill_step_size", 1, math.inf, "1 or more"),
            ("seed", 0, 2**64 - 1, "an integer from 0 to 2^64 - 1"),
            ("logprobs", 0, 100, "0 to 100"),
            ("reasoning_budget", 0, math.inf, "0 or more"),
            ("num_draft_tokens", 1, MAX_DRAFT_TOKENS, f"1 to {MAX_DRAFT_TOKENS}"),
        ):
            value = getattr(self, name)
            if value is not None or name in ("max_tokens", "min_tokens"):
                object.__setattr__(self, name, check_integer(name, value, low, high, expected))
        if self.draft_model is None and self.num_draft_tokens is not None:
            raise QwenMLXError("num_draft_tokens is given without a draft; give a draft too.")
        if self.constraint is not None and self.reasoning_budget is not None:
            raise QwenMLXError("reasoning_budget does not go with structured output, which has no thoughts.")
        if isinstance(self.constraint, Constraint) and self.min_tokens:
            raise QwenMLXError("min_tokens does not go with structured output, which ends where it is complete.")
