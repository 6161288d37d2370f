"""Drafts for speculative decoding: what proposes tokens, and what a draft cannot be used with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..backend import mx
from ..errors import QwenMLXError
from ..model.cache import KVCache
from ..model.fused import FusedModel
from ..model.qwen2 import Qwen2
from .engine import PREFILL_CHUNK
from .prompt_cache import PromptCache
from .sampling import SamplingSettings, processed_logits

LOOKUP = "prompt-lookup"
MOST_DRAFT_TOKENS = 32  # a quantized cache keeps the newest 64 tokens as floats, which taking back must not exceed
NGRAMS = (4, 3, 2)  # tokens that must recur, longest first


@dataclass(frozen=True)
class Proposal:
    """Proposed ids, and the distribution (1, V) float32 that each was drawn from; no distributions: it was certain."""

    ids: list[int]
    distributions: list[mx.array] | None = None


class Draft(Protocol):
    """What proposes tokens. num_draft_tokens: how many at most, by default."""

    num_draft_tokens: int

    def propose(self, ids: list[int], count: int, sampling: SamplingSettings, key: mx.array) -> Proposal:
        """Up to `count` tokens after `ids`, all of the text so far; none if it has no idea."""
        ...


class PromptLookup(Draft):
    """Proposes what followed the latest earlier occurrence of the last 4, 3 or 2 tokens of prompt and answer."""

    num_draft_tokens = 15  # with the token before them a multiple of what BLAS libraries work on at a time

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> where the token after their latest occurrence is

    def propose(self, ids: list[int], count: int, sampling: SamplingSettings, key: mx.array) -> Proposal:
        if ids[: len(self._ids)] != self._ids:
            self._ids, self._after = [], {}
        for end in range(max(1, len(self._ids)), len(ids)):  # what ends at the last token has no continuation yet
            for size in NGRAMS:
                if size <= end:
                    self._after[tuple(ids[end - size : end])] = end
        self._ids = list(ids)
        for size in NGRAMS:
            at = self._after.get(tuple(ids[-size:])) if size <= len(ids) else None
            if at is not None:
                found: list[int] = []
                for i in range(at, at + count):  # past the end, the text repeats itself
                    found.append(ids[i] if i < len(ids) else found[i - len(ids)])
                return Proposal(found)
        return Proposal([])


class ModelDraft(Draft):
    """A smaller model with the same vocabulary. It keeps its own cache: what two texts have in common is read once.

    Sampling draws from the draft with the model's settings but XTC, bias and the penalties on what was generated: the
    model's own choice makes up for what a draft leaves out.
    """

    num_draft_tokens = 4

    def __init__(self, model: Qwen2) -> None:
        self.model = model
        self._cache = PromptCache(model)

    def propose(self, ids: list[int], count: int, sampling: SamplingSettings, key: mx.array) -> Proposal:
        vocabulary = self.model.config.vocab_size
        if len(ids) + count > self.model.config.context_length or max(ids) >= vocabulary:
            return Proposal([])
        held = self._cache.keep(ids)
        sampling = replace(sampling, presence_penalty=0, frequency_penalty=0, xtc_probability=0, logit_bias=())
        found: list[int] = []
        distributions: list[mx.array] = []
        rest = ids[held:]
        try:
            while len(found) < count:
                for start in range(0, len(rest), PREFILL_CHUNK):
                    chunk = mx.array(rest[start : start + PREFILL_CHUNK], mx.int32)[None]
                    logits = FusedModel.of(self.model)(chunk, self._cache.layers)[:, -1]
                    mx.eval(logits)
                logits = processed_logits(logits, sampling, seen_ids(sampling, ids + found))
                if sampling.greedy:
                    token = int(mx.argmax(logits))
                else:
                    key, now = mx.random.split(key)
                    distributions.append(mx.softmax(logits, axis=-1))
                    token = int(mx.random.categorical(logits, key=now))
                found.append(token)
                rest = [token]
        finally:
            self._cache.record([*ids, *found], self._cache.layers)
        return Proposal(found, distributions or None)


def seen_ids(sampling: SamplingSettings, ids: list[int]) -> mx.array | None:
    """What the penalties look at, (1, tokens); None where nothing looks back."""
    return mx.array([ids], mx.int32) if sampling.looks_back else None


def make_draft(draft: Draft | Qwen2 | str) -> Draft:
    """The meaning of stream_generate's draft_model: a model, "prompt-lookup" or a draft kept between calls."""
    if isinstance(draft, Qwen2):
        return ModelDraft(draft)
    if draft == LOOKUP:
        return PromptLookup()
    if isinstance(draft, str) or not hasattr(draft, "propose"):
        raise QwenMLXError(f"draft_model is {draft!r}, expected a model that load() gave, or {LOOKUP!r}.")
    return draft


def check_draft(
    draft: Draft | Qwen2 | str, num_draft_tokens: int | None, cache: Sequence[KVCache] = ()
) -> dict[str, Any]:
    """The arguments `draft` and `num_draft_tokens` of speculative_ids; QwenMLXError for what cannot be."""
    check_cache(cache)
    found = make_draft(draft)
    return {
        "draft_model": found,
        "num_draft_tokens": check_draft_tokens(
            found.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
        ),
    }


def check_draft_tokens(num_draft_tokens: int, name: str = "num_draft_tokens") -> int:
    """`num_draft_tokens`; QwenMLXError if it cannot be."""
    if (
        not isinstance(num_draft_tokens, int)
        or isinstance(num_draft_tokens, bool)
        or not 1 <= num_draft_tokens <= MOST_DRAFT_TOKENS
    ):
        raise QwenMLXError(f"{name} is {num_draft_tokens!r}, expected 1 to {MOST_DRAFT_TOKENS}.")
    return num_draft_tokens


def check_cache(cache: Sequence[KVCache]) -> None:
    """Raises QwenMLXError for a cache that cannot take back tokens, which a rejected proposal needs."""
    other = next((layer for layer in cache if not layer.trimmable), None)
    if other is not None:
        raise QwenMLXError(
            f"A {type(other).__name__} cannot take back the tokens of a rejected draft: leave out the draft, or use a "
            "cache that keeps all tokens."
        )
