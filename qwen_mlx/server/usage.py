"""Counts of tokens, and what a token looks like, in OpenAI's shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from ..generation.engine import GenerationStats
from ..generation.text import GenerationChunk
from ..text.tokenizer import Tokenizer
from .body import Body
from .service import Task


@dataclass
class Usage:
    """The statistics of a request's answers, by index."""

    created: int = field(default_factory=lambda: int(time.time()))
    stats: dict[int, GenerationStats] = field(default_factory=dict)

    def add(self, index: int, chunk: GenerationChunk) -> None:
        """Notes an answer's statistics, which grow by themselves."""
        self.stats[index] = chunk.stats

    @property
    def generated(self) -> int:
        """Tokens of all answers."""
        return sum(stats.generated_tokens for stats in self.stats.values())


def wants_usage(body: Body, stream: bool) -> bool:
    """Takes stream_options: True if a stream ends with `usage`."""
    options = body.object("stream_options")
    if options is None:
        return False
    wanted = options.boolean("include_usage")
    options.only("include_obfuscation", False)
    options.done()
    if not stream:
        body.refuse("stream_options", "is given without stream")
    return wanted


def whole_usage(usage: Usage, tasks: Sequence[Task]) -> dict[str, Any]:
    """OpenAI's `usage`: each different prompt counts once."""
    prompts = {tuple(task.ids): i for i, task in reversed(list(enumerate(tasks)))}
    read = sum(map(len, prompts))
    cached = sum(usage.stats[i].reused_tokens for i in prompts.values() if i in usage.stats)
    return {
        "prompt_tokens": read,
        "completion_tokens": usage.generated,
        "total_tokens": read + usage.generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def fingerprint() -> str:
    """The name of what answers: this package and its version."""
    return f"qwen_mlx-{__version__}"


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; U+FFFD for bytes that are no character."""
    return tokenizer.token_text(token)


def token_entry(tokenizer: Tokenizer, chunk: GenerationChunk) -> dict[str, Any]:
    """A token with its log-probability and those of the likeliest."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    own = entry(chunk.token, chunk.logprob or 0.0)
    return {**own, "top_logprobs": [entry(*pair) for pair in chunk.top_logprobs]}
