"""Speculative decoding: a draft proposes tokens, the model checks all of them in one pass.

The model's own choice decides every token. Greedy: a proposal is kept where it is the likeliest token, so that the ids
are those of plain greedy decoding, up to ties within the rounding of a pass over several tokens instead of one.
Sampling: a proposal x, drawn from the draft's q, is kept with probability min(1, p(x) / q(x)), and what replaces it is
drawn from max(p - q, 0), so that tokens have exactly the model's distribution p, whatever the draft.
Sources: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Saxena 2023, prompt-lookup decoding.
"""

from __future__ import annotations

import contextlib
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from ..backend import mx
from ..errors import QwenMLXError
from ..model.cache import KVCache
from ..model.fused import FusedModel
from ..model.qwen2 import Qwen2
from .drafts import Draft, Proposal, check_cache, check_draft_tokens, seen_ids
from .engine import NOT_FINITE, PREFILL_CHUNK, GenerationStats, chances, generate_ids
from .sampling import SamplingSettings, processed_logits

WINDOW = 8  # rounds that are judged together
PROBE = 16  # rounds without a plain step to compare with, at most
PAUSE, LONGEST_PAUSE = 32, 1024  # tokens


class Pace:
    """Whether drafting pays, by the clock. The last 8 rounds that had a proposal make tokens at some speed, draft and
    check included; a plain step makes one in the median of its last 8 times, of which one at least is made in every 16
    rounds. Slower than plain: drafting pauses for 32 tokens, and for twice as many each time that it is slower again.
    """

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=WINDOW)
        self._rounds: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._since_plain = 0
        self._pause = PAUSE
        self._seen: set[int] = set()

    @property
    def wants_plain(self) -> bool:
        """Whether the next step should be a plain one, to compare with."""
        return self._since_plain >= (PROBE if self._plain else 2)

    def plain(self, seconds: float) -> None:
        """Counts a step without a proposal."""
        self._plain.append(seconds)
        self._since_plain = 0

    def round(self, proposed: int, made: int, seconds: float) -> None:
        """Counts a round that checked `proposed` tokens and made `made`."""
        self._since_plain += 1
        if proposed in self._seen:
            self._rounds.append((made, seconds))
        self._seen.add(proposed)  # the first of each size may compile kernels

    def pause(self) -> int:
        """Tokens to decode plainly now, 0 while drafting pays."""
        if len(self._rounds) < WINDOW or not self._plain:
            return 0
        made, seconds = (sum(column) for column in zip(*self._rounds))
        if made * statistics.median(self._plain) >= seconds:
            self._pause = PAUSE
            return 0
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self._rounds.clear()
        return pause


def speculative_ids(
    model: Qwen2,
    prompt_ids: Sequence[int],
    *,
    draft_model: Draft,
    num_draft_tokens: int | None = None,
    max_tokens: int | None = None,
    stats: GenerationStats | None = None,
    sampling: SamplingSettings | None = None,
    seed: int | None = None,
    cache: Sequence[KVCache] | None = None,
    cached_ids: Sequence[int] = (),
    min_tokens: int = 0,
    end_ids: Sequence[int] = (),
    logprobs: int | None = None,
    on_logprobs: Callable[[float, tuple[tuple[int, float], ...]], None] | None = None,
    prefill_step_size: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[int, None, None]:
    """Yields the ids of generate_ids, whose arguments it has, faster where `draft_model` guesses well.

    num_draft_tokens: proposed at a time at most, 1 to 32; None is the draft's own. So many are proposed after one
    that was kept whole, else 2, which cost a CPU hardly more than none. max_tokens: none is proposed beyond it.
    stats: gets drafted_tokens, accepted_tokens and paused_tokens. clock: seconds, for Pace. Raises QwenMLXError as
    check_cache and generate_ids.
    """
    sampling = model.generation_defaults if sampling is None else sampling
    cache = model.make_cache() if cache is None else cache
    check_cache(cache)
    stats = GenerationStats() if stats is None else stats
    most = check_draft_tokens(draft_model.num_draft_tokens if num_draft_tokens is None else num_draft_tokens)
    key = mx.random.key(secrets.randbits(63) if seed is None else seed)
    ids = [*cached_ids, *prompt_ids]
    rules = Rules(sampling, len(ids), min_tokens, tuple(end_ids))
    before, yielded, length, pace = cache[0].offset + len(prompt_ids), 0, min(2, most), Pace()

    def plainly(new: Sequence[int]) -> contextlib.closing[Generator[int, None, None]]:
        nonlocal key
        key, now = mx.random.split(key)
        held = ids[: len(ids) - len(new)]
        draw = int(mx.random.randint(0, 2**31 - 1, key=now))
        return contextlib.closing(
            generate_ids(
                model,
                new,
                sampling=sampling,
                seed=draw,
                cache=cache,
                cached_ids=held,
                n_made=yielded,
                min_tokens=min_tokens,
                end_ids=end_ids,
                logprobs=logprobs,
                on_logprobs=on_logprobs,
                prefill_step_size=prefill_step_size,
                progress=progress if len(new) > 1 else None,
            )
        )

    try:
        with plainly(prompt_ids) as tokens:
            ids.append(next(tokens))
        yielded += 1
        yield ids[-1]
        while True:
            if pause := pace.pause():
                length = min(2, most)
                with plainly(ids[-1:]) as tokens:
                    for _ in range(pause):
                        begin = clock()
                        ids.append(next(tokens))
                        pace.plain(clock() - begin)
                        stats.paused_tokens += 1
                        yielded += 1
                        yield ids[-1]
            begin = clock()
            count = length if max_tokens is None else min(length, max_tokens - yielded - 1)
            key, first, second = mx.random.split(key, 3)
            proposal = Proposal([])
            if count > 0 and not pace.wants_plain:
                proposal = draft_model.propose(ids, count, sampling, first)
            made, logits = _check(model, cache, ids, proposal, rules, second)
            proposed, kept = len(proposal.ids), len(made) - 1
            for layer in cache:
                layer.trim(proposed - kept)
            ids += made
            if proposed:
                pace.round(proposed, len(made), clock() - begin)
                stats.drafted_tokens += proposed
                stats.accepted_tokens += kept
                length = most if kept == proposed else min(2, most)
            else:
                pace.plain(clock() - begin)
            for i, token in enumerate(made):
                if on_logprobs is not None and logprobs is not None:
                    on_logprobs(*chances(logits[i : i + 1], token, logprobs))
                yielded += 1
                yield token
    finally:  # as generate_ids: all but the last token that was yielded
        for layer in cache:
            layer.trim(max(0, layer.offset - before - max(yielded - 1, 0)))


@dataclass(frozen=True)
class Rules:
    """How tokens are chosen in one generation; the arguments of generate_ids, n_prompt: tokens before the first."""

    sampling: SamplingSettings
    n_prompt: int
    min_tokens: int
    end_ids: tuple[int, ...]


def _check(
    model: Qwen2, cache: Sequence[KVCache], ids: list[int], proposal: Proposal, rules: Rules, key: mx.array
) -> tuple[list[int], mx.array]:
    """The proposals that are kept, and one token more; the model's logits for them, (proposals + 1, V) float32. The
    cache grows by the last of `ids` and all proposals."""
    inputs = [ids[-1], *proposal.ids]
    logits = FusedModel.of(model)(mx.array([inputs], mx.int32), cache, 0)[0].astype(mx.float32)
    finite = mx.isfinite(logits.sum())
    made: list[int] = []
    for i, proposed in enumerate([*proposal.ids, None]):
        text = ids + made
        key, coin, now = mx.random.split(key, 3)
        row = processed_logits(
            logits[i : i + 1],
            rules.sampling,
            seen_ids(rules.sampling, text),
            n_prompt=rules.n_prompt,
            ruled_out=rules.end_ids if len(text) - rules.n_prompt < rules.min_tokens else (),
            end_ids=rules.end_ids,
            xtc_key=coin,  # thrown first: what is kept and what replaces it then have one distribution
        )
        if rules.sampling.greedy:
            token = int(mx.argmax(row))
        else:
            q = proposal.distributions[i] if proposal.distributions and proposed is not None else None
            token = _accept_or_draw(row, proposed, q, now)
        if i == 0 and not finite.item():
            raise QwenMLXError(NOT_FINITE)
        made.append(token)
        if token != proposed:
            break
    return made, logits


def _accept_or_draw(logits: mx.array, proposed: int | None, q: mx.array | None, key: mx.array) -> int:
    """A token with the distribution softmax(logits), (1, V): `proposed` if it may stay, else what replaces it.

    q: (1, V') the distribution that `proposed` was drawn from; None if it was certain.
    """
    accept, draw = mx.random.split(key)
    if proposed is None:
        return int(mx.random.categorical(logits, key=draw))
    p = mx.softmax(logits, axis=-1)
    size = p.shape[-1]
    if q is None:
        q = (mx.arange(size) == proposed)[None].astype(mx.float32)
    elif q.shape[-1] < size:  # embeddings of other sizes, as padding; the vocabulary is the same
        q = mx.pad(q, [(0, 0), (0, size - q.shape[-1])])
    if proposed < size and (mx.random.uniform(key=accept) * q[0, proposed] < p[0, proposed]).item():
        return proposed
    rest = mx.maximum(p - q[:, :size], 0)
    # Nothing is left only where p and q agree up to rounding: then p itself is the answer.
    rest = mx.where(rest.sum() > 0, rest, p)
    return int(mx.random.categorical(mx.log(rest), key=draw))
