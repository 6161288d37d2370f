"""Rotary position embeddings on halves: element i turns with element i + head_dim / 2."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import cast

import numpy as np

from ..backend import in_gpu_memory, mx
from .dispatch import (
    MAX_ELEMENTS,
    Kernel,
    described,
    differentiable,
    executor,
    float_bits,
    pack_size,
    require,
    require_float,
    require_like,
    threads,
)

MAX_HALF = 512  # pairs of a head whose cosines and sines a threadgroup holds


@dataclass(frozen=True)
class Rotary:
    """How fast each pair of a head turns, and the factor on cosine and sine.

    inv_freq: head_dim / 2 angles per position in radians, rounded to float32 as transformers holds them.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        require(
            isinstance(self.inv_freq, tuple),
            lambda: f"inv_freq is of type {type(self.inv_freq).__name__}, expected a tuple of numbers.",
        )
        require(
            len(self.inv_freq) > 0 and all(map(math.isfinite, self.inv_freq)),
            lambda: (
                f"Rotary has frequencies {self.inv_freq}, expected one or more finite numbers: theta and scaling "
                "factors must be positive."
            ),
        )
        require(
            1e-30 < self.attention_factor < 1e30,
            lambda: f"attention_factor is {self.attention_factor}, expected a positive number from 1e-30 to 1e30.",
        )

    @classmethod
    def plain(cls, head_dim: int, theta: float, factor: float = 1.0) -> Rotary:
        """theta^(-2i / head_dim), divided by `factor` (linear scaling). Source: Su et al. 2021, eq. 15."""
        _require_positive("factor", factor)
        return cls._rounded(_frequencies(head_dim, theta) / factor)

    @classmethod
    def yarn(
        cls,
        head_dim: int,
        theta: float,
        factor: float,
        original_context: int,
        attention_factor: float | None = None,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
    ) -> Rotary:
        """Slow pairs are interpolated by `factor`, fast ones kept, with a ramp between.

        original_context: the trained context in tokens. attention_factor None is 0.1 ln(factor) + 1.
        Source: Peng et al. 2023, arXiv:2309.00071, section 3.2 and eq. 22; bounds rounded as in transformers.
        """

        _require_positive("factor", factor)
        _require_positive("original_context", original_context)
        _require_positive("beta_fast", beta_fast)
        _require_positive("beta_slow", beta_slow)
        require(theta > 1, lambda: f"theta is {theta}, expected more than 1.")

        def pair_that_turns(times: float) -> float:
            return head_dim * math.log(original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_that_turns(beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(beta_slow)), head_dim - 1)
        slow = np.clip((np.arange(head_dim // 2) - low) / (max(high - low, 0) or 0.001), 0, 1)
        fast = _frequencies(head_dim, theta)
        scale = attention_factor
        if scale is not None:
            _require_positive("attention_factor", scale)
        else:
            scale = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return cls._rounded(fast * (1 - slow) + fast / factor * slow, scale)

    def divided(self, factors: np.ndarray) -> Rotary:
        """The same with each frequency divided by its factor (a GGUF's rope_freqs), (head_dim / 2,)."""
        require(
            factors.shape == (len(self.inv_freq),) and bool((factors > 0).all()),
            lambda: f"factors has shape {factors.shape}, expected {len(self.inv_freq)} positive numbers.",
        )
        return self._rounded(np.array(self.inv_freq) / factors.astype(np.float64), self.attention_factor)

    @classmethod
    def _rounded(cls, inv_freq: np.ndarray, attention_factor: float = 1.0) -> Rotary:
        return cls(tuple(inv_freq.astype(np.float32).tolist()), attention_factor)


def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    require(
        isinstance(head_dim, int) and head_dim > 0 and head_dim % 2 == 0,
        lambda: f"head_dim is {head_dim!r}, expected a positive even number.",
    )
    _require_positive("theta", theta)
    return theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _require_positive(name: str, value: float) -> None:
    require(
        isinstance(value, int | float) and 0 < value < math.inf,
        lambda: f"{name} is {value!r}, expected a positive number.",
    )


_ROPE = Kernel("rope", ("x", "turns", "offset"), ("out",), ("rotary.h", "heads.h"))
_QKV_ROPE = Kernel("qkv_rope", ("qkv", "bias", "turns", "offset"), ("q", "kv"), ("rotary.h", "heads.h"))


def rope(x: mx.array, offset: int | mx.array, rotary: Rotary) -> mx.array:
    """Turns each head of x by its position.

    x: (B, L, H, head_dim), positions offset to offset + L - 1; offset: one for all, or int32 (B,), one a sequence (its
    values are not looked at: that would wait for them).
    Returns x's shape and dtype. Rounding: angles, cosine and sine are exact to 2^-48 (in kernels for 16-bit dtypes to
    2^-33), products are formed in at least float32 and rounded to x.dtype once (transformers rounds cosine, sine and
    both products to x.dtype as well).
    Raises ValueError if shapes or dtypes do not agree.
    """
    require_float("x", x)
    _require_rotary(rotary)
    require(
        x.ndim == 4 and x.shape[-1] == 2 * len(rotary.inv_freq),
        lambda: f"x has shape {x.shape}, expected (B, L, H, {2 * len(rotary.inv_freq)}).",
    )
    _check_offset(offset, x.shape[0], x.shape[1])
    if executor("rope") == "reference" or not _fits(x, rotary):
        return rope_reference(x, offset, rotary)
    position = _position(offset)

    def kernel(x: mx.array) -> mx.array:
        batch, length, heads, _ = x.shape
        return _launch(
            _ROPE, (x, turns_of(rotary), position), rotary, (("HEADS", heads),), batch * length, heads, [x.shape]
        )[0]

    return differentiable(kernel, lambda x: rope_reference(x, offset, rotary), x)


def qkv_rope(
    qkv: mx.array,
    bias: mx.array | None,
    offset: int | mx.array,
    rotary: Rotary,
    n_heads: int,
    n_kv_heads: int,
    join_kv: bool = False,
) -> tuple[mx.array, ...]:
    """Splits a joined projection into q, k and v, adds its bias, and turns q and k by their positions.

    qkv: (B, L, (n_heads + 2 n_kv_heads) head_dim), q's heads first, then k's, then v's; bias: its last axis, or None;
    offset as in rope. Returns q (B, L, n_heads, head_dim), k and v (B, L, n_kv_heads, head_dim); with join_kv q and one
    array (B, L, 2, n_kv_heads, head_dim) of both, for a cache that is written once. Rounding: the sum with the bias is
    rounded to the dtype, then as rope. Raises ValueError if shapes or dtypes do not agree.
    """
    require_float("qkv", qkv)
    _require_rotary(rotary)
    require(
        isinstance(n_heads, int) and isinstance(n_kv_heads, int) and n_heads > 0 and n_kv_heads > 0,
        lambda: f"n_heads is {n_heads} and n_kv_heads {n_kv_heads}, expected positive integers.",
    )
    width = (n_heads + 2 * n_kv_heads) * 2 * len(rotary.inv_freq)
    require(
        qkv.ndim == 3 and qkv.shape[-1] == width,
        lambda: (
            f"qkv has shape {qkv.shape}, expected (B, L, {width}) for {n_heads} + 2 * {n_kv_heads} heads of "
            f"{2 * len(rotary.inv_freq)}."
        ),
    )
    if bias is not None:
        require_like("bias", bias, (width,), qkv.dtype)
    _check_offset(offset, qkv.shape[0], qkv.shape[1])
    arrays = (qkv,) if bias is None else (qkv, bias)

    def fallback(qkv: mx.array, *bias: mx.array) -> tuple[mx.array, mx.array]:
        return _split_and_turn(qkv, *bias, offset=offset, rotary=rotary, n_heads=n_heads, n_kv_heads=n_kv_heads)

    if executor("rope") == "reference" or not _fits(qkv, rotary):
        q, kv = fallback(*arrays)
    else:
        position = _position(offset)

        def kernel(qkv: mx.array, *bias: mx.array) -> tuple[mx.array, ...]:
            batch, length, _ = qkv.shape
            head_dim = 2 * len(rotary.inv_freq)
            inputs = (qkv, *(bias or (qkv,)), turns_of(rotary), position)
            template = (("HEADS", n_heads), ("KV", n_kv_heads), ("BIAS", bool(bias)))
            shapes = [(batch, length, n_heads, head_dim), (batch, length, 2, n_kv_heads, head_dim)]
            heads = n_heads + 2 * n_kv_heads
            return tuple(_launch(_QKV_ROPE, inputs, rotary, template, batch * length, heads, shapes))

        q, kv = differentiable(kernel, fallback, *arrays)
    return (q, kv) if join_kv else (q, kv[:, :, 0], kv[:, :, 1])


def rope_reference(x: mx.array, offset: int | mx.array, rotary: Rotary) -> mx.array:
    """rope in plain MLX: products in float64 on the CPU, else in float32."""
    on_cpu = mx.default_device() == mx.cpu
    wide = mx.float64 if on_cpu else mx.float32
    if isinstance(offset, int):
        cos, sin = _tables(rotary, (offset,), x.shape[1], wide)
    elif on_cpu and (values := _values(offset)) is not None:
        cos, sin = _tables(rotary, values, x.shape[1], wide)
    else:
        cos, sin = _traced_tables(rotary, offset, x.shape[1], wide)
    halves = x.astype(wide).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return (halves * cos + halves[..., ::-1, :] * sin).reshape(x.shape).astype(x.dtype)


def _values(offset: mx.array) -> tuple[int, ...] | None:
    """The values of an array, None where it has none yet: within mx.compile."""
    try:
        return tuple(cast("list[int]", offset.tolist()))
    except (RuntimeError, ValueError):
        return None


def _split_and_turn(
    qkv: mx.array,
    bias: mx.array | None = None,
    *,
    offset: int | mx.array,
    rotary: Rotary,
    n_heads: int,
    n_kv_heads: int,
) -> tuple[mx.array, mx.array]:
    head_dim = 2 * len(rotary.inv_freq)
    heads = (qkv if bias is None else qkv + bias).reshape(*qkv.shape[:2], n_heads + 2 * n_kv_heads, head_dim)
    turned = rope_reference(heads[:, :, : n_heads + n_kv_heads], offset, rotary)
    kv = mx.concatenate([turned[:, :, n_heads:], heads[:, :, n_heads + n_kv_heads :]], axis=2)
    return turned[:, :, :n_heads], kv.reshape(*qkv.shape[:2], 2, n_kv_heads, head_dim)


@functools.lru_cache(maxsize=4)
def _tables(rotary: Rotary, offsets: tuple[int, ...], length: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Cosine, and sine with the sign of each half, (offsets, length, 1, 2, head_dim / 2), for all layers."""
    words = _turns(rotary).astype(np.uint64)
    positions = (np.array(offsets, np.int64)[:, None] + np.arange(length))[:, :, None, None, None]
    # Products of 64-bit integers wrap at whole turns: exact at every position.
    phase = (words[:, 0] << 32 | words[:, 1]) * positions.astype(np.uint64)
    phase += (words[:, 2].astype(np.int64) * positions >> 32).astype(np.uint64)
    angles = phase.view(np.int64) * (2 * math.pi / 2**64)
    cos, sin = (table(angles) * rotary.attention_factor for table in (np.cos, np.sin))
    return (
        mx.array(np.concatenate([cos, cos], axis=-2), dtype),
        mx.array(np.concatenate([-sin, sin], axis=-2), dtype),
    )


def _traced_tables(rotary: Rotary, offset: mx.array, length: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """As _tables, (B or 1, length, 1, 2, head_dim / 2), for offsets that are known only when evaluated."""
    with mx.stream(mx.cpu):
        words = mx.array(_turns(rotary)).astype(mx.int64)
        positions = (offset[:, None] + mx.arange(length)).astype(mx.int64)[:, :, None, None, None]
        phase = (words[:, 0] * 2**32 + words[:, 1]) * positions + (words[:, 2] * positions >> 32)
        # Quarters of a turn, counted from an eighth before each, and the angle from a quarter's middle.
        quarter = (phase + 2**61) >> 62
        x = (phase - quarter * 2**62).astype(mx.float64) * (2 * math.pi / 2**64)
        # Taylor's series: MLX's own cosine has the accuracy of float32 in float64, too.
        cos, sin = (_series(x * x, first) for first in (0, 1))
        sin = sin * x
        swapped = (quarter & 1) == 1
        cos, sin = mx.where(swapped, sin, cos), mx.where(swapped, cos, sin)
        cos = mx.where(((quarter + 1) & 2) == 2, -cos, cos) * rotary.attention_factor
        sin = mx.where((quarter & 2) == 2, -sin, sin) * rotary.attention_factor
        return mx.concatenate([cos, cos], axis=-2).astype(dtype), mx.concatenate([-sin, sin], axis=-2).astype(dtype)


def _series(y: mx.array, first: int) -> mx.array:
    """1 / first! - y / (first + 2)! + y^2 / (first + 4)! - ..., exact to 2^-52 for y up to (pi / 4)^2."""
    total = mx.zeros_like(y)
    for n in range(9, -1, -1):
        total = total * y + (-1) ** n / math.factorial(first + 2 * n)
    return total


@functools.lru_cache(maxsize=8)
def turns_of(rotary: Rotary) -> mx.array:
    """_turns, where kernels read them."""
    return in_gpu_memory(_turns(rotary))


@functools.lru_cache(maxsize=8)
def _turns(rotary: Rotary) -> np.ndarray:
    """Turns a position makes in units of 2^-96, uint32 (head_dim / 2, 3), highest word first; rounded down."""
    # Machin's formula in units of 2^-256: pi / 4 = 4 arctan(1/5) - arctan(1/239).
    pi = 4 * (4 * _arctan_of_inverse(5) - _arctan_of_inverse(239))
    turns = [int(Fraction(f) * 2**96 * 2**256 / (2 * pi)) % 2**96 for f in rotary.inv_freq]
    return np.array([[t >> 64, t >> 32 & 0xFFFFFFFF, t & 0xFFFFFFFF] for t in turns], np.uint32)


def _arctan_of_inverse(n: int) -> int:
    terms = ((-1) ** k * 2**256 // ((2 * k + 1) * n ** (2 * k + 1)) for k in range(120))
    return sum(terms)


@functools.lru_cache(maxsize=8)
def _position_of_int(offset: int) -> mx.array:
    return in_gpu_memory(np.array([offset], np.int32))


def _position(offset: int | mx.array) -> mx.array:
    return _position_of_int(offset) if isinstance(offset, int) else offset


def _require_rotary(rotary: Rotary) -> None:
    require(isinstance(rotary, Rotary), lambda: f"rotary is of type {type(rotary).__name__}, expected a Rotary.")


def _check_offset(offset: int | mx.array, batch: int, length: int) -> None:
    if isinstance(offset, int) and not isinstance(offset, bool):
        last = 2**31 - max(length, 1)
        require(0 <= offset <= last, lambda: f"offset is {offset}, expected 0 to {last} for {length} positions.")
        return
    require(
        isinstance(offset, mx.array) and offset.shape in ((batch,), (1,)) and offset.dtype == mx.int32,
        lambda: f"offset {described(offset)}, expected an int, or int32 of shape ({batch},) or (1,).",
    )


def _fits(x: mx.array, rotary: Rotary) -> bool:
    return 0 < x.size <= MAX_ELEMENTS and len(rotary.inv_freq) <= MAX_HALF


def _launch(
    kernel: Kernel,
    inputs: tuple[mx.array, ...],
    rotary: Rotary,
    template: tuple[tuple[str, object], ...],
    tokens: int,
    heads: int,
    shapes: list[tuple[int, ...]],
) -> list[mx.array]:
    constants, pack = _plan(rotary, inputs[0].dtype)
    # Small threadgroups where there are many tokens: while one computes its angles, others move theirs.
    n_threads = threads(heads * len(rotary.inv_freq) // pack, 96 if tokens >= 1024 else 256)
    template = (*template, *constants, ("THREADS", n_threads))
    return kernel(inputs, template, (tokens * n_threads, 1, 1), (n_threads, 1, 1), shapes)


@functools.lru_cache(maxsize=16)
def _plan(rotary: Rotary, dtype: mx.Dtype) -> tuple[tuple[tuple[str, int], ...], int]:
    """Template values, and elements a pack."""
    half = len(rotary.inv_freq)
    pack = pack_size(half, dtype)
    return (("HALF", half), ("N", pack), *scale_template(rotary)), pack


def scale_template(rotary: Rotary) -> tuple[tuple[str, int], ...]:
    """The attention factor as the kernels' template values."""
    # Rounded down, so that the rest is positive as well: the sign of a template value would end up in a kernel's name.
    high = np.float32(rotary.attention_factor)
    if float(high) > rotary.attention_factor:  # float: numpy would round the factor before it compares
        high = np.nextafter(high, np.float32(0))
    return (("SCALE", float_bits(float(high))), ("SCALE_LOW", float_bits(rotary.attention_factor - float(high))))
