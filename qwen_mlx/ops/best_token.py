"""The likeliest token of each row of logits, and whether they are finite."""

from __future__ import annotations

from ..backend import mx
from . import cpu
from .dispatch import MAX_ELEMENTS, Kernel, executor, on_gpu, require, require_float

PARTS, THREADS = 128, 256  # threadgroups a row: one alone would read a whole vocabulary's logits

_PARTS = Kernel("best_parts", ("logits",), ("keys", "indices"), ("best.h",))
_TOKEN = Kernel("best_token", ("keys", "indices"), ("token",), ("best.h",))


def best_token(logits: mx.array) -> mx.array:
    """argmax of each row, -1 for a row with a number that is not finite.

    logits: (B, V). Returns (B,) int32; of equal numbers the first. Raises ValueError for another shape or dtype.
    """
    require_float("logits", logits)
    require(
        logits.ndim == 2 and logits.size > 0, lambda: f"logits has shape {logits.shape}, expected (B, V), not empty."
    )
    if executor("best_token") == "cpu" and logits.dtype == mx.float32:
        return cpu.best_token(logits)
    if not on_gpu("best_token") or logits.size > MAX_ELEMENTS:
        return or_not_finite(logits, mx.argmax(logits, axis=-1))
    rows, count = logits.shape
    template = (("COUNT", count), ("PARTS", PARTS), ("THREADS", THREADS))
    grid, shape = (PARTS * THREADS, rows, 1), (rows, PARTS)
    parts = _PARTS([logits], template, grid, (THREADS, 1, 1), [shape, shape], mx.uint32)
    return _TOKEN(parts, (("T", mx.uint32), ("PARTS", PARTS)), (32, rows, 1), (32, 1, 1), [(rows,)], mx.int32)[0]


def or_not_finite(logits: mx.array, choice: mx.array) -> mx.array:
    """choice (B,) of logits (B, V) as int32, -1 where a logit is not finite. Computed on the device, because a later
    question would wait for the step that is under way by then."""
    total = logits.astype(mx.float32).sum(axis=-1)  # minus itself it is 0 or NaN: two launches, isfinite takes six
    return mx.where(total - total == 0, choice.astype(mx.int32), -1)
