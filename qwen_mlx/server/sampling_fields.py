"""The fields of a request that say how tokens are chosen, by OpenAI's names, llama.cpp's and this package's own."""

from __future__ import annotations

import secrets
from typing import Any

from ..errors import QwenMLXError
from ..generation.sampling import SamplingSettings
from ..generation.settings import GenerationSettings
from ..generation.text import settings_of
from .body import Body
from .errors import RequestError
from .service import Service

MOST_STOPS = 16
UNLIMITED = 10**9  # tokens: all that the context has room for
# The most tokens of a thought by this package's name, vLLM's and llama.cpp's; -1 is no limit.
BUDGETS = ("reasoning_budget", "thinking_token_budget", "thinking_budget_tokens")
# llama.cpp's names of samplers, with the settings that switch each off.
SAMPLERS: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "top_k": {"top_k": 0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "typ_p": {"typical_p": 1.0},
    "typical_p": {"typical_p": 1.0},
    "xtc": {"xtc_probability": 0.0},
    "temperature": {"temperature": 1.0},
    "dry": {},
    "top_n_sigma": {},
    "infill": {},
}
LETTERS = {"e": "penalties", "d": "dry", "s": "top_n_sigma", "k": "top_k", "y": "typ_p", "p": "top_p", "m": "min_p"}
LETTERS |= {"x": "xtc", "t": "temperature", "i": "infill"}


def sampling_arguments(body: Body) -> dict[str, Any]:
    """Takes the sampling fields, as arguments of stream_generate; those that are not given keep the model's own."""
    given: dict[str, Any] = {
        "temperature": body.number("temperature", 0, 100),
        "top_k": body.integer("top_k", -1),
        "top_p": body.number("top_p", 0, 1),
        "min_p": body.number("min_p", 0, 1),
        "typical_p": body.number("typical_p", 0, 1),
        "presence_penalty": body.number("presence_penalty", -2, 2),
        "frequency_penalty": body.number("frequency_penalty", -2, 2),
        "no_repeat_ngram_size": body.integer("no_repeat_ngram_size", 0, 1000),
        "xtc_probability": body.number("xtc_probability", 0, 1),
        "xtc_threshold": body.number("xtc_threshold", 0, 0.5),
        "logit_bias": _logit_bias(body),
        "min_tokens": body.integer("min_tokens", 0, default=0),
    }
    names = ("repetition_penalty", "repeat_penalty")
    given["repetition_penalty"] = body.same({name: body.number(name, 0.01, 100) for name in names})
    if given["top_k"] == -1:
        given["top_k"] = 0
    if given["top_p"] == 0:  # of one token, the likeliest
        given["top_p"], given["top_k"] = 1.0, 1
    if given["typical_p"] == 0:
        body.refuse("typical_p", "is 0, expected a number above 0 and at most 1")
    budget = body.same({name: body.integer(name, -1) for name in BUDGETS})
    given["reasoning_budget"] = UNLIMITED if budget == -1 else budget
    seed = body.integer("seed", -(2**63), 2**64 - 1)
    given["seed"] = None if seed == -1 else None if seed is None else seed % 2**64
    return given | _samplers(body, given)


def _samplers(body: Body, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that llama.cpp's list `samplers` changes: those that it does not name are off."""
    names = body.take("samplers")
    # Settings that llama.cpp has and this server has not: only the values that switch it off.
    repeat_last_n = body.integer("repeat_last_n", -1)
    if repeat_last_n not in (None, -1) and (given["repetition_penalty"] or 1) != 1:
        body.refuse("repeat_last_n", f"is {repeat_last_n}, but penalties look at the whole text here; leave it out")
    for name, off in (("dynatemp_range", 0), ("mirostat", 0), ("dry_multiplier", 0), ("top_n_sigma", -1)):
        body.only(name, off, float(off))
    for name in ("dynatemp_exponent", "mirostat_tau", "mirostat_eta", "dry_base", "dry_allowed_length"):
        body.take(name)  # they only shape what is off
    for name in ("dry_penalty_last_n", "dry_sequence_breakers"):
        body.take(name)
    if names is None:
        return {}
    if isinstance(names, str):
        names = [LETTERS.get(letter, letter) for letter in names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        body.refuse("samplers", "is not a list of names")
    unknown = next((name for name in names if name not in SAMPLERS), None)
    if unknown is not None:
        body.refuse("samplers", f"names {unknown[:40]!r}, expected {', '.join(SAMPLERS)}")
    changes: dict[str, Any] = {}
    for name, switched_off in SAMPLERS.items():
        if name not in names and not (name == "typical_p" and "typ_p" in names):
            changes |= switched_off
    if "typical_p" in names:
        changes.pop("typical_p", None)
    if "infill" in names:
        # llama.cpp's sampler for fills keeps what the model is sure of; here that is the likeliest token.
        changes |= {"temperature": 0.0}
    return changes


def _logit_bias(body: Body) -> dict[int, float] | None:
    """{token id: bias}; OpenAI's ids are strings, as JSON's keys are."""
    bias = body.take("logit_bias")
    if bias is None:
        return None
    pairs = bias.items() if isinstance(bias, dict) else bias
    try:
        numbers = {int(token): -1e6 if value is False else float(value) for token, value in pairs}
    except (OverflowError, TypeError, ValueError):
        body.refuse("logit_bias", "is not an object of token ids and numbers from -100 to 100")
    if not all(-100 <= value <= 100 or value == -1e6 for value in numbers.values()) or len(numbers) > 1000:
        body.refuse("logit_bias", "is not an object of up to 1000 token ids and numbers from -100 to 100")
    return numbers


def generation_settings(service: Service, arguments: dict[str, Any]) -> GenerationSettings:
    """The settings that arguments of stream_generate mean. Raises RequestError (400) for what cannot be."""
    try:
        return settings_of(service.model, service.tokenizer, arguments)
    except QwenMLXError as error:
        raise RequestError(400, str(error)) from None


def time_limits(body: Body) -> dict[str, Any]:
    """Takes llama.cpp's limits in milliseconds, as a Task's in seconds; 0 is none."""
    fields = {"prompt_seconds": "t_max_prompt_ms", "predict_seconds": "t_max_predict_ms"}
    limits = {name: body.number(field, 0, 1e9) for name, field in fields.items()}
    return {name: limit / 1000 if limit else None for name, limit in limits.items()}


def seeds(seed: int | None, count: int) -> list[int]:
    """Seeds of several answers to one request."""
    first = secrets.randbits(63) if seed is None else seed
    return [(first + i) % 2**64 for i in range(count)]


def defaults(settings: SamplingSettings) -> dict[str, Any]:
    """The sampling settings by llama.cpp's names, for /props."""
    return {
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p,
        "typical_p": settings.typical_p,
        "repeat_penalty": settings.repetition_penalty,
        "presence_penalty": settings.presence_penalty,
        "frequency_penalty": settings.frequency_penalty,
    }
