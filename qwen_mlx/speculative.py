"""Speculative decoding: a draft proposes tokens, the model checks all of them in one pass.

The model's own choice decides every token. Greedy: a proposal is kept where it is the likeliest token, so that the ids
are those of plain greedy decoding, up to ties within the rounding of a pass over several tokens instead of one.
Sampling: a proposal x, drawn from the draft's q, is kept with probability min(1, p(x) / q(x)), and what replaces it is
drawn from max(p - q, 0), so that tokens have exactly the model's distribution p, whatever the draft.
Sources: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Saxena 2023, prompt-lookup decoding.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import hub, ops
from .backend import mx
from .cache import KVCache
from .errors import QwenMLXError
from .generation import NOT_FINITE, PREFILL_CHUNK, GenerationStats, chances, generate_ids
from .model import Qwen2
from .prompt_cache import PromptCache, common_prefix
from .sampling import SamplingSettings, processed_logits

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

LOOKUP = "prompt-lookup"
MOST_DRAFT_TOKENS = 32  # a quantized cache keeps the newest 64 tokens as floats, which taking back must not exceed
NGRAMS = (4, 3, 2)  # tokens that must recur, longest first
WINDOW = 8  # rounds that are judged together
PROBE = 16  # rounds without a plain step to compare with, at most
PAUSE, LONGEST_PAUSE = 32, 1024  # tokens


@dataclass(frozen=True)
class Proposal:
    """Proposed ids, and the distribution (1, V) float32 that each was drawn from; no distributions: it was certain."""

    ids: list[int]
    distributions: list[mx.array] | None = None


class Draft(Protocol):
    """What proposes tokens. draft_tokens: how many at most, by default."""

    draft_tokens: int

    def propose(self, ids: list[int], count: int, sampling: SamplingSettings, key: mx.array) -> Proposal:
        """Up to `count` tokens after `ids`, all of the text so far; none if it has no idea."""
        ...


class PromptLookup:
    """Proposes what followed the latest earlier occurrence of the last 4, 3 or 2 tokens of prompt and answer."""

    draft_tokens = 15  # with the token before them a multiple of what BLAS libraries work on at a time

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


class ModelDraft:
    """A smaller model with the same vocabulary. It keeps its own cache: what two texts have in common is read once.

    Sampling draws from the draft with the model's settings but XTC, bias and the penalties on what was generated: the
    model's own choice makes up for what a draft leaves out.
    """

    draft_tokens = 4

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
                    with ops.no_grad():
                        logits = self.model(chunk, self._cache.layers, logits_to_keep=1)[:, -1]
                    mx.eval(logits)
                logits = processed_logits(logits, sampling, _seen(sampling, ids + found))
                if sampling.greedy:
                    token = int(mx.argmax(logits).item())
                else:
                    key, now = mx.random.split(key)
                    distributions.append(mx.softmax(logits, axis=-1))
                    token = int(mx.random.categorical(logits, key=now).item())
                found.append(token)
                rest = [token]
        finally:
            self._cache.record([*ids, *found], self._cache.layers)
        return Proposal(found, distributions or None)


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
    draft: Draft,
    draft_tokens: int | None = None,
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
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[int]:
    """Yields the ids of generate_ids, whose arguments it has, faster where `draft` guesses well.

    draft_tokens: proposed at a time at most, 1 to 32; None is the draft's own. So many are proposed after a proposal
    that was kept whole, else 2, which cost a CPU hardly more than none. max_tokens: none is proposed beyond it.
    stats: gets drafted_tokens, accepted_tokens and paused_tokens. clock: seconds, for Pace. Raises QwenMLXError as
    check_cache and generate_ids.
    """
    sampling = model.generation_defaults if sampling is None else sampling
    cache = model.make_cache() if cache is None else cache
    check_cache(cache)
    stats = GenerationStats() if stats is None else stats
    most = check_draft_tokens(draft.draft_tokens if draft_tokens is None else draft_tokens)
    key = mx.random.key(secrets.randbits(63) if seed is None else seed)
    ids = [*cached_ids, *prompt_ids]
    rules = Rules(sampling, len(ids), min_tokens, tuple(end_ids))
    before, yielded, length, pace = cache[0].offset + len(prompt_ids), 0, min(2, most), Pace()

    def plainly(new: Sequence[int]) -> contextlib.closing[Iterator[int]]:
        nonlocal key
        key, now = mx.random.split(key)
        held = ids[: len(ids) - len(new)]
        draw = int(mx.random.randint(0, 2**31 - 1, key=now).item())
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
                prefill_chunk=prefill_chunk,
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
                proposal = draft.propose(ids, count, sampling, first)
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


def _seen(sampling: SamplingSettings, ids: list[int]) -> mx.array | None:
    return mx.array([ids], mx.int32) if sampling.looks_back else None


def _check(
    model: Qwen2, cache: Sequence[KVCache], ids: list[int], proposal: Proposal, rules: Rules, key: mx.array
) -> tuple[list[int], mx.array]:
    """The proposals that are kept, and one token more; the model's logits for them, (proposals + 1, V) float32. The
    cache grows by the last of `ids` and all proposals."""
    inputs = [ids[-1], *proposal.ids]
    with ops.no_grad():
        logits = model(mx.array([inputs], mx.int32), cache)[0].astype(mx.float32)
    finite = mx.isfinite(logits.sum())
    made: list[int] = []
    for i, proposed in enumerate([*proposal.ids, None]):
        text = ids + made
        key, coin, now = mx.random.split(key, 3)
        row = processed_logits(
            logits[i : i + 1],
            rules.sampling,
            _seen(rules.sampling, text),
            n_prompt=rules.n_prompt,
            ruled_out=rules.end_ids if len(text) - rules.n_prompt < rules.min_tokens else (),
            end_ids=rules.end_ids,
            xtc_key=coin,  # thrown first: what is kept and what replaces it then have one distribution
        )
        if rules.sampling.greedy:
            token = int(mx.argmax(row).item())
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
        return int(mx.random.categorical(logits, key=draw).item())
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
    return int(mx.random.categorical(mx.log(rest), key=draw).item())


def make_draft(draft: Draft | Qwen2 | str) -> Draft:
    """What `draft=` of stream_generate may be: a model, "prompt-lookup", or a draft that is kept from call to call."""
    if isinstance(draft, Qwen2):
        return ModelDraft(draft)
    if draft == LOOKUP:
        return PromptLookup()
    if isinstance(draft, str) or not hasattr(draft, "propose"):
        raise QwenMLXError(f"draft is {draft!r}, expected a model that load() gave, or {LOOKUP!r}.")
    return draft


def check_draft(draft: Draft | Qwen2 | str, draft_tokens: int | None, cache: Sequence[KVCache] = ()) -> dict[str, Any]:
    """The arguments `draft` and `draft_tokens` of speculative_ids; QwenMLXError for what cannot be."""
    check_cache(cache)
    found = make_draft(draft)
    return {
        "draft": found,
        "draft_tokens": check_draft_tokens(found.draft_tokens if draft_tokens is None else draft_tokens),
    }


def check_draft_tokens(draft_tokens: int, name: str = "draft_tokens") -> int:
    """`draft_tokens`; QwenMLXError if it cannot be."""
    if (
        not isinstance(draft_tokens, int)
        or isinstance(draft_tokens, bool)
        or not 1 <= draft_tokens <= MOST_DRAFT_TOKENS
    ):
        raise QwenMLXError(f"{name} is {draft_tokens!r}, expected 1 to {MOST_DRAFT_TOKENS}.")
    return draft_tokens


def check_cache(cache: Sequence[KVCache]) -> None:
    """Raises QwenMLXError for a cache that cannot take back tokens, which a rejected proposal needs."""
    other = next((layer for layer in cache if not layer.trimmable), None)
    if other is not None:
        raise QwenMLXError(
            f"A {type(other).__name__} cannot take back the tokens of a rejected draft: leave out the draft, or use a "
            "cache that keeps all tokens."
        )


def vocabulary(path: Path) -> Sequence[str]:
    """The tokens' names by id of a GGUF file or a folder, without its weights; "" for ids that only pad."""
    from .gguf.reader import GGUFFile
    from .tokenizer import Tokenizer

    return (Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_gguf(GGUFFile(path).metadata)).names


def check_vocabulary(model: Sequence[str], other: Sequence[str], name: str, what: str = "draft") -> None:
    """Raises QwenMLXError, naming the other, unless both have the same tokens; padding at the end does not count."""
    same = common_prefix(model, other)
    if any(model[same:]) or any(other[same:]):
        ours, theirs = (repr(names[same]) if same < len(names) else "none" for names in (model, other))
        raise QwenMLXError(
            f"{name} has another vocabulary than the model: its token {same} is {theirs}, expected {ours}; take a "
            f"{what} of the same family, such as a smaller Qwen2.5."
        )


def load_draft(draft: str | os.PathLike[str], tokenizer: Tokenizer, **arguments: Any) -> ModelDraft:
    """Loads a model as a draft for the one that `tokenizer` belongs to; names and arguments as for load().

    Raises QwenMLXError for another vocabulary, before any weights are read.
    """
    from .loading import load

    path = hub.resolve(draft)
    check_vocabulary(tokenizer.names, vocabulary(path), str(draft))
    return ModelDraft(load(path, **arguments)[0])
