"""The token loop: prompt ids in, text out as it is made."""

from __future__ import annotations

import contextlib
import functools
import inspect
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ops
from .backend import mx
from .cache import KVCache
from .errors import QwenMLXError, refuse_unknown
from .model import Qwen2
from .sampling import SamplingSettings, log_probabilities, sample
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .prompt_cache import PromptCache
    from .speculative import Draft

PREFILL_CHUNK = 512  # tokens: bounds the memory of a long prompt's activations
NOT_FINITE = (
    "The model's logits are not finite; the file is damaged, or the dtype overflows (float16 does for Qwen2.5: use "
    "bfloat16 or float32)."
)
Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


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
    if not isinstance(prompt, str) and all(isinstance(item, int | np.integer) for item in prompt):
        ids, plain = [int(item) for item in prompt], True
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
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[int]:
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
    key = mx.random.key(secrets.randbits(63) if seed is None else seed)
    prompt = mx.array(prompt_ids, mx.int32)[None]
    length = prompt.shape[1]
    start, yielded = cache[0].offset, 0
    seen = mx.array([*cached_ids, *prompt_ids], mx.int32)[None] if sampling.looks_back else None
    n_prompt, launched = len(cached_ids) + length - n_made, n_made
    for layer in cache:
        layer.reserve(start + length)
    done = 0
    while length - done > prefill_chunk:
        with ops.no_grad():
            model.model(prompt[:, done : done + prefill_chunk], cache)
        mx.eval([layer.arrays for layer in cache])
        mx.clear_cache()  # of a long prompt, each chunk needs buffers of other sizes than the last
        done += prefill_chunk
        if progress:
            progress(done, length)

    def step(ids: mx.array) -> tuple[mx.array, ...]:
        """The next token, -1 if a logit is not finite: checked on the device, because a later question would wait for
        the step that is under way by then. The logits too, if log-probabilities are wanted."""
        nonlocal key, launched
        with ops.no_grad():
            logits = model(ids, cache, logits_to_keep=1)[:, -1].astype(mx.float32)
        now = None
        if not sampling.greedy:
            key, now = mx.random.split(key)
        ruled_out = end_ids if launched < min_tokens else ()
        launched += 1
        choice = sample(logits, sampling, seen, now, n_prompt=n_prompt, ruled_out=ruled_out, end_ids=end_ids)
        token = mx.where(mx.isfinite(logits.sum()), choice.astype(mx.int32), -1)
        if model.ranks is not None:
            token = model.ranks.first(token)
        found = (token,) if logprobs is None else (token, logits)
        mx.async_eval(found)
        return found

    try:
        token, *logits = step(prompt[:, done:])
        while True:
            following = None
            if seen is not None:
                seen = mx.concatenate([seen, token[:, None]], axis=1)
            if done >= length:  # the first token is shown before the second is computed
                following = step(token[:, None])
            made = int(token.item())
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
        for layer in cache:  # a step may be under way
            layer.trim(max(0, layer.offset - start - length - max(yielded - 1, 0)))


def chances(logits: mx.array, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """ln p of a token under logits (1, V), and the n likeliest (id, ln p)."""
    chosen, ids, values = log_probabilities(logits, mx.array([token]), n)
    return float(chosen[0]), tuple(zip(ids[0].tolist(), values[0].tolist()))


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
    no_repeat_ngram: int | None = None,
    xtc_probability: float | None = None,
    xtc_threshold: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    min_tokens: int = 0,
    logprobs: int | None = None,
    seed: int | None = None,
    cache: Sequence[KVCache] | None = None,
    prompt_cache: PromptCache | None = None,
    draft: Draft | Qwen2 | str | None = None,
    draft_tokens: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    progress: Callable[[int, int], None] | None = None,
    **unknown: Any,
) -> Iterator[GenerationChunk]:
    """Generates and yields text as it becomes complete: never half a character, never part of a stop string.

    prompt, system, raw: see encode_prompt. stop: strings that end the text and are left out of it. Sampling arguments
    that are None keep the model's own defaults (`model.generation_defaults`); temperature 0 is greedy; for the others
    see SamplingSettings. min_tokens: no end token before so many. logprobs: 0 to 100, chunks then carry the token's
    ln p and so many of the likeliest.
    cache: continues it, the prompt being new tokens. prompt_cache: the prompt is the whole text, and what the cache
    shares with its beginning is not computed again; afterwards it holds the prompt and the answer.
    draft: a smaller model with the same vocabulary, "prompt-lookup" for what the text already holds, or an object of
    speculative.py: the same tokens (greedy) or distribution (sampling) in fewer passes. draft_tokens: at most so many
    at a time, 1 to 32.
    Raises QwenMLXError for an impossible argument or a prompt that leaves no room in the context, before any work.
    """
    refuse_unknown(unknown, ARGUMENTS)
    check_settings(seed, stop, max_tokens=max_tokens, prefill_chunk=prefill_chunk)
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
        no_repeat_ngram=no_repeat_ngram,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        logit_bias=logit_bias,
    )
    check_choices(sampling, min_tokens, logprobs, max_tokens, model.config.vocab_size)
    ids = encode_prompt(tokenizer, prompt, system, raw)
    max_tokens = min(max_tokens, check_ids(model, ids, cache[0].offset if cache else 0))
    loop = {"sampling": sampling, "seed": seed, "cache": cache, "prefill_chunk": prefill_chunk, "progress": progress}
    loop |= {"min_tokens": min_tokens, "end_ids": tuple(sorted(tokenizer.eos_ids)), "logprobs": logprobs}
    if draft is not None and model.ranks is not None:
        raise QwenMLXError("A draft cannot be used with a model on several ranks; leave it out.")
    if draft is not None:
        from . import speculative

        held = prompt_cache.layers if cache is None and prompt_cache is not None else cache
        loop |= speculative.check_draft(draft, draft_tokens, held or ()) | {"max_tokens": max_tokens}
    elif draft_tokens is not None:
        raise QwenMLXError("draft_tokens is given without a draft; give a draft too.")
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
    layers = model.config.n_layers
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
    make = generate_ids
    if "draft" in loop:
        from .speculative import speculative_ids

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
) -> Iterator[GenerationChunk]:
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
            stats.communication_seconds = model.ranks.seconds(stats.prompt_seconds, stats.generation_seconds)
        text, finish_reason = stream.add(token)
        yield GenerationChunk(text, token, finish_reason, stats, *found)
        if finish_reason is not None:
            return


ARGUMENTS = [name for name in inspect.signature(stream_generate).parameters if name != "unknown"]


class TextStream:
    """The text that tokens make, given out as it becomes complete: never half a character or part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], max_tokens: int) -> None:
        self._eos_ids, self._detokenizer = tokenizer.eos_ids, tokenizer.detokenizer()
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
