"""The token loop, for one prompt or many: prompt ids in, tokens out, one step ahead of who reads them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from .. import ops
from ..backend import mx
from ..errors import QwenMLXError
from ..model.batch_cache import BatchKVCache, Padding, join, select
from ..model.cache import KVCache
from ..model.fused import FusedModel
from ..model.qwen2 import Qwen2
from .sampling import log_probabilities, rule_out, sample
from .settings import GenerationSettings

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
    went into communication and waiting for each other.
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
    """A generated token. Where log-probabilities are asked for: its ln p, and the likeliest tokens' (id, ln p)."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


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


def prefill(model: FusedModel, ids: mx.array, cache: Sequence[KVCache], length: int) -> Iterator[mx.array]:
    """Reads ids (B, L) into the cache, `length` columns at a time, and yields the hidden states of each chunk, which
    are computed only where they are used."""
    for start in range(0, ids.shape[1], length):
        hidden = model.hidden(ids[:, start : start + length], cache)
        mx.eval([layer.arrays for layer in cache])
        mx.clear_cache()  # each chunk of a long prompt needs buffers of other sizes than the last
        yield hidden


def read_prompt(
    model: FusedModel,
    ids: mx.array,
    cache: Sequence[KVCache],
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> mx.array:
    """Logits (B, vocab_size) of the token after ids (B, L), read in chunks; progress: as stream_generate's, without the
    last chunk, which is not computed yet when this returns."""
    rows, total = ids.shape
    length = chunk_length(rows, prefill_step_size)
    done, split = 0, (total - 1) // length * length
    for layer in cache:
        layer.reserve(layer.offset + total)
    for hidden in prefill(model, ids[:, :split], cache, length):
        done += hidden.shape[1]
        if progress:
            progress(done, total)
    return model(ids[:, split:], cache)[:, -1]


@dataclass
class State:
    """The rows of a batch: their cache, and what the choice of their next tokens depends on."""

    cache: Sequence[KVCache]
    seen: mx.array | None  # (B, columns) the text so far, where it matters; padded on the left with V, no token's id
    n_prompt: int | mx.array  # columns of `seen` that are padding or prompt; (B,) where rows differ
    generated: np.ndarray  # (B,) tokens launched, counted up to the settings' min_tokens
    tokens: mx.array  # (B,) the newest token of each row, which the cache does not hold yet
    logits: mx.array | None = None  # (B, V) float32 that the newest tokens were chosen from, for log-probabilities

    def select(self, rows: Sequence[int]) -> State:
        """The state of some of the rows."""
        index = mx.array(list(rows), mx.int32)
        seen, logits = (None if array is None else array[index] for array in (self.seen, self.logits))
        n_prompt = self.n_prompt if isinstance(self.n_prompt, int) else self.n_prompt[index]
        cache = select(cast("Sequence[BatchKVCache]", self.cache), rows)
        return State(cache, seen, n_prompt, self.generated[list(rows)], self.tokens[index], logits)

    def join(self, other: State, padding: int) -> State:
        """The state of these rows and of others below them; padding: the id that is no token."""
        states = (self, other)
        seen = [state.seen for state in states if state.seen is not None]
        logits = [state.logits for state in states if state.logits is not None]
        n_prompt = [mx.array(state.n_prompt) for state in states]
        if seen:
            missing = [max(s.shape[1] for s in seen) - part.shape[1] for part in seen]
            seen = [mx.pad(part, [(0, 0), (m, 0)], constant_values=padding) for part, m in zip(seen, missing)]
            n_prompt = [part + m for part, m in zip(n_prompt, missing)]
        return State(
            join(*(cast("Sequence[BatchKVCache]", state.cache) for state in states)),
            mx.concatenate(seen) if seen else None,
            mx.concatenate(n_prompt),
            np.concatenate([self.generated, other.generated]),
            mx.concatenate([self.tokens, other.tokens]),
            mx.concatenate(logits) if logits else None,
        )


class Rows:
    """Prompts that are answered together, a row each: `add` them, `step` gives each row's next token, `keep` drops
    the rows that have ended. One row in a cache of its own may also `accept` tokens that a draft proposed."""

    def __init__(self, model: Qwen2, settings: GenerationSettings) -> None:
        self.model, self.fused, self.settings = model, FusedModel.of(model), settings
        self._key = mx.random.key(secrets.randbits(63) if settings.seed is None else settings.seed)
        self._greedy, self._plainly_greedy = settings.sampling.greedy, settings.sampling.plainly_greedy
        self._state: State | None = None
        self._ahead = False  # the newest tokens are on their way, and `step` has not given them out
        self._steps = 0

    @property
    def state(self) -> State:
        """The rows' state. Raises ValueError where there are none."""
        if self._state is None:
            raise ValueError("The batch is empty: add prompts first.")
        return self._state

    def next_key(self) -> mx.array:
        """A random key that was not used before."""
        self._key, key = mx.random.split(self._key)
        return key

    def add(
        self,
        prompts: Sequence[Sequence[int]],
        cache: Sequence[KVCache] | None = None,
        cached_ids: Sequence[int] = (),
        progress: Progress | None = None,
    ) -> None:
        """Reads prompts and adds them as the last rows; their first tokens are computed when this returns.

        cache: continued by a single prompt, which then is the only row; it holds `cached_ids`. Without it the rows
        share a new cache, padded on the left.
        """
        longest, padding_id = max(map(len, prompts)), self.model.config.vocab_size
        pads = np.array([longest - len(ids) for ids in prompts], np.int32)
        ids = np.array([[ids[0]] * pad + list(ids) for pad, ids in zip(pads.tolist(), prompts)], np.int32)
        n_prompt: int | mx.array = len(cached_ids) + longest
        if cache is None:
            padding = Padding(pads)
            cache = [BatchKVCache(padding) for _ in range(self.model.config.num_hidden_layers)]
            n_prompt = mx.full((len(prompts),), longest, mx.int32)
        seen = None
        if self.settings.sampling.looks_back:
            text = np.where(np.arange(longest) < pads[:, None], padding_id, ids)
            seen = mx.array(np.concatenate([np.array([cached_ids] * len(prompts), np.int32), text], axis=1))
        logits = read_prompt(self.fused, mx.array(ids), cache, self.settings.prefill_step_size, progress)
        new = State(cache, seen, n_prompt, np.zeros(len(prompts), np.int64), mx.array(ids[:, -1]))
        self._choose(new, logits)
        mx.eval(new.tokens)
        if progress:
            progress(longest, longest)
        self._state = new if self._state is None else self._state.join(new, padding_id)
        self._ahead = True

    def step(self, ahead: bool = True) -> list[Token]:
        """The next token of each row. With `ahead`, the step after it is launched before this one is waited for.

        Raises QwenMLXError if a logit is not finite.
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
        return self._tokens(cast("list[int]", tokens.tolist()), logits)

    def accept(self, ids: list[int], logits: mx.array) -> list[Token]:
        """The single row's next tokens, which were chosen from logits (len(ids), V); its cache holds all but the
        last."""
        state = self.state
        state.tokens = mx.array(ids[-1:], mx.int32)
        state.generated += len(ids)
        if state.seen is not None:
            state.seen = mx.concatenate([state.seen, mx.array([ids], mx.int32)], axis=1)
        return self._tokens(ids, logits)

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

    def _launch(self, state: State) -> None:
        self._choose(state, self.fused(state.tokens[:, None], state.cache)[:, -1])

    def _choose(self, state: State, logits: mx.array) -> None:
        """Chooses each row's next token from logits (B, V), -1 where one is not finite; it is on its way when this
        returns."""
        settings = self.settings
        early: mx.array | None = None  # (B,) the rows that must not end yet
        if settings.min_tokens and (state.generated < settings.min_tokens).any():
            early = mx.array(state.generated < settings.min_tokens)
            state.generated += 1
        key = None if self._greedy else self.next_key()
        if self._plainly_greedy and early is None:
            tokens = ops.best_token(logits)
        else:
            floats, ends = logits.astype(mx.float32), settings.eos_token_ids
            allowed = floats if early is None else rule_out(floats, ends, early)
            choice = sample(allowed, settings.sampling, state.seen, key, n_prompt=state.n_prompt, eos_token_ids=ends)
            tokens = ops.or_not_finite(floats, choice)
        if self.model.ranks is not None:
            tokens = self.model.ranks.from_first(tokens)
        state.tokens = tokens
        if settings.logprobs is not None:
            state.logits = logits.astype(mx.float32)
        if state.seen is not None:
            state.seen = mx.concatenate([state.seen, tokens[:, None]], axis=1)
        mx.async_eval([tokens] if state.logits is None else [tokens, state.logits])

    def _tokens(self, ids: list[int], logits: mx.array | None) -> list[Token]:
        if min(ids) < 0:
            raise QwenMLXError(NOT_FINITE)
        if self.settings.logprobs is None or logits is None:
            return [Token(token) for token in ids]
        own, top_ids, top_values = log_probabilities(logits, mx.array(ids), self.settings.logprobs)
        tops = [tuple(zip(*pair)) for pair in zip(top_ids.tolist(), top_values.tolist())]
        return [Token(*values) for values in zip(ids, own.tolist(), tops)]


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
    rows, read, yielded = Rows(model, settings), cache[0].offset + len(prompt_ids), 0
    try:
        rows.add([prompt_ids], cache, cached_ids, progress)
        for token in policy(rows):
            yielded += 1
            yield token
    finally:
        rows.close()
        for layer in cache:  # a step may be under way
            layer.trim(max(0, layer.offset - read - max(yielded - 1, 0)))
