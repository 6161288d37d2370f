"""Distances between two arrays. NaN, infinity and a shape that differs are failures, never small numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Measure:
    """l2: ||ours - theirs|| / ||theirs||. row: the largest l2 of a single row (last axis), which a few huge rows cannot
    hide, as Qwen2's first token would. worst: index, our value and theirs at the largest absolute difference.
    problem: what makes the arrays incomparable; every number is then infinite.
    """

    max_abs: float
    l2: float
    row: float
    cosine: float
    worst: tuple[tuple[int, ...], float, float] | None = None
    problem: str | None = None

    def json(self) -> dict[str, Any]:
        """JSON knows no infinity and no NaN: null stands for both, and `problem` says why."""
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def failed(problem: str) -> Measure:
    inf = float("inf")
    return Measure(inf, inf, inf, float("nan"), None, problem)


def measure(ours: np.ndarray, theirs: np.ndarray) -> Measure:
    """Compares in float64."""
    if ours.shape != theirs.shape:
        return failed(f"shape {ours.shape}, expected {theirs.shape}")
    if not np.isfinite(theirs).all():
        return failed(f"the reference itself holds {_not_finite(theirs)}")
    if not np.isfinite(ours).all():
        return failed(f"holds {_not_finite(ours)}")
    if ours.size == 0:
        return failed(f"is empty, shape {ours.shape}")
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    difference = np.abs(a - b)
    at = np.unravel_index(int(difference.argmax()), difference.shape)
    rows = _ratio(np.linalg.norm(difference, axis=-1), np.linalg.norm(b, axis=-1))
    return Measure(
        max_abs=float(difference[at]),
        l2=float(_ratio(np.linalg.norm(difference), np.linalg.norm(b))),
        row=float(rows.max()),
        cosine=_cosine(a, b),
        worst=(tuple(int(i) for i in at), float(a[at]), float(b[at])),
    )


def _not_finite(array: np.ndarray) -> str:
    at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
    count = int((~np.isfinite(array)).sum())
    return f"{count} value{'s' if count > 1 else ''} that are NaN or infinite, the first, {array[at]}, at {list(at)}"


def _ratio(difference: Any, size: Any) -> Any:
    """difference / size; 0 / 0 is 0, anything else over 0 is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, np.divide(difference, size))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum() / norms) if norms else float(np.array_equal(a, b))


@dataclass(frozen=True)
class LogitsMeasure:
    """kl: KL divergence of ours from theirs in nats, the largest of all positions. top1: share of positions with the
    same likeliest token. top10: mean share of their ten likeliest tokens that are among ours.
    """

    kl: float
    top1: float
    top10: float


def measure_logits(ours: np.ndarray, theirs: np.ndarray) -> LogitsMeasure:
    """ours, theirs: finite (N, vocabulary)."""
    kl, top1, top10 = [], [], []
    count = min(10, theirs.shape[-1])
    for a, b in zip(ours.astype(np.float64), theirs.astype(np.float64)):
        log_a, log_b = _log_softmax(a), _log_softmax(b)
        kl.append(float((np.exp(log_b) * (log_b - log_a)).sum()))
        top1.append(a.argmax() == b.argmax())
        best_a, best_b = (np.argpartition(x, -count)[-count:] for x in (a, b))
        top10.append(len(np.intersect1d(best_a, best_b)) / count)
    return LogitsMeasure(max(kl), float(np.mean(top1)), float(np.mean(top10)))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())
