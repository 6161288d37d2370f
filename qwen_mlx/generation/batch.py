"""Many prompts at once: rows of one batch that leave when they end and make room for others."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import QwenMLXError, check_integer, refuses_wrong_arguments
from ..model import display
from ..model.qwen2 import Qwen2
from ..text.tokenizer import Tokenizer
from .engine import NOT_FINITE, GenerationStats, Progress, Rows, Token
from .settings import GenerationSettings
from .text import CANNOT_GO_ON, Prompt, TextStream, encode_prompt, repeated_tokens, room_after, settings_of, with_budget


@dataclass
class BatchResult:
    """The answer to one prompt. token_ids: all that were generated, an end token included; finish_reason, and where
    asked for each token's logprobs and top_logprobs: as GenerationChunk's; repeated_tokens: as GenerationStats', but of
    this answer; stats: the whole batch's."""

    prompt_tokens: int
    stats: GenerationStats = field(repr=False)
    text: str = ""
    token_ids: list[int] = field(default_factory=list, repr=False)
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list, repr=False)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list, repr=False)
    repeated_tokens: int = field(default=0, repr=False)

    def _repr_html_(self) -> str:
        counts = f"{self.prompt_tokens} tokens read, {len(self.token_ids)} made"
        loop = f", repeats itself every {self.repeated_tokens} tokens" if self.repeated_tokens else ""
        return display.passage(self.text, f"{counts}; ended by {self.finish_reason}{loop}")


@dataclass
class _Row:
    """A prompt and its answer so far."""

    ids: list[int]
    settings: GenerationSettings
    stream: TextStream
    result: BatchResult

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return 0 if self.result.finish_reason else self.settings.max_tokens - len(self.result.token_ids)

    def add(self, token: Token) -> None:
        if token.id < 0:
            raise QwenMLXError(NOT_FINITE)
        if token.error is not None:
            raise QwenMLXError(CANNOT_GO_ON.format(token.error))
        text, self.result.finish_reason = self.stream.add(token.id, token.closing)
        self.result.text += text
        self.result.token_ids.append(token.id)
        if token.logprob is not None:
            self.result.logprobs.append(token.logprob)
            self.result.top_logprobs.append(token.top_logprobs)
        if self.result.finish_reason == "length":
            self.result.repeated_tokens = repeated_tokens(self.result.token_ids)


@refuses_wrong_arguments
def batch_generate(
    model: Qwen2,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int | Sequence[int] = 512,
    min_tokens: int = 0,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
    skip_special_tokens: bool = True,
    reasoning_budget: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    typical_p: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    xtc_probability: float | None = None,
    xtc_threshold: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
    seed: int | None = None,
    schema: Any = None,
    batch_size: int = 64,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> list[BatchResult]:
    """Answers all prompts, `batch_size` at a time, and returns the results in their order.

        [answer.text for answer in batch_generate(model, tokenizer, ["1 + 1?", "2 + 2?"], max_tokens=20)]

    prompts: each as stream_generate takes it.
    max_tokens: for all, or one for each.
    batch_size: rows computed together at most.
    prefill_step_size: tokens of all rows read in one pass.
    progress: called with (prompts answered, prompts in all).

    The other arguments are stream_generate's. A prompt's tokens are those that it gets alone, up to the rounding of
    sums: greedy ones, and sampled ones if the prompts are given `seed`, `seed` + 1, ... alone. A row that has ended
    leaves, and prompts that wait take its place.

    Raises QwenMLXError for an impossible argument or a prompt without room in the context, before any work.
    """
    arguments = {name: value for name, value in locals().items() if name not in ("max_tokens", "min_tokens")}
    settings = settings_of(model, tokenizer, arguments)
    batch_size = check_integer("batch_size", batch_size, 1, float("inf"), "1 or more")
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        raise QwenMLXError(f"prompts is {type(prompts).__name__}, expected a list of prompts.")
    limits = list(max_tokens) if isinstance(max_tokens, Sequence) else [max_tokens] * len(prompts)
    if len(limits) != len(prompts):
        raise QwenMLXError(f"max_tokens has {len(limits)} values for {len(prompts)} prompts.")
    if not prompts:
        return []
    stats, rows = GenerationStats(prompts=len(prompts)), []
    for number, (prompt, limit) in enumerate(zip(prompts, limits)):
        try:
            own = replace(settings, max_tokens=limit, min_tokens=min_tokens)
            ids = encode_prompt(tokenizer, prompt, system, raw, model.config.context_length)
            limit = min(own.max_tokens, room_after(model, ids))
            if own.constraint is not None:
                own.constraint.check_fits(limit)
        except QwenMLXError as error:
            raise QwenMLXError(f"Prompt {number + 1} of {len(prompts)}: {error}") from None
        seed = None if own.seed is None else (own.seed + number) % 2**64
        own = replace(own, max_tokens=limit, min_tokens=min(own.min_tokens, limit), seed=seed)
        own = with_budget(own, tokenizer, ids)
        rows.append(_Row(ids, own, TextStream(tokenizer, own), BatchResult(len(ids), stats)))
    _answer(Rows(model), rows, batch_size, stats, progress)
    if model.ranks is not None:
        stats.communication_seconds = model.ranks.communication_seconds(stats.prompt_seconds, stats.generation_seconds)
    return [row.result for row in rows]


def _answer(
    batch: Rows, rows: Sequence[_Row], batch_size: int, stats: GenerationStats, progress: Progress | None
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
            batch.add([row.ids for row in group], [row.settings for row in group])
            active += group
            stats.prompt_tokens += sum(len(row.ids) for row in group)
            stats.prompt_seconds += time.perf_counter() - began
        for row, token in zip(active, batch.step(ahead=any(row.left > 1 for row in active))):
            if row.left:
                row.add(token)
                stats.generated_tokens += 1
        stats.generation_seconds = time.perf_counter() - start - stats.prompt_seconds
        alive = [i for i, row in enumerate(active) if row.left]
        if progress and len(alive) < len(active):
            progress(sum(not row.left for row in rows), len(rows))
        # Leaving copies it too: until an eighth has ended, their rows go on for nothing.
        if 8 * len(alive) <= 7 * len(active):
            batch.keep(alive)
            active = [active[i] for i in alive]
