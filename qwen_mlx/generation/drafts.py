"""Drafts for speculative decoding: the text so far, or a smaller model, proposes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..backend import mx
from ..errors import QwenMLXError
from ..model.cache import KVCache
from ..model.fused import FusedModel
from ..model.qwen2 import Qwen2
from .engine import read_prompt
from .prompt_cache import PromptCache
from .sampling import SamplingSettings, processed_logits
from .settings import Draft, Proposal

LOOKUP = "prompt-lookup"
NGRAMS = (4, 3, 2)  # tokens that must recur, longest first


class PromptLookup(Draft):
    """Proposes what followed the latest earlier occurrence of the last 4, 3 or 2 tokens of prompt and answer.

    Source: Saxena 2023, prompt-lookup decoding.
    """

    num_draft_tokens = 15  # 16 with the token before them

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # tokens -> the index after their latest occurrence

    def propose(self, ids: list[int], count: int, sampling: SamplingSettings, key: mx.array) -> Proposal:
        if ids[: len(self._ids)] != self._ids:
            self._ids, self._after = [], {}
        for end in range(max(1, len(self._ids)), len(ids)):  # a run that ends at the last token has no continuation yet
            for size in NGRAMS:
                if size <= end:
                    self._after[tuple(ids[end - size : end])] = end
        self._ids = list(ids)
        for size in NGRAMS:
            start = self._after.get(tuple(ids[-size:])) if size <= len(ids) else None
            if start is not None:
                text = list(ids)
                for i in range(start, start + count):  # past the end, the text repeats itself
                    text.append(text[i])
                return Proposal(text[len(ids) :])
        return Proposal([])


class ModelDraft(Draft):
    """A smaller model with the same vocabulary. It keeps its own cache: what two texts have in common is read once.

    Sampling draws from the draft with the model's settings but XTC, bias and the penalties on generated tokens: the
    model's own choice makes up for what a draft leaves out.
    """

    num_draft_tokens = 4

    def __init__(self, model: Qwen2) -> None:
        self.model = model
        self._cache = PromptCache(model)

    def propose(self, ids: list[int], count: int, sampling: SamplingSettings, key: mx.array) -> Proposal:
        model, config = FusedModel.of(self.model), self.model.config
        if len(ids) + count > config.context_length or max(ids) >= config.vocab_size:
            return Proposal([])
        sampling = replace(sampling, presence_penalty=0, frequency_penalty=0, xtc_probability=0, logit_bias=())
        text, distributions = list(ids), []
        unread = ids[self._cache.keep(ids) :]
        try:
            while len(text) < len(ids) + count:
                logits = read_prompt(model, mx.array([unread], mx.int32), self._cache.layers)
                seen = mx.array([text], mx.int32) if sampling.looks_back else None
                logits = processed_logits(logits, sampling, seen)
                if sampling.greedy:
                    token = int(mx.argmax(logits))
                else:
                    key, draw = mx.random.split(key)
                    distributions.append(mx.softmax(logits, axis=-1))
                    token = int(mx.random.categorical(logits, key=draw))
                text.append(token)
                unread = [token]
        finally:
            self._cache.record(text, self._cache.layers)
        return Proposal(text[len(ids) :], distributions or None)


def make_draft(draft: Draft | Qwen2 | str) -> Draft:
    """The draft that stream_generate's draft_model means: a model, "prompt-lookup" or a draft kept between calls."""
    if isinstance(draft, Qwen2):
        return ModelDraft(draft)
    if draft == LOOKUP:
        return PromptLookup()
    if isinstance(draft, str) or not hasattr(draft, "propose"):
        raise QwenMLXError(f"draft_model is {draft!r}, expected a model that load() gave, or {LOOKUP!r}.")
    return draft


def check_cache(cache: Sequence[KVCache]) -> None:
    """Raises QwenMLXError for a cache that cannot take back tokens, which a rejected proposal needs."""
    other = next((layer for layer in cache if not layer.trimmable), None)
    if other is not None:
        raise QwenMLXError(
            f"A {type(other).__name__} cannot take back the tokens of a rejected draft: leave out the draft, or use a "
            "cache that keeps all tokens."
        )
