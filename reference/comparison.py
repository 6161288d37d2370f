"""Our trace against the reference's, tap by tap as ours is computed: nothing of ours is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qwen_mlx.backend import mx
from qwen_mlx.model.qwen2 import Qwen2

from . import mlx_side
from .measures import LogitsMeasure, Measure, failed, measure, measure_logits
from .taps import Run, keys_of_call, split_key

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class Tolerance:
    """The amount that a tap may differ by, and the noise floor that this comes from."""

    l2: float
    row: float
    l2_floor: float = 0.0
    row_floor: float = 0.0


@dataclass(frozen=True)
class TapResult:
    key: str
    measure: Measure
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        m = self.measure
        return m.problem is None and m.l2 <= self.tolerance.l2 and m.row <= self.tolerance.row  # false for NaN

    @property
    def ratio(self) -> float:
        """The larger of its errors in tolerances; 0 where both are 0."""
        pairs = ((self.measure.l2, self.tolerance.l2), (self.measure.row, self.tolerance.row))
        return max((error / limit if limit else float("inf")) if error else 0.0 for error, limit in pairs)


@dataclass
class Comparison:
    """Every tap of one run, in the order of computation."""

    run: str
    dtype: str
    results: list[TapResult] = field(default_factory=list)
    logits: list[LogitsMeasure] = field(default_factory=list)
    diagnosis: str | None = None  # the likeliest cause of the first divergence
    scatter: Any = None  # (ours, theirs) of some logits, for the picture

    @property
    def failures(self) -> list[TapResult]:
        return [result for result in self.results if not result.passed]

    @property
    def first(self) -> TapResult | None:
        """The first tap that diverges."""
        return next(iter(self.failures), None)

    @property
    def passed(self) -> bool:
        return bool(self.results) and not self.failures

    def worst_by_tap(self) -> dict[str, TapResult]:
        """The result of each kind of tap that is furthest beyond, or nearest to, its tolerance."""
        worst: dict[str, TapResult] = {}
        for result in self.results:
            tap = split_key(result.key)[2]
            if tap not in worst or (not result.passed, result.ratio) > (not worst[tap].passed, worst[tap].ratio):
                worst[tap] = result
        return worst

    def json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "dtype": self.dtype,
            "passed": self.passed,
            "first_diverging": self.first.key if self.first else None,
            "likeliest_cause": self.diagnosis,
            "logits": [asdict(logits) for logits in self.logits],
            "taps": {r.key: {**r.measure.json(), "tolerance": asdict(r.tolerance)} for r in self.results},
        }


def compare(
    model: Qwen2, run: Run, theirs: Mapping[str, np.ndarray], tolerances: Mapping[str, Tolerance], dtype: str
) -> Comparison:
    """Runs `model` and compares every tap with `theirs`. tolerances: by kind of tap, or by key where a key is there."""
    comparison = Comparison(run.name, dtype)
    found: dict[str, TapResult] = {}

    def sink(key: str, array: mx.array) -> None:
        limit = tolerances[key] if key in tolerances else tolerances[split_key(key)[2]]
        if key not in theirs:
            result = failed("the reference has no such tap")
        elif array.dtype != DTYPES[dtype]:
            result = failed(f"dtype {str(array.dtype).removeprefix('mlx.core.')}, expected {dtype}")
        else:
            ours, expected = to_numpy(array), theirs[key]
            if ours.shape == expected.shape:
                ours, expected = run.valid(ours, key), run.valid(expected, key)
            result = measure(ours, expected)
            if key.endswith("logits") and result.problem is None:
                flat = ours.reshape(-1, ours.shape[-1]), expected.reshape(-1, ours.shape[-1])
                comparison.logits.append(measure_logits(*flat))
                step = max(1, flat[0].size // 4000)
                comparison.scatter = tuple(side.ravel()[::step].astype(np.float32) for side in flat)
        found[key] = TapResult(key, result, limit)

    never = "our model never reached this tap"
    try:
        mlx_side.record(model, run, sink)
    except Exception as error:  # whatever a broken model does is a finding
        never = f"our model raised {type(error).__name__} before this tap: {error}"
    layers = sum(split_key(key)[2] == "input_norm" and key.startswith("0.") for key in theirs)
    for call in range(len(run.chunks)):
        for key in keys_of_call(call, layers):
            missing = TapResult(key, failed(never), Tolerance(0, 0))
            comparison.results.append(found.pop(key, missing))
    comparison.results += found.values()  # layers that the reference does not have
    return comparison


def logits_line(comparison: Comparison) -> str:
    """The logits' own measures over all calls, in words."""
    kl = max(logits.kl for logits in comparison.logits)
    top1, top10 = (min(getattr(m, name) for m in comparison.logits) for name in ("top1", "top10"))
    return f"logits: KL divergence at most {kl:.1e}, same top token {top1:.1%}, same top ten {top10:.1%}"


def to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
