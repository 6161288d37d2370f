"""A GPU that is none: the emulator where MLX would use Metal, with faults, and a trial of kernels on it."""

from __future__ import annotations

import contextlib
import json
import queue
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest

from qwen_mlx import ops
from qwen_mlx.ops import dispatch, tunings
from qwen_mlx.ops.trial import cases, child, session
from reference.emulator import emulate

# The kernels of each part, by the beginning of their names.
KERNELS = {
    "matvec": ("matvec",),
    "attend": ("decode_attention", "combine"),
    "unpack": ("unpack",),
    "rms_norm": ("rms_norm", "add_rms_norm"),
    "rope": ("rope", "qkv_rope"),
    "swiglu": ("swiglu",),
    "best_token": ("best_",),
}
ATTEMPT, CHOOSE_CUTS = child.attempt, child.choose_cuts
RIGHT: dict[tuple[cases.Spec, str], dict[str, Any]] = {}  # results of kernels without a fault
CUTS: dict[cases.Spec, dict[str, tunings.Choice]] = {}
COMPILER = (
    "[metal::Device] Unable to build metal library from source\n"
    "qwen_mlx/metal/rows.h:7:3: error: no matching function for call to 'load'\n"
)
THREADS = "Thread group size (512) is greater than  the maximum allowed threads per threadgroup (448)."


def wrong_bit(x: mx.array) -> mx.array:
    """x with the last bit of its last number flipped."""
    words = x.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[x.itemsize]).reshape(-1)
    last = (mx.arange(words.size) == words.size - 1).astype(words.dtype)
    return (words ^ last).view(x.dtype).reshape(x.shape)


def wrong_row(x: mx.array) -> mx.array:
    """x whose second row, or second number where there is one row, is its first."""
    rows = x.reshape(-1, x.shape[-1]) if x.size > x.shape[-1] else x.reshape(-1, 1)
    return mx.concatenate([rows[:1], rows[:1], rows[2:]]).reshape(x.shape)


class Faulty:
    """mx.fast.metal_kernel whose kernels of one part have a fault: "compile", "threads", "bit", "row", "later" (right
    once, then nothing but zeros) or "slow"."""

    def __init__(self, part: str, fault: str, make: Callable) -> None:
        self.part, self.fault, self._make = part, fault, make
        self.launched: list[str] = []

    def __call__(self, name: str, **arguments: object) -> Callable:
        launch, state = self._make(name=name, **arguments), {"launches": 0}

        def faulty(**call: object) -> list[mx.array]:
            self.launched.append(name)
            if not name.removeprefix("qwen_").startswith(KERNELS.get(self.part, ())):
                return launch(**call)
            if self.fault == "compile":
                raise RuntimeError(COMPILER)
            if self.fault == "threads":
                raise ValueError(THREADS)
            first, *others = launch(**call)
            state["launches"] += 1
            if self.fault in ("bit", "row"):
                first = {"bit": wrong_bit, "row": wrong_row}[self.fault](first)
            if self.fault == "later" and state["launches"] > 1:
                first = mx.zeros_like(first)
            return [first, *others]

        return faulty

    def attempt(self, case: cases.Case, spec: cases.Spec) -> dict[str, Any]:
        """child.attempt, which tries a case of another part than the faulty one once in this process."""
        if case.part == self.part:
            return ATTEMPT(case, spec)
        if (spec, case.name) not in RIGHT:
            RIGHT[spec, case.name] = ATTEMPT(case, spec)
        return RIGHT[spec, case.name]

    def choose_cuts(self, spec: cases.Spec, wanted: list[cases.Case]) -> dict[str, tunings.Choice]:
        """child.choose_cuts, likewise."""
        if self.part == "matvec":
            return CHOOSE_CUTS(spec, wanted)
        if spec not in CUTS:
            CUTS[spec] = CHOOSE_CUTS(spec, wanted)
        return CUTS[spec]

    def seconds(self, call: Callable, inputs: tuple, traced: bool = True) -> float:
        """A clock that shows a second, and ten more for a launch of a slow kernel."""
        self.launched.clear()
        mx.eval(list(call(*inputs)))
        names = KERNELS.get(self.part, ())
        slow = any(name.removeprefix("qwen_").startswith(names) for name in self.launched)
        return 11.0 if self.fault == "slow" and slow else 1.0


@contextlib.contextmanager
def stand_in_gpu(part: str = "", fault: str = "", own_process: bool = False) -> Iterator[Faulty]:
    """Within it MLX's default device says that it is a GPU with Metal. Trials run in this process, or in their own."""
    device = mx.Device(mx.gpu)
    with emulate(checked=False), ops.forced(None), pytest.MonkeyPatch.context() as patch:
        faulty = Faulty(part, fault, mx.fast.metal_kernel)
        patch.setattr(mx.fast, "metal_kernel", faulty)
        patch.setattr(mx, "default_device", lambda: device)
        if not own_process:
            patch.setattr(session, "answers", lambda request: in_process(request, faulty))
        patch.delenv("QWEN_MLX_KERNELS", raising=False)
        patch.setattr(tunings, "_chosen", {})
        dispatch.setting.cache_clear()
        dispatch.forget()
        mx.disable_compile()
        try:
            yield faulty
        finally:
            mx.enable_compile()
            dispatch.forget()
            dispatch.setting.cache_clear()


@contextlib.contextmanager
def in_process(request: dict, faulty: Faulty) -> Iterator[session.Answers]:
    """session.answers without a process: what the child would print."""
    lines: queue.Queue[bytes | None] = queue.Queue()

    def say(**line: object) -> None:
        lines.put(f"{request['token']}{json.dumps(line)}\n".encode())

    spec = cases.Spec.from_json(json.loads(json.dumps(request["spec"])))
    with ops.forced("metal"), pytest.MonkeyPatch.context() as patch:
        for name in ("attempt", "choose_cuts", "seconds"):
            patch.setattr(child, name, getattr(faulty, name))
        child.run(spec, frozenset(request["skip"]), say)
    lines.put(None)
    yield session.Answers(lines, lambda: "it ended")
