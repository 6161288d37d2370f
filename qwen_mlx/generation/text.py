"""From a prompt to text that appears as it is generated."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..backend import mx
from ..errors import QwenMLXError, refuses_wrong_arguments
from ..model.cache import KVCache
from ..model.qwen2 import Qwen2
from ..text.tokenizer import Tokenizer
from .drafts import check_cache, make_draft
from .engine import GenerationStats, Progress, generate_tokens, plain_steps
from .prompt_cache import PromptCache
from .reasoning import ThoughtLimit
from .sampling import SAMPLING_ARGUMENTS
from .settings import Draft, GenerationSettings
from .speculative import drafted_steps
from .structured import Constraint, constraint

CANNOT_GO_ON = "The structured output cannot go on: {}."
Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class GenerationChunk:
    """Newly complete text (maybe empty) and the token that completed it.

    finish_reason is "stop" (an end token or a stop string), "length" (max_tokens or the context's end) or None while
    the text goes on. With logprobs: ln p of the token by the model's own logits, before penalties and temperature, and
    the likeliest tokens' (id, ln p). reasoning, answer: of a model that thinks before it answers, what became complete
    of the thought and of the answer (spoken), without the marks between them, which text has; of other models answer is
    text.
    """

    text: str
    token: int
    finish_reason: str | None
    stats: GenerationStats = field(repr=False)
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    reasoning: str = ""
    spoken: InitVar[str | None] = None
    answer: str = field(init=False, default="")

    def __post_init__(self, spoken: str | None) -> None:
        object.__setattr__(self, "answer", self.text if spoken is None else spoken)


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    system: str | None = None,
    raw: bool = False,
    context_length: int | None = None,
) -> list[int]:
    """Token ids of a prompt: a string is a user's message for the model's chat template, or with `raw` is taken as it
    is (control tokens included) after what the model's file puts before a text, such as a BOS; a list of messages
    ({"role", "content"}) goes through the template; ids stay ids.

    Raises QwenMLXError for an empty prompt, for `system` where no template is used, and, before it is read, for a text
    that cannot fit into `context_length` tokens.
    """
    if isinstance(prompt, Mapping) or not isinstance(prompt, str | Sequence | np.ndarray) or isinstance(prompt, bytes):
        raise QwenMLXError(
            f"The prompt is {type(prompt).__name__}, expected a string, a list of messages or a list of token ids."
        )
    if isinstance(prompt, str) and context_length is not None:
        tokenizer.check_length(prompt, context_length)
    numbers = [] if isinstance(prompt, str) else [int(item) for item in prompt if isinstance(item, int | np.integer)]
    if not isinstance(prompt, str) and len(numbers) == len(prompt):
        ids, templated = numbers, False
    elif isinstance(prompt, str) and raw:
        ids, templated = tokenizer.with_prefix(tokenizer.encode(prompt, allow_special=True)), False
    else:
        if isinstance(prompt, str) and not prompt:
            raise QwenMLXError("The prompt is empty; give at least one character.")
        messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids, templated = tokenizer.apply_chat_template(messages), True
    if system is not None and not templated:
        raise QwenMLXError("A system message needs the chat template; leave out raw, or put it into the prompt.")
    if not ids:
        raise QwenMLXError("The prompt has no tokens; give at least one character.")
    return ids


@refuses_wrong_arguments
def stream_generate(
    model: Qwen2,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int = 512,
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
    logits_processors: Sequence[Callable[[mx.array, mx.array], mx.array]] | None = None,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logprobs: int | None = None,
    seed: int | None = None,
    schema: Any = None,
    cache: Sequence[KVCache] | None = None,
    prompt_cache: PromptCache | None = None,
    draft_model: Draft | Qwen2 | str | None = None,
    num_draft_tokens: int | None = None,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> Generator[GenerationChunk, None, None]:
    """Generates text and yields it as it becomes complete: never half a character, never part of a stop string.

        for chunk in stream_generate(model, tokenizer, "Count to 9.", temperature=0, stop=["5"]):
            print(chunk.text, end="")

    Arguments that are None keep the model's own setting, of sampling `model.generation_defaults`.

    prompt: a user's message, a list of messages or token ids, see encode_prompt.
    system: a system message, put first.
    raw: take a text as it is, without the chat template.
    max_tokens: tokens of the answer at most.
    min_tokens: no end token before so many.
    stop: a string or several that end the text and are left out of it, also the name of a control token.
    stop_token_ids: tokens that end the text beside the model's own.
    skip_special_tokens: leave control tokens out of the text.
    reasoning_budget: tokens of a thought at most; then the closing mark is written for the model.
    temperature: 0 is greedy.
    top_k: choose among so many of the likeliest tokens; 0 is off.
    top_p: choose among the likeliest tokens that together reach this probability; 1 is off.
    min_p: drop tokens less likely than so many times the likeliest; 0 is off.
    repetition_penalty: over 1 discourages repeats, of the prompt too; 1 is off.
    typical_p: keep tokens of expected surprise; 1 is off.
    presence_penalty: subtracted from the logits of tokens that were generated.
    frequency_penalty: subtracted for each time that a token was generated.
    no_repeat_ngram_size: never generate so many tokens in a row twice; 0 is off.
    xtc_probability: how often to exclude top choices; 0 is off.
    xtc_threshold: the probability that makes a top choice.
    logit_bias: numbers to add to logits, by token id.
    logits_processors: functions of (ids so far, logits (1, V)) that return logits, as mlx-lm's.
    sampler: a function of log-probabilities (1, V) that returns an id (1,), in place of all sampling above.
    logprobs: 0 to 100; chunks then carry the token's ln p and so many of the likeliest.
    seed: makes sampling repeatable on one backend.
    schema: a JSON schema (a mapping, JSON text, a class of pydantic's, True for any JSON) that the text satisfies, or a
        Constraint of structured.constraint. JSON is complete even where max_tokens ends it, as finish_reason says.
    cache: continues it, the prompt being new tokens.
    prompt_cache: what it shares with the prompt is not computed again; afterwards it holds the prompt and the answer.
    draft_model: a smaller model with the same vocabulary, "prompt-lookup" for what the text already holds, or a draft
        of generation.drafts: the same tokens (greedy) or distribution (sampling) in fewer passes. Not with sampler and
        logits_processors.
    num_draft_tokens: guess at most so many at a time, 1 to 32.
    prefill_step_size: tokens of the prompt read in one pass; None chooses by the device.
    progress: called with (prompt tokens done, prompt tokens in all).

    Raises QwenMLXError for an impossible argument or a prompt that leaves no room in the context, before any work.
    """
    settings = settings_of(model, tokenizer, locals())
    if cache is not None and prompt_cache is not None:
        raise QwenMLXError("Both cache and prompt_cache are given; a prompt cache has its own.")
    check_caches(model, settings, cache, prompt_cache)
    ids = encode_prompt(tokenizer, prompt, system, raw, model.config.context_length)
    return stream(model, tokenizer, ids, settings, cache=cache, prompt_cache=prompt_cache, progress=progress)


@refuses_wrong_arguments
def generate(
    model: Qwen2,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system: str | None = None,
    raw: bool = False,
    max_tokens: int = 512,
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
    logits_processors: Sequence[Callable[[mx.array, mx.array], mx.array]] | None = None,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logprobs: int | None = None,
    seed: int | None = None,
    schema: Any = None,
    cache: Sequence[KVCache] | None = None,
    prompt_cache: PromptCache | None = None,
    draft_model: Draft | Qwen2 | str | None = None,
    num_draft_tokens: int | None = None,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
    verbose: bool = False,
) -> str:
    """Generates the text and returns it.

        generate(model, tokenizer, "Reverse a string in Python.", max_tokens=200)

    verbose: print the text as it is generated, and what it took.

    The other arguments and the errors are stream_generate's.
    """
    arguments = {name: value for name, value in locals().items() if name != "verbose"}
    text = ""
    for chunk in stream_generate(**arguments):
        text += chunk.text
        if verbose:
            print(chunk.text, end="", flush=True)
    if verbose:
        stats = chunk.stats
        print(f"\nprompt: {stats.prompt_tokens} tokens, {stats.prompt_per_second:.1f} tok/s")
        print(f"generation: {stats.generated_tokens} tokens, {stats.generated_per_second:.1f} tok/s")
    return text


def settings_of(model: Qwen2, tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> GenerationSettings:
    """The settings that a public function's own arguments mean, by name; other arguments are passed over. Raises
    QwenMLXError for what cannot be."""
    sampling = model.generation_defaults.override(**{name: arguments.get(name) for name in SAMPLING_ARGUMENTS})
    size = model.config.vocab_size
    bad = next((token for token, _ in sampling.logit_bias if token >= size), None)
    if bad is not None:
        raise QwenMLXError(f"logit_bias names token {bad}, expected 0 to {size - 1}.")
    names = [f.name for f in fields(GenerationSettings) if f.name in arguments]
    given = {name: arguments[name] for name in names}
    if given.get("draft_model") is not None:
        if model.ranks is not None:
            raise QwenMLXError("A draft cannot be used with a model on several ranks; leave it out.")
        if sampling.sampler is not None or sampling.logits_processors:
            raise QwenMLXError("A draft does not go with sampler and logits_processors; leave it or them out.")
        given["draft_model"] = make_draft(given["draft_model"])
    schema = arguments.get("schema")
    if schema is not None:
        given["constraint"] = schema if isinstance(schema, Constraint) else constraint(tokenizer, json_schema=schema)
    settings = GenerationSettings(sampling, **given)
    named = {tokenizer.special[text] for text in settings.stop if text in tokenizer.special}
    ends = tokenizer.eos_token_ids | set(settings.stop_token_ids) | named
    bad = next((token for token in settings.stop_token_ids if token >= size), None)
    if bad is not None:
        raise QwenMLXError(f"stop_token_ids names token {bad}, expected 0 to {size - 1}.")
    return replace(settings, eos_token_ids=tuple(sorted(ends)))


def check_caches(model: Qwen2, settings: GenerationSettings, cache: Any, prompt_cache: Any) -> None:
    """Raises QwenMLXError for caches that are not this model's, or that cannot be used with the settings' draft."""
    layers = model.config.num_hidden_layers
    if cache is not None and (not isinstance(cache, Sequence) or len(cache) != layers):
        raise QwenMLXError(f"cache is {str(cache)[:60]!r}, expected what model.make_cache() gives, {layers} layers.")
    if prompt_cache is not None and getattr(prompt_cache, "model", None) is not model:
        raise QwenMLXError("prompt_cache is not one of this model; make it with PromptCache(model).")
    if settings.draft_model is not None:
        check_cache(cache or (prompt_cache.layers if prompt_cache is not None else ()))


def room_after(model: Qwen2, ids: Sequence[int], cached: int = 0) -> int:
    """Tokens that the context has room for after `cached` tokens and `ids`. Raises QwenMLXError if that is none, or for
    an id that is no token's."""
    bad = next((i for i in ids if not 0 <= i < model.config.vocab_size), None)
    if bad is not None:
        raise QwenMLXError(f"The prompt holds token id {bad}, expected 0 to {model.config.vocab_size - 1}.")
    used, context = len(ids) + cached, model.config.context_length
    if used >= context:
        fix = model.config.suggest_yarn(used + 1)
        raise QwenMLXError(f"The prompt has {used} tokens and the model's context {context}: {fix}.")
    return context - used


def with_budget(settings: GenerationSettings, tokenizer: Tokenizer, ids: Sequence[int]) -> GenerationSettings:
    """The settings of an answer to the prompt `ids`, whose reasoning_budget has become a constraint; the same settings
    where there is none, or the model does not think."""
    if settings.reasoning_budget is None or tokenizer.think_marks is None:
        return settings
    limit = ThoughtLimit(tokenizer, ids, settings.reasoning_budget)
    return replace(settings, reasoning_budget=None, constraint=limit)


def stream(
    model: Qwen2,
    tokenizer: Tokenizer,
    ids: list[int],
    settings: GenerationSettings,
    *,
    cache: Sequence[KVCache] | None = None,
    prompt_cache: PromptCache | None = None,
    progress: Progress | None = None,
) -> Generator[GenerationChunk, None, None]:
    """stream_generate with its settings made and its prompt encoded."""
    if progress is not None and not callable(progress):
        raise QwenMLXError(f"progress is {progress!r:.80}, expected a function.")
    limit = min(settings.max_tokens, room_after(model, ids, cache[0].offset if cache else 0))
    settings = replace(settings, max_tokens=limit, min_tokens=min(settings.min_tokens, limit))
    if settings.constraint is not None:
        settings.constraint.check_fits(limit)
    settings = with_budget(settings, tokenizer, ids)
    return _stream(model, tokenizer, ids, settings, cache, prompt_cache, progress)


def _stream(
    model: Qwen2,
    tokenizer: Tokenizer,
    ids: list[int],
    settings: GenerationSettings,
    cache: Sequence[KVCache] | None,
    prompt_cache: PromptCache | None,
    progress: Progress | None,
) -> Generator[GenerationChunk, None, None]:
    thoughts, text_ids, cached = tokenizer.thoughts(ids), list(ids), 0
    if prompt_cache is not None:
        cached = prompt_cache.keep(ids)
        cache = prompt_cache.layers
    stats = GenerationStats(prompt_tokens=len(ids) - cached, reused_tokens=cached)
    policy = plain_steps
    if settings.draft_model is not None:
        policy = functools.partial(drafted_steps, draft=settings.draft_model, ids=list(ids), stats=stats)
    tokens = generate_tokens(
        model, ids[cached:], settings, cache=cache, cached_ids=ids[:cached], policy=policy, progress=progress
    )
    text_stream = TextStream(tokenizer, settings)
    start = time.perf_counter()
    try:
        with contextlib.closing(tokens):
            for token in tokens:
                if token.error is not None:
                    raise QwenMLXError(CANNOT_GO_ON.format(token.error))
                now = time.perf_counter()
                stats.generated_tokens += 1
                if stats.generated_tokens == 1:
                    stats.prompt_seconds, start = now - start, now
                else:
                    stats.generation_seconds = now - start
                if model.ranks is not None:
                    stats.communication_seconds = model.ranks.communication_seconds(
                        stats.prompt_seconds, stats.generation_seconds
                    )
                text_ids.append(token.id)
                text, finish_reason = text_stream.add(token.id, token.closing)
                ended = finish_reason is not None
                reasoning, answer = ("", text) if thoughts is None else thoughts.add(text, ended)
                if finish_reason == "length":
                    stats.repeated_tokens = repeated_tokens(text_ids[len(ids) :])
                yield GenerationChunk(
                    text, token.id, finish_reason, stats, token.logprob, token.top_logprobs, reasoning, answer
                )
                if ended:
                    return
    finally:
        if prompt_cache is not None and cache is not None:
            prompt_cache.record(text_ids, cache)


def repeated_tokens(ids: Sequence[int]) -> int:
    """The length, at most 1,024, of the run of tokens that the end of `ids` repeats, four times at least and over 64
    tokens; 0 if there is none."""
    for length in range(1, min(1024, len(ids) // 4) + 1):
        span = max(4 * length, 64)
        if span <= len(ids) and list(ids[-span + length :]) == list(ids[-span:-length]):
            return length
    return 0


class TextStream:
    """Turns tokens into text as it becomes complete: never half a character or part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, settings: GenerationSettings) -> None:
        self._eos_ids, self._detokenizer = settings.eos_token_ids, tokenizer.detokenizer(settings.skip_special_tokens)
        self._stop, self._left = settings.stop, settings.max_tokens
        self._pending = ""  # text that may be the beginning of a stop string

    def end_now(self) -> None:
        """Makes the next token the last one, as max_tokens would."""
        self._left = min(self._left, 1)

    def add(self, token: int, closing: bool = False) -> tuple[str, str | None]:
        """Newly complete text (maybe empty), and why it ends here: "stop", "length", or None where it goes on. closing:
        as Token's; an end token then is max_tokens' end."""
        self._left -= 1
        ended = token in self._eos_ids
        last = ended or self._left == 0
        pending = self._pending + ("" if ended else self._detokenizer.add(token))
        if last:
            pending += self._detokenizer.finish()
        cut = min((start for start in map(pending.find, self._stop) if start >= 0), default=-1)
        if cut >= 0:
            return pending[:cut], "stop"
        end = len(pending) - (0 if last else overlap(pending, self._stop))
        text, self._pending = pending[:end], pending[end:]
        return text, "length" if last and (closing or not ended) else "stop" if last else None


def overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(s) - 1 for s in stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0
