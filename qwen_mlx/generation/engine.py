"""The token loop: prompt ids in, ids out, one step ahead of who reads them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from .. import ops
from ..backend import mx
from ..errors import QwenMLXError
from ..model.cache import KVCache
from ..model.fused import FusedModel
from ..model.qwen2 import Qwen2
from .sampling import SamplingSettings, log_probabilities, sample

PREFILL_CHUNK = 512  # tokens: bounds the memory of a long prompt's activations
NOT_FINITE = (
    "The model's logits are not finite; the file is damaged, or the dtype overflows (float16 does for Qwen2.5: use "
    "bfloat16 or float32)."
)


@dataclass
class GenerationStats:
    """What a generation cost so far; times in seconds. The first token's time belongs to the prompt, whose tokens were
    computed (prompt_tokens) or already in a prompt cache (reused_tokens). A draft proposed drafted_tokens, of which
    accepted_tokens were kept; while it was slower than plain decoding, paused_tokens were made without it. With several
    ranks, communication_seconds of the time went into communication and waiting for each other."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    paused_tokens: int = 0
    communication_seconds: float = 0.0

    @property
    def prompt_per_second(self) -> float:
        """Prompt tokens computed per second; 0.0 before any was."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """The share of drafted tokens that were kept."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def generated_per_second(self) -> float:
        """Tokens made per second after the first, which belongs to the prompt."""
        return (self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0


def generate_ids(
    model: Qwen2,
    prompt_ids: Sequence[int],
    *,
    sampling: SamplingSettings | None = None,
    seed: int | None = None,
    cache: Sequence[KVCache] | None = None,
    cached_ids: Sequence[int] = (),
    n_made: int = 0,
    min_tokens: int = 0,
    end_ids: Sequence[int] = (),
    logprobs: int | None = None,
    on_logprobs: Callable[[float, tuple[tuple[int, float], ...]], None] | None = None,
    prefill_step_size: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[int, None, None]:
    """Yields token ids without end. The next step is launched before the last one is read.

    sampling: None is the model's own defaults. seed: None draws one. cache: continues it (`prompt_ids` are new tokens);
    afterwards it holds the prompt and every token yielded but the last. cached_ids: what it holds, for the penalties.
    n_made: how many of the newest tokens given were generated, and count as such. min_tokens: end_ids are ruled out
    before so many tokens, those included; XTC keeps end_ids. logprobs: with it, on_logprobs is called before each token
    with its ln p and so many of the likeliest (id, ln p). progress: called with (prompt tokens done, prompt tokens in
    all). Raises QwenMLXError if the logits are not finite.
    """
    sampling = model.generation_defaults if sampling is None else sampling
    cache = model.make_cache() if cache is None else cache
    fused = FusedModel.of(model)
    key = mx.random.key(secrets.randbits(63) if seed is None else seed)
    prompt = mx.array(np.asarray(prompt_ids, np.int32))[None]
    length = prompt.shape[1]
    start, yielded = cache[0].offset, 0
    seen = mx.array([*cached_ids, *prompt_ids], mx.int32)[None] if sampling.looks_back else None
    n_prompt, launched = len(cached_ids) + length - n_made, n_made
    for layer in cache:
        layer.reserve(start + length)
    done = 0
    while length - done > prefill_step_size:
        fused.hidden(prompt[:, done : done + prefill_step_size], cache)
        mx.eval([layer.arrays for layer in cache])
        mx.clear_cache()  # of a long prompt, each chunk needs buffers of other sizes than the last
        done += prefill_step_size
        if progress:
            progress(done, length)

    def step(ids: mx.array) -> tuple[mx.array, ...]:
        """The next token, -1 if a logit is not finite. The logits too, if log-probabilities are wanted."""
        nonlocal key, launched
        logits = fused(ids, cache)[:, -1]
        now = None
        if not sampling.greedy:
            key, now = mx.random.split(key)
        ruled_out = end_ids if launched < min_tokens else ()
        launched += 1
        if sampling.plainly_greedy and not ruled_out:
            token = ops.best_token(logits)
        else:
            wide = logits.astype(mx.float32)
            choice = sample(wide, sampling, seen, now, n_prompt=n_prompt, ruled_out=ruled_out, end_ids=end_ids)
            token = ops.or_not_finite(wide, choice)
        if model.ranks is not None:
            token = model.ranks.from_first(token)
        found = (token,) if logprobs is None else (token, logits.astype(mx.float32))
        mx.async_eval(found)
        return found

    following: tuple[mx.array, ...] | None = None
    try:
        token, *logits = step(prompt[:, done:])
        while True:
            following = None
            if seen is not None:
                seen = mx.concatenate([seen, token[:, None]], axis=1)
            if done >= length:  # the first token is shown before the second is computed
                following = step(token[:, None])
            made = int(token)
            if made < 0:
                raise QwenMLXError(NOT_FINITE)
            if done < length:
                done = length
                if progress:
                    progress(done, length)
            yielded += 1
            if yielded % 256 == 0:
                mx.clear_cache()  # buffers that a cache has outgrown
            if on_logprobs is not None and logprobs is not None:
                on_logprobs(*chances(logits[0], made, logprobs))
            yield made
            token, *logits = step(token[:, None]) if following is None else following
    finally:
        if model.ranks is not None and following is not None:
            model.ranks.wait(*following)
        for layer in cache:  # a step may be under way
            layer.trim(max(0, layer.offset - start - length - max(yielded - 1, 0)))


def chances(logits: mx.array, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """ln p of a token under logits (1, V), and the n likeliest (id, ln p)."""
    chosen, ids, values = log_probabilities(logits, mx.array([token]), n)
    return float(chosen[0]), tuple(zip(ids[0].tolist(), values[0].tolist()))
