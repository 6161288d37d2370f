"""The token loop, for one prompt or many: prompt ids in, tokens out, one step ahead of who reads them."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from .. import ops
from ..backend import check_process, mx
from ..backend.at_exit import ends_with_main
from ..errors import QwenMLXError
from ..model.batch_cache import BatchKVCache, Padding, join, select
from ..model.cache import KVCache
from ..model.fused import FusedModel
from ..model.qwen2 import Qwen2
from .reasoning import ThoughtMatcher
from .sampling import log_probabilities, rule_out, sample
from .settings import GenerationSettings
from .structured import Matcher, allowed

NOT_FINITE = (
    "The model's logits are not finite; the file is damaged, or the dtype overflows (float16 does for Qwen2.5: use "
    "bfloat16 or float32)."
)
SMALL_MEMORY = 24e9  # bytes; a device with less reads prompts in smaller chunks
CLEAR_CACHE_EVERY = 256  # steps: MLX keeps the buffers that a growing cache has left

Progress = Callable[[int, int], None]


@dataclass
class GenerationStats:
    """Costs of a generation so far; times in seconds, tokens of all prompts together.

    Each prompt's first token belongs to the prompt, whose tokens were computed (prompt_tokens) or already in a prompt
    cache (reused_tokens). A draft proposed drafted_tokens, of which the model accepted accepted_tokens; while it was
    slower than plain decoding, paused_tokens came without it. With several ranks, communication_seconds of the time
    went into communication and waiting for each other. repeated_tokens: where max_tokens ended a text that repeats
    itself, the length of what it repeats.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    paused_tokens: int = 0
    communication_seconds: float = 0.0
    prompts: int = 1
    repeated_tokens: int = 0

    @property
    def prompt_per_second(self) -> float:
        """Prompt tokens computed per second; 0.0 before any was."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """The share of drafted tokens that were accepted."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def generated_per_second(self) -> float:
        """Tokens generated per second after the first of each prompt."""
        return (self.generated_tokens - self.prompts) / self.generation_seconds if self.generation_seconds else 0.0


@dataclass(slots=True)
class Token:
    """A generated token. Where log-probabilities are asked for: its ln p, and the likeliest tokens' (id, ln p).

    error: why structured output cannot go on after it; the answer is to be given up. closing: structured output is
    being brought to its end because max_tokens is near.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    error: str | None = None
    closing: bool = False


def default_prefill_step_size() -> int:
    """Tokens of all rows that are read in one pass: they bound the memory of a long prompt's activations."""
    if mx.default_device() == mx.cpu:
        return 512
    info = mx.device_info()
    memory = info.get("memory_size") or info.get("total_memory") or 0
    return 2048 if int(memory) >= SMALL_MEMORY else 512


def chunk_length(rows: int, prefill_step_size: int | None) -> int:
    """Tokens of each row in one pass of prefill."""
    return max(1, (prefill_step_size or default_prefill_step_size()) // rows)


def read_chunk(model: FusedModel, ids: mx.array, cache: Sequence[KVCache]) -> mx.array:
    """Reads ids (B, L) into the cache and returns their hidden states, which are computed only where they are used."""
    hidden = model.hidden(ids, cache)
    mx.eval([layer.arrays for layer in cache])
    mx.clear_cache()  # each chunk of a long prompt needs buffers of other sizes than the last
    return hidden


def prefill(model: FusedModel, ids: mx.array, cache: Sequence[KVCache], length: int) -> Iterator[mx.array]:
    """Reads ids (B, L) into the cache, `length` columns at a time, and yields the hidden states of each chunk."""
    for start in range(0, ids.shape[1], length):
        yield read_chunk(model, ids[:, start : start + length], cache)


class PromptReader:
    """Reads a prompt's ids (B, L) into a cache chunk by chunk, so that other work can be done in between.

    total, done: columns of the prompt, and those of them that are read.
    """

    def __init__(
        self, model: FusedModel, ids: mx.array, cache: Sequence[KVCache], prefill_step_size: int | None = None
    ) -> None:
        rows, self.total = ids.shape
        self.done = 0
        self._model, self._ids, self._cache = model, ids, cache
        self._length = chunk_length(rows, prefill_step_size)
        for layer in cache:
            layer.reserve(layer.offset + self.total)

    @ends_with_main
    def read(self, length: int | None = None) -> mx.array | None:
        """Reads the next chunk, of at most `length` columns (None: prefill_step_size over all rows). Returns None, and
        with the last chunk the logits (B, vocab_size) of the next token, which are not computed yet."""
        end = min(self.done + (length or self._length), self.total)
        chunk, self.done = self._ids[:, self.done : end], end
        if end == self.total:
            return self._model(chunk, self._cache)[:, -1]
        read_chunk(self._model, chunk, self._cache)
        return None


def read_prompt(
    model: FusedModel,
    ids: mx.array,
    cache: Sequence[KVCache],
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> mx.array:
    """Logits (B, vocab_size) of the token after ids (B, L), read in chunks; progress: as stream_generate's, without the
    last chunk, which is not computed yet when this returns."""
    reader = PromptReader(model, ids, cache, prefill_step_size)
    while (logits := reader.read()) is None:
        if progress:
            progress(reader.done, reader.total)
    return logits


class Group(NamedTuple):
    """Rows whose next tokens are chosen in the same way. indices: the same rows, None if they are all rows."""

    rows: list[int]
    indices: mx.array | None
    settings: GenerationSettings

    def of(self, array: mx.array) -> mx.array:
        """The group's rows of an array (B, ...)."""
        return array if self.indices is None else array[self.indices]


@dataclass
class State:
    """The rows of a batch: their cache, and what the choice of their next tokens depends on."""

    cache: Sequence[KVCache]
    settings: list[GenerationSettings]  # (B,)
    matchers: list[Matcher | ThoughtMatcher | None]  # (B,) of structured output and of thoughts with a budget; they
    # lack the newest tokens
    keys: mx.array  # (B, 2) uint32, each row's random key, which is split once a token
    seen: mx.array | None  # (B, columns) the text so far, where it matters; padded on the left with V, no token's id
    n_prompt: int | mx.array  # columns of `seen` that are padding or prompt; (B,) where rows differ
    generated: np.ndarray  # (B,) tokens launched, counted up to the settings' min_tokens
    tokens: mx.array  # (B,) the newest token of each row, which the cache does not hold yet
    logits: mx.array | None = None  # (B, V) float32 that the newest tokens were chosen from, for log-probabilities

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The rows by what the choice of their tokens depends on."""
        rows: dict[Any, list[int]] = {}
        for i, one in enumerate(self.settings):
            rows.setdefault((one.sampling, one.min_tokens, one.eos_token_ids, one.constraint is None), []).append(i)
        if len(rows) == 1:
            return [Group(list(range(len(self.settings))), None, self.settings[0])]
        return [Group(row, mx.array(row, mx.int32), self.settings[row[0]]) for row in rows.values()]

    @functools.cached_property
    def order(self) -> mx.array:
        """(B,) the place of each row when the groups are put one below the other."""
        return mx.array(np.argsort([row for group in self.groups for row in group.rows]).astype(np.int32))

    @property
    def wants_logprobs(self) -> bool:
        """True if log-probabilities are asked for in any row."""
        return any(one.logprobs is not None for one in self.settings)

    def select(self, rows: Sequence[int]) -> State:
        """The state of some of the rows."""
        index = mx.array(list(rows), mx.int32)
        settings, matchers = [self.settings[i] for i in rows], [self.matchers[i] for i in rows]
        n_prompt = self.n_prompt if isinstance(self.n_prompt, int) else self.n_prompt[index]
        seen = self.seen[index] if self.seen is not None and _look_back(settings) else None
        logits = None if self.logits is None else self.logits[index]
        cache, keys, generated = select(self.cache, rows), self.keys[index], self.generated[list(rows)]
        return State(cache, settings, matchers, keys, seen, n_prompt, generated, self.tokens[index], logits)

    def join(self, other: State, padding: int) -> State:
        """The state of these rows and of others below them; padding: the id that is no token."""
        states = (self, other)
        seen, n_prompt = None, [mx.broadcast_to(mx.array(s.n_prompt), s.tokens.shape) for s in states]
        if any(state.seen is not None for state in states):
            texts = [mx.zeros((s.tokens.size, 0), mx.int32) if s.seen is None else s.seen for s in states]
            missing = [max(text.shape[1] for text in texts) - text.shape[1] for text in texts]
            texts = [mx.pad(text, [(0, 0), (m, 0)], constant_values=padding) for text, m in zip(texts, missing)]
            seen, n_prompt = mx.concatenate(texts), [columns + m for columns, m in zip(n_prompt, missing)]
        logits = None
        if any(state.logits is not None for state in states):
            shape = next(state.logits.shape[1] for state in states if state.logits is not None)
            logits = mx.concatenate(
                [mx.zeros((s.tokens.size, shape)) if s.logits is None else s.logits for s in states]
            )
        return State(
            join(self.cache, other.cache),
            self.settings + other.settings,
            self.matchers + other.matchers,
            mx.concatenate([self.keys, other.keys]),
            seen,
            mx.concatenate(n_prompt),
            np.concatenate([self.generated, other.generated]),
            mx.concatenate([self.tokens, other.tokens]),
            logits,
        )


def _look_back(settings: Sequence[GenerationSettings]) -> bool:
    return any(one.sampling.looks_back for one in settings)


class Prompts:
    """Prompts of one length of padding that are read together, before they join the rows of a batch.

    settings: one for each prompt. cache: continued by a single prompt; it holds `cached_ids`. Without it, one prompt
    gets a new cache, and several share one, padded on the left.
    """

    def __init__(
        self,
        model: Qwen2,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[GenerationSettings],
        cache: Sequence[KVCache] | None = None,
        cached_ids: Sequence[int] = (),
    ) -> None:
        longest = max(map(len, prompts))
        pads = np.array([longest - len(ids) for ids in prompts], np.int32)
        ids = np.array([[ids[0]] * pad + list(ids) for pad, ids in zip(pads.tolist(), prompts)], np.int32)
        n_prompt: int | mx.array = len(cached_ids) + longest
        if len(prompts) > 1:
            padding = Padding(pads)
            cache = [BatchKVCache(padding) for _ in range(model.config.num_hidden_layers)]
            n_prompt = mx.full((len(prompts),), longest, mx.int32)
        elif cache is None:
            cache = model.make_cache()
        seen = None
        if _look_back(settings):
            text = np.where(np.arange(longest) < pads[:, None], model.config.vocab_size, ids)
            seen = mx.array(np.concatenate([np.array([cached_ids] * len(prompts), np.int32), text], axis=1))
        seeds = [secrets.randbits(63) if one.seed is None else one.seed for one in settings]
        keys, counts = mx.stack([mx.random.key(seed) for seed in seeds]), np.zeros(len(prompts), np.int64)
        matchers = [one.constraint.start(one.max_tokens) if one.constraint else None for one in settings]
        self.state = State(cache, list(settings), matchers, keys, seen, n_prompt, counts, mx.array(ids[:, -1]))
        self.reader = PromptReader(FusedModel.of(model), mx.array(ids), cache, settings[0].prefill_step_size)


class Rows:
    """Prompts that are answered together, a row each, with settings and a random key of its own: `add` them, `step`
    gives each row's next token, `keep` drops the rows that have ended. One row in a cache of its own may also `accept`
    tokens that a draft proposed."""

    def __init__(self, model: Qwen2) -> None:
        check_process()
        self.model, self.fused = model, FusedModel.of(model)
        self._state: State | None = None
        self._ahead = False  # the newest tokens are on their way, and `step` has not given them out
        self._steps = 0

    @property
    def state(self) -> State:
        """The rows' state. Raises ValueError where there are none."""
        if self._state is None:
            raise ValueError("The batch is empty: add prompts first.")
        return self._state

    @property
    def settings(self) -> GenerationSettings:
        """The first row's settings."""
        return self.state.settings[0]

    def next_key(self) -> mx.array:
        """A random key of the first row that was not used before."""
        return self._next_keys(self.state)[0]

    @ends_with_main
    def add(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[GenerationSettings],
        cache: Sequence[KVCache] | None = None,
        cached_ids: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> None:
        """Reads prompts and adds them as the last rows; their first tokens are computed when this returns. Arguments
        as Prompts; progress as stream_generate's."""
        new = Prompts(self.model, prompts, settings, cache, cached_ids)
        while (logits := new.reader.read()) is None:
            if progress:
                progress(new.reader.done, new.reader.total)
        self.join(new, logits)
        if progress:
            progress(new.reader.total, new.reader.total)

    def join(self, new: Prompts, logits: mx.array) -> None:
        """Adds prompts as the last rows, whose reader has read them and given the logits of their first tokens; these
        are computed when this returns."""
        self._choose(new.state, logits)
        mx.eval(new.state.tokens)
        if self._state is None:
            self._state, self._ahead = new.state, True
            return
        if not self._ahead:
            self._launch(self._state)
            self._ahead = True
        self._state = self._state.join(new.state, self.model.config.vocab_size)

    @ends_with_main
    def step(self, ahead: bool = True) -> list[Token]:
        """The next token of each row. With `ahead`, the step after it is launched before this one is waited for.

        The id is -1 where one of the row's logits is not finite: that row alone is to be given up.
        """
        state = self.state
        if not self._ahead:
            self._launch(state)
        tokens, logits = state.tokens, state.logits
        self._ahead = ahead
        if ahead:
            self._launch(state)
        self._steps += 1
        if self._steps % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        made = self._tokens(cast("list[int]", tokens.tolist()), logits, state.settings)
        for token, matcher in zip(made, state.matchers):
            if matcher is not None:
                token.error, token.closing = matcher.error, matcher.closing
        return made

    def accept(self, ids: list[int], logits: mx.array) -> list[Token]:
        """The single row's next tokens, which were chosen from logits (len(ids), V); its cache holds all but the
        last."""
        state = self.state
        state.tokens = mx.array(ids[-1:], mx.int32)
        state.generated += len(ids)
        if state.seen is not None:
            state.seen = mx.concatenate([state.seen, mx.array([ids], mx.int32)], axis=1)
        return self._tokens(ids, logits, state.settings * len(ids))

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but these."""
        if rows:
            self._state = self.state.select(rows)
            mx.clear_cache()
        else:
            self.close()

    def close(self) -> None:
        """Drops all rows, and waits for a step that is under way where other ranks take part in it."""
        state, self._state = self._state, None
        if self.model.ranks is not None and state is not None and self._ahead:
            self.model.ranks.wait(state.tokens, *([] if state.logits is None else [state.logits]))

    @staticmethod
    def _next_keys(state: State) -> mx.array:
        """A random key of each row (B, 2) that was not used before."""
        pairs = mx.vmap(mx.random.split)(state.keys)
        state.keys = pairs[:, 0]
        return pairs[:, 1]

    def _launch(self, state: State) -> None:
        logits = self.fused(state.tokens[:, None], state.cache)[:, -1]
        if any(state.matchers):
            mx.async_eval(logits)  # the model computes while the matchers take the newest tokens and make their masks
            for matcher, token in zip(state.matchers, cast("list[int]", state.tokens.tolist())):
                if matcher is not None:
                    matcher.accept(token)
        self._choose(state, logits)

    def _choose(self, state: State, logits: mx.array) -> None:
        """Chooses each row's next token from logits (B, V), -1 where one is not finite; it is on its way when this
        returns."""
        keys = None
        if not all(group.settings.sampling.greedy for group in state.groups):
            keys = self._next_keys(state)
        chosen = [self._choose_group(state, group, logits, keys) for group in state.groups]
        tokens = chosen[0] if len(chosen) == 1 else mx.concatenate(chosen)[state.order]
        if self.model.ranks is not None:
            tokens = self.model.ranks.from_first(tokens)
        state.tokens = tokens
        state.logits = logits.astype(mx.float32) if state.wants_logprobs else None
        if state.seen is not None:
            state.seen = mx.concatenate([state.seen, tokens[:, None]], axis=1)
        mx.async_eval([tokens] if state.logits is None else [tokens, state.logits])

    @staticmethod
    def _choose_group(state: State, group: Group, logits: mx.array, keys: mx.array | None) -> mx.array:
        """The next tokens of a group's rows, from logits (B, V) and keys (B, 2) of all rows."""
        settings, logits = group.settings, group.of(logits)
        early: mx.array | None = None  # the rows that must not end yet
        if settings.min_tokens and (state.generated[group.rows] < settings.min_tokens).any():
            early = mx.array(state.generated[group.rows] < settings.min_tokens)
            state.generated[group.rows] += 1
        masks = [matcher.mask() for matcher in (state.matchers[i] for i in group.rows) if matcher is not None]
        if settings.sampling.plainly_greedy and early is None and not masks:
            return ops.best_token(logits)
        floats, ends = logits.astype(mx.float32), settings.eos_token_ids
        open_to = allowed(floats, masks) if masks else floats
        choice = sample(
            open_to if early is None else rule_out(open_to, ends, early),
            settings.sampling,
            None if state.seen is None else group.of(state.seen),
            None if keys is None else group.of(keys),
            n_prompt=state.n_prompt if isinstance(state.n_prompt, int) else group.of(state.n_prompt),
            eos_token_ids=ends,
        )
        return ops.or_not_finite(floats, choice)

    @staticmethod
    def _tokens(ids: list[int], logits: mx.array | None, settings: Sequence[GenerationSettings]) -> list[Token]:
        tokens = [Token(token) for token in ids]
        for n in {one.logprobs for one in settings}:
            if n is None or logits is None:
                continue
            rows = [i for i, one in enumerate(settings) if one.logprobs == n]
            chosen = mx.array([ids[i] for i in rows])
            own, top_ids, top_values = log_probabilities(logits[mx.array(rows)], chosen, n)
            tops = [tuple(zip(*pair)) for pair in zip(top_ids.tolist(), top_values.tolist())]
            for i, *values in zip(rows, own.tolist(), tops):
                tokens[i] = Token(ids[i], *values)
        return tokens


def plain_steps(rows: Rows) -> Iterator[Token]:
    """The tokens of a single row without end. The first is given out before the second is launched."""
    yield from rows.step(ahead=False)
    while True:
        yield from rows.step()


def generate_tokens(
    model: Qwen2,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    *,
    cache: Sequence[KVCache] | None = None,
    cached_ids: Sequence[int] = (),
    policy: Callable[[Rows], Iterator[Token]] = plain_steps,
    progress: Progress | None = None,
) -> Generator[Token, None, None]:
    """Yields the tokens after one prompt without end.

    cache: continues it (`prompt_ids` are new tokens); afterwards it holds the prompt and every token yielded but the
    last. cached_ids: its tokens, for the penalties. policy: makes the tokens of a row, plainly or with a draft.
    progress: called with (prompt tokens done, prompt tokens in all). Raises QwenMLXError if the logits are not finite.
    """
    cache = model.make_cache() if cache is None else cache
    rows, read, yielded = Rows(model), cache[0].offset + len(prompt_ids), 0
    try:
        rows.add([prompt_ids], [settings], cache, cached_ids, progress)
        for token in policy(rows):
            if token.id < 0:
                raise QwenMLXError(NOT_FINITE)
            yielded += 1
            yield token
    finally:
        rows.close()
        for layer in cache:  # a step may be under way
            layer.trim(max(0, layer.offset - read - max(yielded - 1, 0)))
