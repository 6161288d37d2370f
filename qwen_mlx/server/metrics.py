"""GET /metrics, in Prometheus' text format, by llama.cpp's names."""

from __future__ import annotations

from .scheduler import Scheduler


def metrics(scheduler: Scheduler) -> str:
    """The text of all series."""
    counts, cache, (processing, deferred) = scheduler.metrics, scheduler.cache, scheduler.load
    series: tuple[tuple[str, str, str, float], ...] = (
        ("prompt_tokens_total", "counter", "Prompt tokens computed.", counts.prompt_tokens),
        (
            "prompt_reused_tokens_total",
            "counter",
            "Prompt tokens that came from the prefix cache.",
            counts.reused_tokens,
        ),
        (
            "prompt_seconds_total",
            "counter",
            "Seconds from the start of reading prompts to their first tokens.",
            counts.prompt_seconds,
        ),
        ("tokens_predicted_total", "counter", "Tokens generated.", counts.generated_tokens),
        (
            "tokens_predicted_seconds_total",
            "counter",
            "Seconds of generating, of all requests together.",
            counts.generation_seconds,
        ),
        ("requests_finished_total", "counter", "Prompts that were answered.", counts.finished),
        ("requests_cancelled_total", "counter", "Prompts whose clients went away.", counts.cancelled),
        ("requests_failed_total", "counter", "Prompts that got an error.", counts.failed),
        ("requests_refused_total", "counter", "Requests for which the queue was full.", counts.refused),
        ("requests_processing", "gauge", "Prompts that are read or answered now.", processing),
        ("requests_deferred", "gauge", "Prompts that wait for a slot.", deferred),
        ("prefix_cache_bytes", "gauge", "Bytes of the prefix cache.", cache.nbytes),
        ("prefix_cache_max_bytes", "gauge", "Bytes that the prefix cache may take.", cache.max_bytes),
    )
    lines = []
    for name, kind, text, value in series:
        full = f"qwen_mlx:{name}"
        lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}", f"{full} {value}"]
    return "\n".join(lines) + "\n"
