"""A call of every shipped kernel in every dtype, with packs of one and of several elements, and what each compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import ops
from qwen_mlx.cli import selftest_cases as selftest
from reference.emulator import emulate, standin
from tests.helpers import decoding_calls

Call = tuple[str, Callable[..., object], list[mx.array]]


def calls() -> list[Call]:
    """(kernel, operation, arguments)."""
    rotary = ops.Rotary.plain(8, 1e4)
    result: list[Call] = []
    for dtype in selftest.DTYPES:
        for width in (6, 64):
            x, w = mx.zeros((3, width), dtype), mx.zeros((width,), dtype)
            result += [
                ("rms_norm", lambda x, w: ops.rms_norm(x, w, 1e-6), [x, w]),
                ("add_rms_norm", lambda x, y, w: ops.add_rms_norm(x, y, w, 1e-6), [x, x + 1, w]),
                ("swiglu", ops.swiglu, [x, x + 1]),
                ("swiglu", ops.swiglu, [x, x + 1, w, w + 1]),
                ("swiglu", ops.swiglu_joined, [x, w]),
            ]
        heads, qkv, bias = mx.zeros((2, 3, 2, 8), dtype), mx.zeros((2, 3, 32), dtype), mx.zeros((32,), dtype)
        table, rows = rotary.table(5, 3), rotary.table(np.array([3, 5]), 3)
        result += [
            ("rope", ops.rope, [heads, table]),
            ("qkv_rope", lambda x, t: ops.qkv_rope(x, None, t, 2, 1), [qkv, table]),
            ("qkv_rope", lambda x, b, t: ops.qkv_rope(x, b, t, 2, 1), [qkv, bias, rows]),
        ]
    return result


def names() -> list[str]:
    """A name for each call."""
    return [f"{index}-{name}-{arrays[0].dtype}" for index, (name, _, arrays) in enumerate(calls())]


@contextmanager
def not_run() -> Iterator[list[str]]:
    """The texts of all kernels that are launched within, which give zeros."""
    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch, emulate(), ops.no_grad():
        patch.setattr(standin, "on_text", lambda source: launched.append(source.text))
        patch.setattr(standin.launch, "run", lambda *call: list(map(mx.zeros, *call[6:8])))
        yield launched


@functools.cache
def texts() -> list[str]:
    """The launches of each call."""
    with not_run() as launched:
        for _, call, arrays in calls():
            mx.eval(call(*arrays))
    assert len(launched) == len(calls())
    return launched


@functools.cache
def decoding_texts(dtype: mx.Dtype) -> dict[str, list[str]]:
    """The launches of each call of decoding_calls.py, by its name."""
    result = {}
    for name, call in decoding_calls.calls(dtype).items():
        with not_run() as result[name]:
            call()
    return result
