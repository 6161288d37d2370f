"""Rotary position embeddings on halves: element i forms a pair with element i + head_dim / 2."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..backend import in_gpu_memory, mx
from . import cpu
from .dispatch import (
    MAX_ELEMENTS,
    Kernel,
    described,
    differentiable,
    on_cpu,
    on_gpu,
    pack_size,
    require,
    require_float,
    require_like,
    threads,
)

LONGEST_TABLE = 1 << 17  # positions whose table is kept: 64 MB for heads of 128


@dataclass(frozen=True)
class Rotary:
    """The angle by which each pair of a head rotates per position, and the factor on cosine and sine.

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

    def table(self, offset: int | np.ndarray, length: int) -> mx.array:
        """Cosines [..., 0] and sines [..., 1] of `length` positions, (1 or B, length, head_dim / 2, 2) in float32.

        offset: the first position, or integers (B,), one for each sequence; they may be negative (padding). Rounding:
        formed in float64 and rounded to float32 once. An angle, an integer times a float32, is exact to position 2^29,
        and beyond it to 2^-23 radians. Raises ValueError for an offset that is no integer or out of range.
        """
        if type(offset) is int and 0 <= offset <= LONGEST_TABLE - length:
            return self._rows(offset + length)[offset : offset + length][None]
        positions = _first_positions(offset, length)[:, None] + np.arange(length)
        if positions.max(initial=0) >= LONGEST_TABLE or positions.min(initial=0) < 0:
            return in_gpu_memory(self._computed(positions))
        return self._rows(int(positions.max(initial=0)) + 1)[mx.array(positions)]

    def _rows(self, count: int) -> mx.array:
        """The table of positions 0 to count - 1 or more, (positions, head_dim / 2, 2). It is kept on the device and
        doubles when it is too short, so that a token costs neither a cosine nor a copy.
        """
        if not self._tables or len(self._tables[0]) < count:
            size = max(1024, 1 << (count - 1).bit_length())
            self._tables[:] = [in_gpu_memory(self._computed(np.arange(size)))]
        return self._tables[0]

    @functools.cached_property
    def _tables(self) -> list[mx.array]:
        return []  # the longest so far

    def _computed(self, positions: np.ndarray) -> np.ndarray:
        angles = positions[..., None] * self._inv_freq
        table = np.empty((*angles.shape, 2), np.float32)
        table[..., 0] = np.cos(angles) * self.attention_factor
        table[..., 1] = np.sin(angles) * self.attention_factor
        return table

    @functools.cached_property
    def _inv_freq(self) -> np.ndarray:
        return np.array(self.inv_freq)

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


_ROPE = Kernel("rope", ("x", "table"), ("out",), ("rotary.h", "heads.h"))
_QKV_ROPE = Kernel("qkv_rope", ("qkv", "bias", "table"), ("q", "kv"), ("rotary.h", "heads.h"))


def _first_positions(offset: int | np.ndarray, length: int) -> np.ndarray:
    """offset as (1,) or (B,). Raises ValueError unless all positions have 32 bits."""
    first, last = np.atleast_1d(offset), 2**31 - max(length, 1)
    require(
        isinstance(offset, int | np.ndarray) and first.ndim == 1 and first.dtype.kind == "i",
        lambda: f"offset is {offset!r}, expected an int, or a NumPy array (B,) of integers.",
    )
    least = 0 if isinstance(offset, int) else -last
    require(
        bool(((first >= least) & (first <= last)).all()),
        lambda: f"offset is {offset}, expected {least} to {last} for {length} positions.",
    )
    return first


def rope(x: mx.array, table: mx.array) -> mx.array:
    """Rotates each head of x by its position: (a, b) becomes (a cos - b sin, b cos + a sin).

    x: (B, L, H, head_dim); table: Rotary.table's, (1 or B, L, head_dim / 2, 2). Returns x's shape and dtype.
    Rounding: products and sum in float32, rounded to x.dtype once (transformers rounds cosine, sine and both products
    to x.dtype as well). Up to position 1,000,000 the error is at most 2 ulp(x.dtype, sqrt(a^2 + b^2)): it is judged
    against the pair's length, which attention sees, because one element alone may cancel to almost nothing.
    Raises ValueError if shapes or dtypes do not agree. Source: Su et al. 2021, arXiv:2104.09864.
    """
    require_float("x", x)
    require(x.ndim == 4, lambda: f"x has shape {x.shape}, expected (B, L, H, head_dim).")
    half = _half(table, x)
    require(x.shape[-1] == 2 * half, lambda: f"x has shape {x.shape}, expected (B, L, H, {2 * half}).")
    if not _on_kernel(x):
        return rope_fallback(x, table)

    def kernel(x: mx.array) -> mx.array:
        return _launch(_ROPE, (x, table), (("HEADS", x.shape[2]),), [x.shape])[0]

    return differentiable(kernel, lambda x: rope_fallback(x, table), x)


def qkv_rope(
    qkv: mx.array, bias: mx.array | None, table: mx.array, n_heads: int, n_kv_heads: int
) -> tuple[mx.array, mx.array]:
    """Splits a joined projection into q, k and v, adds its bias, and rotates q and k by their positions.

    qkv: (B, L, (n_heads + 2 n_kv_heads) head_dim), q's heads first, then k's, then v's; bias: its last axis, or None;
    table as in rope. Returns q (B, L, n_heads, head_dim), and k and v in one array (B, L, 2, n_kv_heads, head_dim), for
    a cache that is written once. Rounding: the sum with the bias is rounded to the dtype, then as rope. Raises
    ValueError if shapes or dtypes do not agree.
    """
    require_float("qkv", qkv)
    require(
        isinstance(n_heads, int) and isinstance(n_kv_heads, int) and n_heads > 0 and n_kv_heads > 0,
        lambda: f"n_heads is {n_heads} and n_kv_heads {n_kv_heads}, expected positive integers.",
    )
    require(qkv.ndim == 3, lambda: f"qkv has shape {qkv.shape}, expected (B, L, all heads' elements).")
    head_dim = 2 * _half(table, qkv)
    width = (n_heads + 2 * n_kv_heads) * head_dim
    require(
        qkv.shape[-1] == width,
        lambda: (
            f"qkv has shape {qkv.shape}, expected (B, L, {width}) for {n_heads} + 2 * {n_kv_heads} heads of {head_dim}."
        ),
    )
    if bias is not None:
        require_like("bias", bias, (width,), qkv.dtype)
    batch, length, _ = qkv.shape
    arrays = (qkv,) if bias is None else (qkv, bias)

    def fallback(qkv: mx.array, *bias: mx.array) -> tuple[mx.array, mx.array]:
        heads = (qkv + bias[0] if bias else qkv).reshape(batch, length, width // head_dim, head_dim)
        rotated = rope_fallback(heads[:, :, : n_heads + n_kv_heads], table)
        kv = mx.concatenate([rotated[:, :, n_heads:], heads[:, :, n_heads + n_kv_heads :]], axis=2)
        return rotated[:, :, :n_heads], kv.reshape(batch, length, 2, n_kv_heads, head_dim)

    if qkv.size and on_cpu("rope", qkv.dtype):
        return cpu.qkv_rope(qkv, bias, table, n_heads, n_kv_heads)
    if not _on_kernel(qkv):
        return fallback(*arrays)

    def kernel(qkv: mx.array, *bias: mx.array) -> tuple[mx.array, mx.array]:
        template = (("HEADS", n_heads), ("KV", n_kv_heads), ("BIAS", bool(bias)))
        shapes = [(batch, length, n_heads, head_dim), (batch, length, 2, n_kv_heads, head_dim)]
        q, kv = _launch(_QKV_ROPE, (qkv, *(bias or (qkv,)), table), template, shapes)
        return q, kv

    return differentiable(kernel, fallback, *arrays)


def rope_fallback(x: mx.array, table: mx.array) -> mx.array:
    """rope in plain MLX; on a GPU in one launch, and one that joins the halves."""
    if mx.default_device() != mx.cpu:
        return mx.concatenate(_rotated_halves(x, table), axis=-1)
    cos, sin = (table[:, :, None, None, :, i] for i in (0, 1))
    halves = x.astype(mx.float32).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    signed_sin = sin * mx.array([[-1.0], [1.0]])
    return (halves * cos + halves[..., ::-1, :] * signed_sin).reshape(x.shape).astype(x.dtype)


@mx.compile
def _rotated_halves(x: mx.array, table: mx.array) -> list[mx.array]:
    cos, sin = (table[:, :, None, :, i] for i in (0, 1))
    a, b = mx.split(x.astype(mx.float32), 2, axis=-1)
    return [(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)]


def _half(table: mx.array, x: mx.array) -> int:
    """Pairs of a head. Raises ValueError unless table is one for x's (B, L)."""
    batch, length = x.shape[:2]
    require(
        isinstance(table, mx.array)
        and (table.ndim == 4 and table.shape[:2] in ((1, length), (batch, length)))
        and (table.shape[2] > 0 and table.shape[3] == 2 and table.dtype == mx.float32),
        lambda: f"table {described(table)}, expected (1 or {batch}, {length}, head_dim / 2, 2) and {mx.float32}.",
    )
    return table.shape[2]


def _on_kernel(x: mx.array) -> bool:
    return on_gpu("rope") and 0 < x.size <= MAX_ELEMENTS


def _launch(
    kernel: Kernel,
    inputs: tuple[mx.array, ...],
    template: tuple[tuple[str, object], ...],
    shapes: list[tuple[int, ...]],
) -> list[mx.array]:
    """Launches a thread for N pairs of a head."""
    x, half = inputs[0], inputs[-1].shape[2]
    pack = pack_size(half, x.dtype)
    packs = x.size // (2 * pack)
    n_threads = threads(packs, 256)
    template = (*template, ("HALF", half), ("N", pack))
    return kernel(inputs, template, (-(-packs // n_threads) * n_threads, 1, 1), (n_threads, 1, 1), shapes)
