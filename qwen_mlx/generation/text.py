"""From a prompt to text, as it is made."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import QwenMLXError, refuse_unknown
from ..model.cache import KVCache
from ..model.qwen2 import Qwen2
from ..text.tokenizer import Tokenizer
from .drafts import Draft, check_draft
from .engine import PREFILL_CHUNK, GenerationStats, generate_ids
from .prompt_cache import PromptCache
from .sampling import SamplingSettings
from .speculative import speculative_ids

Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class GenerationChunk:
    """Newly complete text (maybe empty) and the token that made it. finish_reason is "stop" (an end token or a stop
    string), "length" (max_tokens or the context's end) or None while the text goes on. With logprobs: ln p of the token
    by the model's logits as they are, before penalties and temperature, and the likeliest tokens' (id, ln p)."""

    text: str
    token: int
    finish_reason: str | None
    stats: GenerationStats = field(repr=False)
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, system: str | None = None, raw: bool = False) -> list[int]:
    """Token ids of a prompt: a string is a user's message for the model's chat template, or with `raw` is taken as it
    is (control tokens included); a list of messages ({"role", "content"}) goes through the template; ids stay ids.

    Raises QwenMLXError for an empty prompt, or for `system` where no template is used.
    """
    if isinstance(prompt, Mapping) or not isinstance(prompt, str | Sequence | np.ndarray) or isinstance(prompt, bytes):
        raise QwenMLXError(
            f"The prompt is {type(prompt).__name__}, expected a string, a list of messages or a list of token ids."
        )
    numbers = [] if isinstance(prompt, str) else [int(item) for item in prompt if isinstance(item, int | np.integer)]
    if not isinstance(prompt, str) and len(numbers) == len(prompt):
        ids, plain = numbers, True
    elif isinstance(prompt, str) and raw:
        ids, plain = tokenizer.encode(prompt, allow_special=True), True
    else:
        if isinstance(prompt, str) and not prompt:
            raise QwenMLXError("The prompt is empty; give at least one character.")
        messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        ids, plain = tokenizer.apply_chat_template(messages), False
    if plain and system is not None:
        raise QwenMLXError("A system message needs the chat template; leave out raw, or put it into the prompt.")
    if not ids:
        raise QwenMLXError("The prompt has no tokens; give at least one character.")
    return ids


def stream_generate(
    model: Qwen2,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = 512,
    system: str | None = None,
    raw: bool = False,
    stop: Sequence[str] = (),
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
    min_tokens: int = 0,
    logprobs: int | None = None,
    seed: int | None = None,
    cache: Sequence[KVCache] | None = None,
    prompt_cache: PromptCache | None = None,
    draft_model: Draft | Qwen2 | str | None = None,
    num_draft_tokens: int | None = None,
    prefill_step_size: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
    **unknown: Any,
) -> Generator[GenerationChunk, None, None]:
    """Generates and yields text as it becomes complete: never half a character, never part of a stop string.

    prompt, system, raw: see encode_prompt. stop: strings that end the text and are left out of it. Sampling arguments
    that are None keep the model's own defaults (`model.generation_defaults`); temperature 0 is greedy; for the others
    see SamplingSettings. min_tokens: no end token before so many. logprobs: 0 to 100, chunks then carry the token's
    ln p and so many of the likeliest.
    cache: continues it, the prompt being new tokens. prompt_cache: the prompt is the whole text, and what the cache
    shares with its beginning is not computed again; afterwards it holds the prompt and the answer.
    draft_model: a smaller model with the same vocabulary, "prompt-lookup" for what the text already holds, or an
    object of drafts.py: the same tokens (greedy) or distribution (sampling) in fewer passes. num_draft_tokens: at most
    so many at a time, 1 to 32.
    Raises QwenMLXError for an impossible argument or a prompt that leaves no room in the context, before any work.
    """
    refuse_unknown(unknown, ARGUMENTS)
    check_settings(seed, stop, max_tokens=max_tokens, prefill_step_size=prefill_step_size)
    if cache is not None and prompt_cache is not None:
        raise QwenMLXError("Both cache and prompt_cache are given; a prompt cache has its own.")
    check_caches(model, cache, prompt_cache)
    sampling = model.generation_defaults.override(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        typical_p=typical_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        logit_bias=logit_bias,
    )
    check_choices(sampling, min_tokens, logprobs, max_tokens, model.config.vocab_size)
    ids = encode_prompt(tokenizer, prompt, system, raw)
    max_tokens = min(max_tokens, check_ids(model, ids, cache[0].offset if cache else 0))
    loop = {
        "sampling": sampling,
        "seed": seed,
        "cache": cache,
        "prefill_step_size": prefill_step_size,
        "progress": progress,
    }
    loop |= {"min_tokens": min_tokens, "end_ids": tuple(sorted(tokenizer.eos_token_ids)), "logprobs": logprobs}
    if draft_model is not None and model.ranks is not None:
        raise QwenMLXError("A draft cannot be used with a model on several ranks; leave it out.")
    if draft_model is not None:
        held = prompt_cache.layers if cache is None and prompt_cache is not None else cache
        loop |= check_draft(draft_model, num_draft_tokens, held or ()) | {"max_tokens": max_tokens}
    elif num_draft_tokens is not None:
        raise QwenMLXError("num_draft_tokens is given without a draft; give a draft too.")
    return _stream(model, tokenizer, ids, max_tokens, tuple(stop), prompt_cache, loop)


def check_settings(seed: int | None, stop: Sequence[str], **counts: int) -> None:
    """Raises QwenMLXError for an impossible seed, stop string or count (expected 1 or more)."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise QwenMLXError(f"{name} is {value!r}, expected 1 or more.")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64):
        raise QwenMLXError(f"seed is {seed!r}, expected an integer from 0 to 2^64 - 1.")
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
        raise QwenMLXError(f"stop is {stop!r}, expected a list of strings that are not empty.")


def check_choices(
    sampling: SamplingSettings, min_tokens: int, logprobs: int | None, max_tokens: int, vocab_size: int
) -> None:
    """Raises QwenMLXError for a count out of range or a bias of no token."""
    if not isinstance(min_tokens, int) or isinstance(min_tokens, bool) or not 0 <= min_tokens <= max_tokens:
        raise QwenMLXError(f"min_tokens is {min_tokens!r}, expected 0 to max_tokens, {max_tokens}.")
    if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= 100):
        raise QwenMLXError(f"logprobs is {logprobs!r}, expected 0 to 100.")
    bad = next((token for token, _ in sampling.logit_bias if token >= vocab_size), None)
    if bad is not None:
        raise QwenMLXError(f"logit_bias names token {bad}, expected 0 to {vocab_size - 1}.")


def check_caches(model: Qwen2, cache: Any, prompt_cache: Any) -> None:
    """Raises QwenMLXError for caches that are not this model's."""
    layers = model.config.num_hidden_layers
    if cache is not None and (not isinstance(cache, Sequence) or len(cache) != layers):
        raise QwenMLXError(f"cache is {str(cache)[:60]!r}, expected what model.make_cache() gives, {layers} layers.")
    if prompt_cache is not None and getattr(prompt_cache, "model", None) is not model:
        raise QwenMLXError("prompt_cache is not one of this model; make it with PromptCache(model).")


def check_ids(model: Qwen2, ids: Sequence[int], held: int = 0) -> int:
    """Tokens that the context still has room for after `held` and `ids`. Raises QwenMLXError if that is none, or for
    an id that is no token's."""
    bad = next((i for i in ids if not 0 <= i < model.config.vocab_size), None)
    if bad is not None:
        raise QwenMLXError(f"The prompt holds token id {bad}, expected 0 to {model.config.vocab_size - 1}.")
    used, context = len(ids) + held, model.config.context_length
    if used >= context:
        fix = model.config.suggest_yarn(used + 1)
        raise QwenMLXError(f"The prompt has {used} tokens and the model's context {context}: {fix}.")
    return context - used


def _tokens(
    model: Qwen2, ids: list[int], prompt_cache: PromptCache | None, stats: GenerationStats, loop: dict[str, Any]
) -> Iterator[int]:
    """generate_ids, or speculative_ids, without what a prompt cache holds already; the cache learns what it holds,
    whatever ends this."""
    make: Callable[..., Generator[int, None, None]] = generate_ids
    if "draft_model" in loop:
        make = functools.partial(speculative_ids, stats=stats)
    if prompt_cache is None:
        yield from make(model, ids, **loop)
        return
    stats.reused_tokens = prompt_cache.keep(ids)
    stats.prompt_tokens -= stats.reused_tokens
    held, rest = ids[: stats.reused_tokens], ids[stats.reused_tokens :]
    made: list[int] = []
    layers = prompt_cache.layers
    loop = loop | {"cache": layers, "cached_ids": held}
    try:
        with contextlib.closing(make(model, rest, **loop)) as tokens:
            for token in tokens:
                made.append(token)
                yield token
    finally:
        prompt_cache.record([*ids, *made], layers)


def _stream(
    model: Qwen2,
    tokenizer: Tokenizer,
    ids: list[int],
    max_tokens: int,
    stop: tuple[str, ...],
    prompt_cache: PromptCache | None,
    loop: dict[str, Any],
) -> Generator[GenerationChunk, None, None]:
    stats = GenerationStats(prompt_tokens=len(ids))
    stream = TextStream(tokenizer, stop, max_tokens)
    found: list[Any] = [None, ()]
    loop = loop | {"on_logprobs": lambda *new: found.__setitem__(slice(None), new)}
    start = time.perf_counter()
    for token in _tokens(model, ids, prompt_cache, stats, loop):
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
        text, finish_reason = stream.add(token)
        yield GenerationChunk(text, token, finish_reason, stats, *found)
        if finish_reason is not None:
            return


ARGUMENTS = [name for name in inspect.signature(stream_generate).parameters if name != "unknown"]


class TextStream:
    """The text that tokens make, given out as it becomes complete: never half a character or part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], max_tokens: int) -> None:
        self._eos_ids, self._detokenizer = tokenizer.eos_token_ids, tokenizer.detokenizer()
        self._stop, self._left = stop, max_tokens
        self._pending = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> tuple[str, str | None]:
        """Newly complete text (maybe empty), and why it ends here: "stop", "length", or None where it goes on."""
        self._left -= 1
        ended = token in self._eos_ids
        last = ended or self._left == 0
        pending = self._pending + ("" if ended else self._detokenizer.add(token))
        if last:
            pending += self._detokenizer.finish()
        cut = min((found for found in map(pending.find, self._stop) if found >= 0), default=-1)
        if cut >= 0:
            return pending[:cut], "stop"
        held = 0 if last else overlap(pending, self._stop)
        text, self._pending = pending[: len(pending) - held], pending[len(pending) - held :]
        return text, "stop" if ended else "length" if last else None


def overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(s) - 1 for s in stop), default=0)
    for size in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-size:]) for s in stop):
            return size
    return 0


def generate(model: Qwen2, tokenizer: Tokenizer, prompt: Prompt, **arguments: Any) -> str:
    """The whole text at once; arguments and errors as for stream_generate."""
    return "".join(chunk.text for chunk in stream_generate(model, tokenizer, prompt, **arguments))
