"""GET /metrics, in Prometheus' text format, by llama.cpp's names."""

from __future__ import annotations

from .scheduler import Scheduler

# Name, type and description; the values come in this order.
SERIES = (
    ("prompt_tokens_total", "counter", "Prompt tokens computed."),
    ("prompt_reused_tokens_total", "counter", "Prompt tokens that came from the prefix cache."),
    ("prompt_seconds_total", "counter", "Seconds from the start of reading prompts to their first tokens."),
    ("tokens_predicted_total", "counter", "Tokens generated."),
    ("tokens_predicted_seconds_total", "counter", "Seconds of generating, of all requests together."),
    ("requests_finished_total", "counter", "Prompts that were answered."),
    ("requests_cancelled_total", "counter", "Prompts whose clients went away."),
    ("requests_failed_total", "counter", "Prompts that got an error."),
    ("requests_refused_total", "counter", "Requests for which the queue was full."),
    ("requests_processing", "gauge", "Prompts that are read or answered now."),
    ("requests_deferred", "gauge", "Prompts that wait for a slot."),
    ("prefix_cache_bytes", "gauge", "Bytes of the prefix cache."),
    ("prefix_cache_max_bytes", "gauge", "Bytes that the prefix cache may take."),
)


def metrics(scheduler: Scheduler) -> str:
    """The text of all series."""
    counts, cache, (processing, deferred) = scheduler.metrics, scheduler.cache, scheduler.load
    values = (
        counts.prompt_tokens,
        counts.reused_tokens,
        counts.prompt_seconds,
        counts.generated_tokens,
        counts.generation_seconds,
        counts.finished,
        counts.cancelled,
        counts.failed,
        counts.refused,
        processing,
        deferred,
        cache.nbytes,
        cache.max_bytes,
    )
    lines = []
    for (name, kind, text), value in zip(SERIES, values, strict=True):
        full = f"qwen_mlx:{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {value}"]
    return "\n".join(lines) + "\n"
