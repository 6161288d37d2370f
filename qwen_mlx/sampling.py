"""Sampling: small pure functions on logits, in transformers' order: penalties, temperature, top-k, top-p, min-p.

All take and return float32 logits (B, V); a token that is ruled out gets -inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from .backend import mx
from .errors import QwenMLXError


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 are off.

    `source` says where the values come from, for --verbose. Raises QwenMLXError for an impossible value.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    source: str = "given"

    def __post_init__(self) -> None:
        for name, low, high, why in (
            ("temperature", 0, math.inf, "0 (greedy) or more"),
            ("top_k", 0, math.inf, "0 (off) or more"),
            ("top_p", 0, 1, "more than 0 and at most 1 (off)"),
            ("min_p", 0, 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0.01, 100, "from 0.01 to 100; 1 is off"),
        ):
            value = getattr(self, name)
            kinds = (int,) if name == "top_k" else (int, float)
            bad = (
                not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high or value == math.inf
            )
            if bad or (value == 0 and name == "top_p"):
                raise QwenMLXError(f"{name} is {value!r}, expected {why}.")

    def override(self, **given: Any) -> SamplingSettings:
        """The same settings with those of `given` that are not None. A temperature of 0 drops a default penalty,
        because greedy means the likeliest token; a penalty that is given stays."""
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return self
        source = f"{', '.join(given)} given, the rest {self.source}"
        if given.get("temperature") == 0:
            return SamplingSettings(**given, source="greedy, as given")
        return replace(self, **given, source=source)

    def __str__(self) -> str:
        values = ", ".join(f"{f.name} {getattr(self, f.name):g}" for f in fields(self) if f.name != "source")
        return f"{values} ({self.source})"


def repetition_penalty(logits: mx.array, ids: mx.array, penalty: float) -> mx.array:
    """Divides positive and multiplies negative logits of the tokens in `ids` (B, N) by `penalty`.

    Source: Keskar et al. 2019, CTRL, section 4.1; transformers' RepetitionPenaltyLogitsProcessor.
    """
    seen = mx.take_along_axis(logits, ids, axis=-1)
    return mx.put_along_axis(logits, ids, mx.where(seen < 0, seen * penalty, seen / penalty), axis=-1)


def top_k_candidates(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k largest logits, in falling order, and their token ids, both (B, k). Source: Fan et al. 2018."""
    ids = mx.argpartition(-logits, k - 1, axis=-1)[:, :k]
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return mx.take_along_axis(values, order, axis=-1), mx.take_along_axis(ids, order, axis=-1)


def top_p(logits: mx.array, p: float) -> mx.array:
    """Keeps the fewest likeliest tokens whose probability reaches p. Source: Holtzman et al. 2019, section 3.1."""
    order = mx.argsort(logits, axis=-1)
    rising = mx.take_along_axis(logits, order, axis=-1)
    # The sum from the least likely up to and including a token; the likeliest is always kept.
    below = mx.cumsum(mx.softmax(rising, axis=-1), axis=-1)
    drop = (below <= 1 - p) & (mx.arange(logits.shape[-1]) < logits.shape[-1] - 1)
    return mx.put_along_axis(logits, order, mx.where(drop, -mx.inf, rising), axis=-1)


def min_p(logits: mx.array, p: float) -> mx.array:
    """Drops tokens less likely than p times the likeliest. Source: Nguyen et al. 2024, arXiv:2407.01082."""
    return mx.where(logits < logits.max(axis=-1, keepdims=True) + math.log(p), -mx.inf, logits)


def processed_logits(logits: mx.array, settings: SamplingSettings, seen: mx.array | None = None) -> mx.array:
    """Logits (B, V) float32 after all that `settings` ask for, -inf where a token is ruled out: softmax of them is the
    distribution that `sample` draws from; at temperature 0 its choice is their argmax. `seen` as for sample."""
    logits = logits.astype(mx.float32)
    if settings.repetition_penalty != 1 and seen is not None and seen.size:
        logits = repetition_penalty(logits, seen, settings.repetition_penalty)
    if settings.temperature < 1e-30:
        return logits
    logits = (logits - logits.max(axis=-1, keepdims=True)) / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        values, ids = top_k_candidates(logits, settings.top_k)
        logits = mx.put_along_axis(mx.full(logits.shape, -mx.inf), ids, values, axis=-1)
    if settings.top_p < 1:
        logits = top_p(logits, settings.top_p)
    return min_p(logits, settings.min_p) if settings.min_p > 0 else logits


def sample(
    logits: mx.array, settings: SamplingSettings, seen: mx.array | None = None, key: mx.array | None = None
) -> mx.array:
    """Draws one token id (B,) from float logits (B, V). `seen` (B, N): the ids that a repetition penalty counts."""
    logits = logits.astype(mx.float32)
    if settings.repetition_penalty != 1 and seen is not None and seen.size:
        logits = repetition_penalty(logits, seen, settings.repetition_penalty)
    if settings.temperature < 1e-30:  # nothing but the likeliest token is left, and float32 would divide by zero
        return mx.argmax(logits, axis=-1)
    # Shifted first, so that no temperature, however small, makes inf - inf.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / settings.temperature
    ids = None
    if 0 < settings.top_k < logits.shape[-1]:  # the rest then works on k candidates instead of the whole vocabulary
        logits, ids = top_k_candidates(logits, settings.top_k)
    if settings.top_p < 1:
        logits = top_p(logits, settings.top_p)
    if settings.min_p > 0:
        logits = min_p(logits, settings.min_p)
    choice = mx.random.categorical(logits, axis=-1, key=key)
    return choice if ids is None else mx.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]
