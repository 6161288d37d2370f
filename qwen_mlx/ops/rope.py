"""Rotary position embeddings on halves: element i turns with element i + head_dim / 2."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..backend import mx


@dataclass(frozen=True)
class Rotary:
    """How fast each pair of a head turns, and the factor on cosine and sine.

    inv_freq: head_dim / 2 angles per position in radians, rounded to float32 as transformers holds them.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    @classmethod
    def plain(cls, head_dim: int, theta: float, factor: float = 1.0) -> Rotary:
        """theta^(-2i / head_dim), divided by `factor` (linear scaling). Source: Su et al. 2021, eq. 15."""
        return cls._rounded(_frequencies(head_dim, theta) / factor)

    @classmethod
    def yarn(
        cls,
        head_dim: int,
        theta: float,
        factor: float,
        original_context: int,
        attention_factor: float | None = None,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
    ) -> Rotary:
        """Slow pairs are interpolated by `factor`, fast ones kept, with a ramp between.

        original_context: the trained context in tokens. attention_factor None is 0.1 ln(factor) + 1.
        Source: Peng et al. 2023, arXiv:2309.00071, section 3.2 and eq. 22; bounds rounded as in transformers.
        """

        def pair_that_turns(times: float) -> float:
            return head_dim * math.log(original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_that_turns(beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(beta_slow)), head_dim - 1)
        slow = np.clip((np.arange(head_dim // 2) - low) / (max(high - low, 0) or 0.001), 0, 1)
        fast = _frequencies(head_dim, theta)
        scale = 0.1 * math.log(factor) + 1 if attention_factor is None and factor > 1 else attention_factor or 1.0
        return cls._rounded(fast * (1 - slow) + fast / factor * slow, scale)

    def divided(self, factors: np.ndarray) -> Rotary:
        """The same with each frequency divided by its factor (a GGUF's rope_freqs), (head_dim / 2,)."""
        return self._rounded(np.array(self.inv_freq) / factors.astype(np.float64), self.attention_factor)

    @classmethod
    def _rounded(cls, inv_freq: np.ndarray, attention_factor: float = 1.0) -> Rotary:
        return cls(tuple(inv_freq.astype(np.float32).tolist()), attention_factor)


def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


@functools.lru_cache(maxsize=4)
def _tables(rotary: Rotary, offset: int, length: int) -> tuple[mx.array, mx.array]:
    """Cosine, and sine with each half's sign, float32 (length, 1, 2, head_dim / 2), shared by all layers of a step.

    Angles are formed in float64: float32 would be wrong by 0.03 radians at position 1,000,000.
    """
    angles = np.arange(offset, offset + length)[:, None] * np.array(rotary.inv_freq)
    cos, sin = (table(angles) * rotary.attention_factor for table in (np.cos, np.sin))
    return (
        mx.array(np.stack([cos, cos], axis=1)[:, None].astype(np.float32)),
        mx.array(np.stack([-sin, sin], axis=1)[:, None].astype(np.float32)),
    )


def rope(x: mx.array, offset: int, rotary: Rotary) -> mx.array:
    """Turns each head of x by its position.

    x: (B, L, H, head_dim), positions offset to offset + L - 1. Returns the same shape and dtype. Rounding: computed in
    float32 with angles from float64, rounded to x.dtype once (transformers rounds cosine and sine to x.dtype as well).
    """
    cos, sin = _tables(rotary, offset, x.shape[1])
    halves = x.astype(mx.float32).reshape(*x.shape[:-1], 2, -1)
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)
