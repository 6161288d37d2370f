"""Many prompts at once: rows of one batch, padded on the left, that leave when they end and make room for others."""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

from .. import ops
from ..backend import mx
from ..errors import QwenMLXError, refuse_unknown
from ..model import display
from ..model.batch_cache import BatchKVCache, Padding, join, select
from ..model.fused import FusedModel
from ..model.qwen2 import Qwen2
from ..text.tokenizer import Tokenizer
from .engine import NOT_FINITE, GenerationStats, chances
from .sampling import SamplingSettings, sample
from .text import Prompt, TextStream, check_choices, check_ids, check_settings, encode_prompt

PREFILL_CHUNK = 2048  # tokens of all rows: bounds the memory of long prompts' activations


@dataclass
class BatchStats(GenerationStats):
    """What a batch cost; tokens are those of all rows. Each row's first token belongs to its prompt."""

    prompts: int = 0

    @property
    def generated_per_second(self) -> float:
        """Tokens of all rows made per second after the rows' first ones."""
        return (self.generated_tokens - self.prompts) / self.generation_seconds if self.generation_seconds else 0.0


@dataclass
class BatchResult:
    """What became of one prompt. token_ids: all that were made, an end token included; finish_reason: "stop" or
    "length", as GenerationChunk says; stats: the whole batch's; logprobs, top_logprobs: of each token, where asked
    for, as GenerationChunk's."""

    prompt_tokens: int
    stats: BatchStats = field(repr=False)
    text: str = ""
    token_ids: list[int] = field(default_factory=list, repr=False)
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list, repr=False)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list, repr=False)

    def _repr_html_(self) -> str:
        made = f"{self.prompt_tokens} tokens read, {len(self.token_ids)} made"
        return display.passage(self.text, f"{made}; ended by {self.finish_reason}")


@dataclass
class _Row:
    """A prompt that is being answered."""

    ids: list[int]
    max_tokens: int
    stream: TextStream
    result: BatchResult

    @property
    def ended(self) -> bool:
        return self.result.finish_reason is not None

    @property
    def left(self) -> int:
        return 0 if self.ended else self.max_tokens - len(self.result.token_ids)

    def add(self, token: int) -> None:
        if token < 0:
            raise QwenMLXError(NOT_FINITE)
        text, self.result.finish_reason = self.stream.add(token)
        self.result.token_ids.append(token)
        self.result.text += text


def batch_generate(
    model: Qwen2,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | Sequence[int] = 512,
    system: str | None = None,
    raw: bool = False,
    stop: Sequence[str] = (),
    min_tokens: int = 0,
    logprobs: int | None = None,
    seed: int | None = None,
    batch_size: int = 64,
    prefill_step_size: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> list[BatchResult]:
    """Answers all prompts, `batch_size` at a time, and returns the results in their order.

    prompts: each as stream_generate takes it; max_tokens: for all, or one for each; prefill_step_size: tokens of all
    rows read in one pass; progress: called with (prompts answered, prompts in all). The other arguments are
    stream_generate's, its sampling arguments among them. Greedy tokens are those of one prompt at a time, up to the
    rounding of sums; a seed repeats a whole batch. A row that has ended leaves, and prompts that wait take its place.
    Raises QwenMLXError for an impossible argument or a prompt without room in the context, before any work.
    """
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        raise QwenMLXError(f"prompts is {type(prompts).__name__}, expected a list of prompts.")
    limits = list(max_tokens) if isinstance(max_tokens, Sequence) else [max_tokens] * len(prompts)
    if len(limits) != len(prompts):
        raise QwenMLXError(f"max_tokens has {len(limits)} values for {len(prompts)} prompts.")
    refuse_unknown(sampling, ARGUMENTS)
    settings = model.generation_defaults.override(**sampling)
    check_settings(seed, stop, batch_size=batch_size, prefill_step_size=prefill_step_size)
    stats = BatchStats(prompts=len(prompts))
    rows = []
    for number, (prompt, limit) in enumerate(zip(prompts, limits), 1):
        try:
            check_settings(seed, stop, max_tokens=limit)
            check_choices(settings, min_tokens, logprobs, limit, model.config.vocab_size)
            ids = encode_prompt(tokenizer, prompt, system, raw)
            limit = min(limit, check_ids(model, ids))
        except QwenMLXError as error:
            raise QwenMLXError(f"Prompt {number} of {len(prompts)}: {error}") from None
        rows.append(_Row(ids, limit, TextStream(tokenizer, stop, limit), BatchResult(len(ids), stats)))
    end_ids = tuple(sorted(tokenizer.eos_token_ids))
    loop = BatchLoop(
        model,
        settings,
        seed,
        prefill_step_size,
        min_tokens=min_tokens,
        end_ids=end_ids,
        keep_logits=logprobs is not None,
    )
    _answer(loop, rows, batch_size, stats, logprobs, progress)
    if model.ranks is not None:
        stats.communication_seconds = model.ranks.communication_seconds(stats.prompt_seconds, stats.generation_seconds)
    return [row.result for row in rows]


def _answer(
    loop: BatchLoop,
    rows: list[_Row],
    batch_size: int,
    stats: BatchStats,
    logprobs: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    waiting = sorted(rows, key=lambda row: len(row.ids))  # the longest first, beside others of like length
    active: list[_Row] = []
    start = time.perf_counter()
    while active or waiting:
        # Joining copies the cache: rows that leave are replaced a quarter of the batch at a time.
        while waiting and (not active or len(active) <= batch_size - max(1, batch_size // 4)):
            began = time.perf_counter()
            group = [waiting.pop()]
            while waiting and len(active) + len(group) < batch_size and 2 * len(waiting[-1].ids) >= len(group[0].ids):
                group.append(waiting.pop())
            loop.read([row.ids for row in group])
            active += group
            stats.prompt_tokens += sum(len(row.ids) for row in group)
            stats.prompt_seconds += time.perf_counter() - began
        made = loop.step(more=any(row.left > 1 for row in active))
        for i, (row, token) in enumerate(zip(active, made)):
            if not row.ended:
                row.add(token)
                if logprobs is not None and loop.logits is not None:
                    chosen, likeliest = chances(loop.logits[i : i + 1], token, logprobs)
                    row.result.logprobs.append(chosen)
                    row.result.top_logprobs.append(likeliest)
                stats.generated_tokens += 1
        stats.generation_seconds = time.perf_counter() - start - stats.prompt_seconds
        alive = [i for i, row in enumerate(active) if not row.ended]
        if progress and len(alive) < len(active):
            progress(sum(row.ended for row in rows), len(rows))
        # Leaving copies it too: until an eighth has ended, their rows go on for nothing.
        if 8 * len(alive) <= 7 * len(active):
            loop.keep(alive)
            active = [active[i] for i in alive]


@dataclass(frozen=True)
class _State:
    """Of some rows: their cache, their newest tokens (not in the cache yet), and what the choice looks at."""

    cache: list[BatchKVCache]
    tokens: mx.array  # (B,)
    logits: mx.array | None  # (B, V) that the tokens were chosen from, where they are kept
    seen: mx.array | None  # (B, columns), padded on the left with V, which is no token
    n_prompt: mx.array  # (B,) columns of padding and prompt
    made: mx.array  # (B,) tokens generated, the newest included


class BatchLoop:
    """The device's side of a batch; arguments as generate_ids. keep_logits: `logits` are then (B, V) float32, what the
    tokens that `step` returned last were chosen from."""

    def __init__(
        self,
        model: Qwen2,
        sampling: SamplingSettings,
        seed: int | None,
        prefill_step_size: int,
        *,
        min_tokens: int = 0,
        end_ids: Sequence[int] = (),
        keep_logits: bool = False,
    ) -> None:
        self.logits: mx.array | None = None
        self._model, self._sampling, self._chunk = model, sampling, prefill_step_size
        self._fused = FusedModel.of(model)
        self._min_tokens, self._end_ids, self._keep_logits = min_tokens, end_ids, keep_logits
        self._key = mx.random.key(secrets.randbits(63) if seed is None else seed)
        self._state: _State | None = None

    @property
    def _now(self) -> _State:
        if self._state is None:
            raise ValueError("The batch is empty: read prompts first.")
        return self._state

    def read(self, prompts: list[list[int]]) -> None:
        """Computes prompts of one group, and adds them to the batch as its last rows."""
        longest, nothing = max(map(len, prompts)), self._model.config.vocab_size
        pads = [longest - len(ids) for ids in prompts]
        padding = Padding(pads)
        ids = mx.array([[ids[0]] * pad + ids for pad, ids in zip(pads, prompts)], mx.int32)
        cache = [BatchKVCache(padding) for _ in range(self._model.config.num_hidden_layers)]
        for layer in cache:
            layer.reserve(longest)
        columns = max(1, self._chunk // len(prompts))
        done = 0
        while longest - done > columns:
            self._fused.hidden(ids[:, done : done + columns], cache)
            mx.eval([layer.arrays for layer in cache])
            mx.clear_cache()
            done += columns
        seen = None
        if self._sampling.looks_back:
            seen = mx.where(mx.arange(longest) < mx.array(pads)[:, None], nothing, ids)
        n_prompt, made = mx.full((len(prompts),), longest, mx.int32), mx.zeros((len(prompts),), mx.int32)
        new = self._next(ids[:, done:], cache, seen, n_prompt, made)
        mx.eval(new.tokens)
        self._state = new if self._state is None else self._joined(self._state, new)

    def step(self, more: bool) -> list[int]:
        """The newest token of each row; with `more`, the step after it is launched before that is waited for."""
        now = self._now
        if more:
            seen = None if now.seen is None else mx.concatenate([now.seen, now.tokens[:, None]], axis=1)
            self._state = self._next(now.tokens[:, None], now.cache, seen, now.n_prompt, now.made)
        self.logits = now.logits
        return cast("list[int]", now.tokens.tolist())

    def keep(self, rows: list[int]) -> None:
        """Forgets all rows but these."""
        if not rows:
            if self._model.ranks is not None:
                self._model.ranks.wait(self._now.tokens)
            self._state = None
            return
        now, index = self._now, mx.array(rows, mx.int32)
        self._state = _State(
            select(now.cache, rows),
            now.tokens[index],
            None if now.logits is None else now.logits[index],
            None if now.seen is None else now.seen[index],
            now.n_prompt[index],
            now.made[index],
        )
        mx.clear_cache()

    def _joined(self, first: _State, second: _State) -> _State:
        both = (first, second)
        logits = [state.logits for state in both if state.logits is not None]
        seen = [state.seen for state in both if state.seen is not None]
        n_prompt = [state.n_prompt for state in both]
        if seen:
            longest, nothing = max(part.shape[1] for part in seen), self._model.config.vocab_size
            more = [longest - part.shape[1] for part in seen]
            seen = [mx.pad(part, [(0, 0), (m, 0)], constant_values=nothing) for part, m in zip(seen, more)]
            n_prompt = [part + m for part, m in zip(n_prompt, more)]
        return _State(
            join(first.cache, second.cache),
            mx.concatenate([first.tokens, second.tokens]),
            mx.concatenate(logits) if logits else None,
            mx.concatenate(seen) if seen else None,
            mx.concatenate(n_prompt),
            mx.concatenate([first.made, second.made]),
        )

    def _next(
        self, ids: mx.array, cache: list[BatchKVCache], seen: mx.array | None, n_prompt: mx.array, made: mx.array
    ) -> _State:
        """The next token of each row, -1 where a logit is not finite; on its way when this returns."""
        logits = self._fused(ids, cache)[:, -1]
        now = None
        if not self._sampling.greedy:
            self._key, now = mx.random.split(self._key)
        if self._sampling.plainly_greedy and not self._min_tokens:
            tokens = ops.best_token(logits)
        else:
            allowed = wide = logits.astype(mx.float32)
            if self._min_tokens:
                early = mx.where(made < self._min_tokens, -mx.inf, 0.0)[:, None]
                allowed = wide.at[:, mx.array(list(self._end_ids))].add(early)
            choice = sample(allowed, self._sampling, seen, now, n_prompt=n_prompt, end_ids=self._end_ids)
            tokens = ops.or_not_finite(wide, choice)
        if self._model.ranks is not None:
            tokens = self._model.ranks.from_first(tokens)
        kept = logits.astype(mx.float32) if self._keep_logits else None
        mx.async_eval([tokens] if kept is None else [tokens, kept])
        return _State(cache, tokens, kept, seen, n_prompt, made + 1)


ARGUMENTS = [name for name in inspect.signature(batch_generate).parameters if name != "sampling"]
ARGUMENTS += [field.name for field in fields(SamplingSettings) if field.name != "source"]
