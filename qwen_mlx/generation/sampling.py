"""Sampling: small pure functions on logits, in transformers' order: bias and penalties, temperature, top-k, top-p,
min-p, typical-p, XTC.

All take and return float32 logits (B, V); a token that is ruled out gets -inf.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..backend import mx
from ..errors import QwenMLXError, refuse_unknown


@dataclass(frozen=True)
class SamplingSettings:
    """The way the next token is chosen. temperature 0 is greedy; these values are off: top_k, min_p, presence_penalty,
    frequency_penalty, no_repeat_ngram_size and xtc_probability 0, top_p, typical_p and repetition_penalty 1.

    repetition_penalty and no_repeat_ngram_size look at the prompt too, presence_penalty and frequency_penalty only at
    generated tokens. logit_bias: pairs of a token id and a number that is added to its logit, or a mapping. `source`
    says where the values come from, for --verbose. Raises QwenMLXError for an impossible value.
    logits_processors: functions of (token ids of the text so far (N,), logits (1, V)) that return logits, called in
    order after the penalties. sampler: a function of log-probabilities (1, V) that returns a token id (1,), in place of
    all from temperature to xtc_threshold. Both are for one row, as mlx-lm's.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    logits_processors: Sequence[Callable[[mx.array, mx.array], mx.array]] = ()
    sampler: Callable[[mx.array], mx.array] | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        for name, low, high, why in (
            ("temperature", 0, 1e6, "from 0 (greedy) to 1000000"),
            ("top_k", 0, math.inf, "0 (off) or more"),
            ("top_p", 0, 1, "more than 0 and at most 1 (off)"),
            ("min_p", 0, 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0.01, 100, "from 0.01 to 100; 1 is off"),
            ("typical_p", 0, 1, "more than 0 and at most 1 (off)"),
            ("presence_penalty", -100, 100, "from -100 to 100; 0 is off"),
            ("frequency_penalty", -100, 100, "from -100 to 100; 0 is off"),
            ("no_repeat_ngram_size", 0, math.inf, "0 (off) or more"),
            ("xtc_probability", 0, 1, "from 0 (off) to 1"),
            ("xtc_threshold", 0, 0.5, "from 0 to 0.5"),
        ):
            value: Any = getattr(self, name)
            integer = name in ("top_k", "no_repeat_ngram_size")
            fits = isinstance(value, numbers.Integral if integer else numbers.Real) and not isinstance(value, bool)
            if not fits or not low <= value <= high or value == math.inf or (why.startswith("more") and not value):
                raise QwenMLXError(f"{name} is {value!r}, expected {why}.")
            if not isinstance(value, int | float):  # NumPy's
                object.__setattr__(self, name, int(value) if integer else float(value))

        processors = self.logits_processors
        if not isinstance(processors, list | tuple) or not all(map(callable, processors)):
            raise QwenMLXError(f"logits_processors is {processors!r:.80}, expected a list of functions.")
        object.__setattr__(self, "logits_processors", tuple(processors))
        if self.sampler is not None and not callable(self.sampler):
            raise QwenMLXError(f"sampler is {self.sampler!r:.80}, expected a function.")
        unused = ("temperature", "top_k", "top_p", "min_p", "typical_p", "xtc_probability")
        given = [f.name for f in fields(self) if f.name in unused and getattr(self, f.name) != f.default]
        if self.sampler is not None and given:
            raise QwenMLXError(f"{given[0]} is given with a sampler, which chooses alone; leave one of them out.")

        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        try:
            bias = tuple(sorted((operator.index(token), float(value)) for token, value in pairs))
        except (TypeError, ValueError):
            raise QwenMLXError(f"logit_bias is {self.logit_bias!r}, expected {{token id: number}}.") from None
        wrong = next((pair for pair in bias if pair[0] < 0 or not (pair[1] == -math.inf or abs(pair[1]) <= 1e6)), None)
        if wrong:
            raise QwenMLXError(
                f"logit_bias gives token {wrong[0]} {wrong[1]!r}, expected an id and -inf or a number from -1e6 to 1e6."
            )
        object.__setattr__(self, "logit_bias", bias)

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is chosen: below this temperature float32 would divide by zero."""
        return self.temperature < 1e-30

    @property
    def plainly_greedy(self) -> bool:
        """True where the likeliest token of the unchanged logits is chosen."""
        return self.greedy and not self.looks_back and not self.logit_bias and self.sampler is None

    @property
    def looks_back(self) -> bool:
        """True where earlier tokens matter."""
        penalties = self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0 or self.counts
        return penalties or bool(self.logits_processors)

    @property
    def counts(self) -> bool:
        """True where it matters how often a token was generated."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    def override(self, **given: Any) -> SamplingSettings:
        """The same settings with those of `given` that are not None. A temperature of 0 drops a default penalty,
        because greedy means the likeliest token; a penalty that is given stays. Raises QwenMLXError for an impossible
        value or an unknown name."""
        refuse_unknown(given, SAMPLING_ARGUMENTS)
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return self
        source = f"{', '.join(given)} given, the rest {self.source}"
        if given.get("temperature") == 0:
            return SamplingSettings(**given, source="greedy, as given")
        if "sampler" in given:
            return SamplingSettings(**given, source="a sampler, as given")
        return replace(self, **given, source=source)

    def __str__(self) -> str:
        always = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        shown = [
            f for f in fields(self) if f.name in always or (f.name != "source" and getattr(self, f.name) != f.default)
        ]
        values = ", ".join(f"{f.name} {getattr(self, f.name)}" for f in shown)
        return f"{values} ({self.source})"


SAMPLING_ARGUMENTS = [f.name for f in fields(SamplingSettings) if f.name != "source"]


def repetition_penalty(logits: mx.array, ids: mx.array, penalty: float) -> mx.array:
    """Divides positive and multiplies negative logits of the tokens in `ids` (B, N) by `penalty`.

    Source: Keskar et al. 2019, CTRL, section 4.1; transformers' RepetitionPenaltyLogitsProcessor.
    """
    seen = mx.take_along_axis(logits, ids, axis=-1)
    return mx.put_along_axis(logits, ids, mx.where(seen < 0, seen * penalty, seen / penalty), axis=-1)


def top_k_candidates(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k largest logits, in falling order, and their token ids, both (B, k). Source: Fan et al. 2018."""
    batch, width = logits.shape
    size = width & -width  # the largest power of two that divides the vocabulary
    if size >= 32 and width // size > 2 * k:
        # They lie in the k runs whose maxima are largest: partitioning the whole vocabulary is much slower on a CPU.
        runs = logits.reshape(batch, -1, size)
        best = mx.argpartition(-runs.max(axis=-1), k - 1, axis=-1)[:, :k]
        logits = mx.take_along_axis(runs, best[..., None], axis=1).reshape(batch, -1)
        offsets = (best[..., None] * size + mx.arange(size)).reshape(batch, -1)
    else:
        offsets = None
    ids = mx.argpartition(-logits, k - 1, axis=-1)[:, :k]
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    values, ids = mx.take_along_axis(values, order, axis=-1), mx.take_along_axis(ids, order, axis=-1)
    return values, ids if offsets is None else mx.take_along_axis(offsets, ids, axis=-1)


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


def typical_p(logits: mx.array, p: float) -> mx.array:
    """Keeps the tokens whose surprise is nearest to the expected one, until their probability reaches p.

    Source: Meister et al. 2022, arXiv:2202.00666; transformers' TypicalLogitsWarper.
    """
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    entropy = -mx.where(logp == -mx.inf, 0, mx.exp(logp) * logp).sum(axis=-1, keepdims=True)
    oddity = mx.abs(-logp - entropy)
    order = mx.argsort(oddity, axis=-1)
    sums = mx.cumsum(mx.exp(mx.take_along_axis(logp, order, axis=-1)), axis=-1)
    last = mx.minimum((sums < p).sum(axis=-1, keepdims=True), logits.shape[-1] - 1)
    limit = mx.take_along_axis(oddity, mx.take_along_axis(order, last, axis=-1), axis=-1)
    # The first is always kept.
    return mx.where((oddity > limit) & (oddity > oddity.min(axis=-1, keepdims=True)), -mx.inf, logits)


def count_penalties(logits: mx.array, generated: mx.array, presence: float, frequency: float) -> mx.array:
    """Takes from each logit `presence` if its token is among `generated` (B, N), and `frequency` for each time it is.

    Source: OpenAI's API reference, presence_penalty and frequency_penalty; as in vLLM of generated tokens alone.
    """
    rows = mx.arange(generated.shape[0])[:, None]
    counts = mx.zeros(logits.shape, mx.float32).at[rows, generated].add(1.0)
    times = mx.take_along_axis(counts, generated, axis=-1)
    lower = mx.take_along_axis(logits, generated, axis=-1) - presence - frequency * times
    return mx.put_along_axis(logits, generated, lower, axis=-1)


def no_repeat_ngrams(logits: mx.array, ids: mx.array, n: int) -> mx.array:
    """Rules out the tokens that would end a run of n tokens which `ids` (B, N) already holds.

    Source: transformers' NoRepeatNGramLogitsProcessor.
    """
    length = ids.shape[1]
    if length < n:
        return logits
    again = mx.ones((ids.shape[0], length - n + 1), mx.bool_)
    for i in range(n - 1):
        again &= ids[:, i : length - n + 1 + i] == ids[:, length - n + 1 + i][:, None]
    rows = mx.arange(ids.shape[0])[:, None]
    return logits.at[rows, ids[:, n - 1 :]].minimum(mx.where(again, -mx.inf, mx.inf))


def xtc(logits: mx.array, threshold: float, probability: float, keep: mx.array, key: mx.array) -> mx.array:
    """With `probability`, rules out all tokens at least as likely as `threshold` but the least likely of them.

    keep: bool (B, V), never ruled out: end tokens; key: (2,) or (B, 2). Source: "Exclude Top Choices",
    text-generation-webui pull request 6335; mlx-lm's apply_xtc.
    """
    p = mx.softmax(logits, axis=-1)
    least = mx.where(p > threshold, p, mx.inf).min(axis=-1, keepdims=True)
    excluded = mx.where((p > least) & ~keep, -mx.inf, logits)
    if key.ndim == 1:
        draw = mx.random.uniform(shape=(logits.shape[0], 1), key=key)
    else:
        draw = mx.vmap(lambda one: mx.random.uniform(shape=(1,), key=one))(key)
    return mx.where(draw < probability, excluded, logits)


def rule_out(logits: mx.array, ids: Sequence[int], rows: mx.array | None = None) -> mx.array:
    """Logits (B, V) in which `ids` cannot be chosen, in all rows or in those that bool `rows` (B,) names."""
    change = mx.array(-mx.inf) if rows is None else mx.where(rows, -mx.inf, 0.0)[:, None]
    return logits.at[:, mx.array(list(ids))].add(change)


def penalized(
    logits: mx.array, settings: SamplingSettings, seen: mx.array | None = None, n_prompt: int | mx.array = 0
) -> mx.array:
    """Logits (B, V) float32 with bias and penalties. `seen` (B, N): the text so far, n_prompt of it prompt.

    Rows of other lengths: `seen` is padded on the left with V, which is no token, and n_prompt is (B,), the columns of
    padding and prompt.
    """
    logits, width = logits.astype(mx.float32), logits.shape[-1]
    if settings.logit_bias:
        ids, values = zip(*settings.logit_bias)
        logits = logits.at[:, mx.array(ids)].add(mx.array(values))
    if seen is None or not seen.size:
        return logits
    if isinstance(n_prompt, int):
        generated = seen[:, n_prompt:]
    else:
        generated = mx.where(mx.arange(seen.shape[1]) < n_prompt[:, None], width, seen)
        logits = mx.pad(logits, [(0, 0), (0, 1)])  # the changes to V are cut off below
    if settings.repetition_penalty != 1:
        logits = repetition_penalty(logits, seen, settings.repetition_penalty)
    if settings.counts and generated.size:
        logits = count_penalties(logits, generated, settings.presence_penalty, settings.frequency_penalty)
    if settings.no_repeat_ngram_size:
        logits = no_repeat_ngrams(logits, seen, settings.no_repeat_ngram_size)
    logits = logits[:, :width]
    for processor in settings.logits_processors:
        logits = processor(seen[0], logits)
        if not isinstance(logits, mx.array) or logits.shape != (1, width):
            what = logits.shape if isinstance(logits, mx.array) else type(logits).__name__
            raise QwenMLXError(f"A logits processor gave {what}, expected logits of the shape (1, {width}).")
    return logits


def candidates(
    logits: mx.array,
    settings: SamplingSettings,
    seen: mx.array | None = None,
    *,
    n_prompt: int | mx.array = 0,
    eos_token_ids: Sequence[int] = (),
    xtc_key: mx.array | None = None,
) -> tuple[mx.array, mx.array | None]:
    """The logits (B, K) that `settings` leave to draw from, and the token ids (B, K) they belong to, None if those are
    the whole vocabulary. Greedy leaves the whole vocabulary, and the argmax is the choice.

    Arguments as `sample`. xtc_key: decides whether XTC applies; without it, it does not.
    """
    logits, ids = penalized(logits, settings, seen, n_prompt), None
    if settings.greedy:
        return logits, None
    if 0 < settings.top_k < logits.shape[-1]:  # first: the rest works on k candidates instead of the whole vocabulary
        logits, ids = top_k_candidates(logits, settings.top_k)
    # Shifted first, so that no temperature, however small, makes inf - inf.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / settings.temperature
    if settings.top_p < 1:
        logits = top_p(logits, settings.top_p)
    if settings.min_p > 0:
        logits = min_p(logits, settings.min_p)
    if settings.typical_p < 1:
        logits = typical_p(logits, settings.typical_p)
    if settings.xtc_probability > 0 and xtc_key is not None:
        tokens = mx.arange(logits.shape[-1])[None] if ids is None else ids
        keep = mx.any(tokens[..., None] == mx.array([*eos_token_ids, -1]), axis=-1)
        logits = xtc(logits, settings.xtc_threshold, settings.xtc_probability, keep, xtc_key)
    return logits, ids


def processed_logits(
    logits: mx.array,
    settings: SamplingSettings,
    seen: mx.array | None = None,
    *,
    n_prompt: int | mx.array = 0,
    eos_token_ids: Sequence[int] = (),
    xtc_key: mx.array | None = None,
) -> mx.array:
    """The logits of `candidates` over the whole vocabulary (B, V), -inf where a token is ruled out: their softmax is
    the distribution that `sample` draws from; greedy, their argmax is the choice."""
    left, ids = candidates(logits, settings, seen, n_prompt=n_prompt, eos_token_ids=eos_token_ids, xtc_key=xtc_key)
    return left if ids is None else mx.put_along_axis(mx.full(logits.shape, -mx.inf), ids, left, axis=-1)


def sample(
    logits: mx.array,
    settings: SamplingSettings,
    seen: mx.array | None = None,
    key: mx.array | None = None,
    *,
    n_prompt: int | mx.array = 0,
    eos_token_ids: Sequence[int] = (),
) -> mx.array:
    """Draws one token id (B,) from float logits (B, V). `seen` (B, N), n_prompt: the text so far, for the penalties, as
    `penalized` takes it; key: one for all rows (2,), or one for each (B, 2), with which a row draws what it draws
    alone; eos_token_ids: XTC keeps them."""
    keys, xtc_key = (mx.random.key(0) if key is None else key), None
    if settings.xtc_probability > 0:
        keys, xtc_key = _split(keys)
    left, ids = candidates(logits, settings, seen, n_prompt=n_prompt, eos_token_ids=eos_token_ids, xtc_key=xtc_key)
    if settings.sampler is not None:
        return _chosen(settings.sampler, left - mx.logsumexp(left, axis=-1, keepdims=True))
    if settings.greedy:
        return mx.argmax(left, axis=-1)
    if keys.ndim == 1:
        choice = mx.random.categorical(left, axis=-1, key=keys)
    else:  # row by row: MLX's categorical has one key for all of them, and cannot be mapped over several
        rows = [mx.random.categorical(left[i : i + 1], axis=-1, key=keys[i]) for i in range(len(keys))]
        choice = mx.concatenate(rows)
    return choice if ids is None else mx.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]


def _chosen(sampler: Callable[[mx.array], Any], logprobs: mx.array) -> mx.array:
    """A caller's sampler's choice from logprobs (1, V), as (1,). Raises QwenMLXError unless it is a token id."""
    token = sampler(logprobs)
    ids = np.array(token).reshape(-1)
    if ids.size != 1 or ids.dtype.kind not in "iu" or not 0 <= ids[0] < logprobs.shape[-1]:
        raise QwenMLXError(f"sampler gave {token!r:.80}, expected a token id from 0 to {logprobs.shape[-1] - 1}.")
    return mx.array(ids.astype(np.int32))


def _split(key: mx.array) -> tuple[mx.array, mx.array]:
    """Two new keys of a key (2,), or of each of several (B, 2)."""
    pairs = mx.random.split(key) if key.ndim == 1 else mx.vmap(mx.random.split)(key).swapaxes(0, 1)
    return pairs[0], pairs[1]


def log_probabilities(logits: mx.array, tokens: mx.array, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ln p of `tokens` (B,) under logits (B, V), and the n likeliest tokens with theirs: (B,), (B, n), (B, n).

    Waits for the logits and computes in NumPy, whose exp is fast on a CPU and whose float32 sums are pairwise: MLX's
    sum over a whole vocabulary loses the small terms.
    """
    rows = np.asarray(logits.astype(mx.float32))
    top = rows.max(axis=-1, keepdims=True)
    total = top + np.log(np.exp(rows - top).sum(axis=-1, keepdims=True), dtype=np.float64)
    ids = np.argpartition(rows, -n, axis=-1)[:, -n:] if n else np.zeros((len(rows), 0), np.int64)
    values = np.take_along_axis(rows, ids, axis=-1)
    order = np.argsort(-values, axis=-1)
    own = np.take_along_axis(rows, np.asarray(tokens)[:, None], axis=-1) - total
    return own[:, 0], np.take_along_axis(ids, order, axis=-1), np.take_along_axis(values, order, axis=-1) - total
