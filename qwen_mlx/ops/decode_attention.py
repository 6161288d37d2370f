"""Attention of one token of each row on a cache as it lies: a long buffer, and a short one of the newest tokens."""

from __future__ import annotations

from ..backend import mx
from . import cpu
from .attention import attention
from .dispatch import (
    Kernel,
    executor,
    float_bits,
    on_cpu,
    on_gpu,
    require,
    require_float,
    require_like,
    require_position,
)

# Tokens of room that one threadgroup a query head attends to. Beyond, each of several takes a part, for several heads
# that share a key/value head.
SHORT = 2048
SPLIT = 64
MOST_SPLITS = 128  # of all key/value heads together
# On NVIDIA tensor cores compute a split of up to TILE_ROWS heads that share keys and values (nvidia/attention_tiles.h),
# which is the faster way from TILE_SHORT tokens of room on, and for MANY_HEADS.
TILED_ON = ("cuda",)
TILE_ROWS, TILE_THREADS, TILE_SHORT, MOST_TILE_SPLITS = 8, 128, 512, 256
TILE_BYTES = 4096  # of keys that a simdgroup reads at once
THREADS = {"cuda": 512, "metal": 256}  # for a short cache
DEPTH = {"cuda": 4, "metal": 2}  # rows that a lane loads at once
# Query heads of all rows, more than an H200's multiprocessors, each of which holds 512 threads.
MANY_HEADS, MANY_THREADS = 132, 256
SPLIT_THREADS = 256  # each of which holds a query of GROUP heads in registers
# Heads that share keys and values read them once. Apple's GPUs have 128 registers for a thread, where more than two
# heads would spill, and read them again from their cache.
GROUP = {"cuda": 64, "metal": 2}
COMBINE_THREADS = 256


def _kernel(name: str, outputs: tuple[str, ...], ragged: bool, tiled: bool = False) -> Kernel:
    inputs = ("q", "kv", "recent_kv", "position") + ("first",) * ragged
    definitions = () if ragged else (("first", "position"),)  # named in the text, never read
    headers: tuple[str, ...] = ("decode_attention.h",)
    if tiled:
        name = f"nvidia/{name}"
        headers = ("nvidia/instructions.h", "rows.h", *headers, "nvidia/attention_tiles.h")
    return Kernel(name, inputs, outputs, headers, "_".join(["rows"] * ragged + ["tiles"] * tiled), definitions)


_SHORT = {ragged: _kernel("decode_attention", ("out",), ragged) for ragged in (False, True)}
_LONG = {ragged: _kernel("decode_attention_split", ("sums", "stats"), ragged) for ragged in (False, True)}
_TILES = {ragged: _kernel("decode_attention_split", ("sums", "stats"), ragged, tiled=True) for ragged in (False, True)}
_COMBINE = Kernel("combine", ("sums", "stats"), ("out",))


def decode_attention(
    q: mx.array,
    kv: mx.array,
    recent_kv: mx.array,
    position: mx.array,
    scale: float,
    window: int | None = None,
    first: mx.array | None = None,
) -> mx.array:
    """softmax(scale q k^T) v for one token of each of B rows, each group of query heads on its key/value head.

    q: (B, n_heads, 1, D); kv: (B, 2 n_kv_heads, room, D), keys first, of which position[1] tokens count; recent_kv:
    (B, 2 n_kv_heads, tokens, D), those after them up to position[0]; position: int32 (2,) or longer, whose values are
    not looked at, which would wait for them; window: the number of newest keys that are seen, None for all; first:
    int32 (B,), the first token that each row sees, None for all. Returns q's shape and dtype. Rounding: scores and
    softmax in float32, the result rounded once. Raises ValueError if shapes or dtypes do not agree.
    """
    require_float("q", q)
    require(
        q.ndim == 4 and q.shape[2] == 1 and q.shape[0] > 0,
        lambda: f"q has shape {q.shape}, expected (B, n_heads, 1, D).",
    )
    rows, n_heads, _, head_dim = q.shape
    require_like("kv", kv, (rows, "2 n_kv_heads", "room", head_dim), q.dtype)
    n_kv_heads, room = kv.shape[1] // 2, kv.shape[2]
    require(
        kv.shape[1] % 2 == 0 and n_kv_heads > 0 and n_heads % n_kv_heads == 0,
        lambda: f"kv has shape {kv.shape}, expected keys and values of one head or more that divide {n_heads}.",
    )
    require_like("recent_kv", recent_kv, (rows, 2 * n_kv_heads, "tokens", head_dim), q.dtype)
    require_position(position)
    require(window is None or window > 0, lambda: f"window is {window}, expected 1 or more, or None for all.")
    if first is not None:
        require_like("first", first, (rows,), mx.int32)
    kind = executor("attend")
    if on_cpu("attend", q.dtype) and head_dim % 16 == 0:
        return cpu.decode_attention(q, kv, recent_kv, position, scale, window, first)
    if not on_gpu("attend") or head_dim * q.dtype.size not in (16, 32, 64, 128, 256, 512):
        return decode_attention_fallback(q, kv, recent_kv, position, scale, window, first)
    ragged = first is not None
    inputs = [array for array in (q, kv, recent_kv, position, first) if array is not None]
    ratio = n_heads // n_kv_heads
    template: list[tuple[str, object]] = [("KV", n_kv_heads), ("RATIO", ratio), ("D", head_dim)]
    template += [("WINDOW", window or 0), ("SCALE", float_bits(scale)), ("RAGGED", ragged)]
    depth = ("DEPTH", DEPTH[kind])
    tiled = kind in TILED_ON and q.dtype != mx.float32 and head_dim in (64, 128) and ratio <= TILE_ROWS
    if room <= SHORT and not (tiled and (room > TILE_SHORT or rows * n_heads > MANY_HEADS)):
        n_threads = THREADS[kind] if rows * n_heads <= MANY_HEADS else MANY_THREADS
        template, grid = [*template, depth, ("THREADS", n_threads)], (n_threads, rows * n_heads, 1)
        return _SHORT[ragged](inputs, template, grid, (n_threads, 1, 1), [q.shape])[0]
    if tiled:
        launch, n_threads, group = _TILES[ragged], TILE_THREADS, ratio
        least, most = n_threads // 32 * TILE_BYTES // (2 * head_dim), MOST_TILE_SPLITS
    else:
        launch, n_threads, least, most = _LONG[ragged], SPLIT_THREADS, SPLIT, MOST_SPLITS
        group = next(size for size in range(min(ratio, GROUP[kind]), 0, -1) if ratio % size == 0)
        template += [depth, ("GROUP", group)]
    splits = min(max(1, most // (rows * n_kv_heads)), -(-room // least))
    splits = 1 << splits.bit_length() - 1  # few values: each is compiled
    template += [("THREADS", n_threads), ("SPLITS", splits)]
    shapes = [(rows, n_heads, splits, head_dim), (rows, n_heads, splits, 2)]
    grid = (splits * n_threads, rows * n_heads // group, 1)
    parts = launch(inputs, template, grid, (n_threads, 1, 1), shapes, mx.float32)
    template = [("T", q.dtype), ("D", head_dim), ("SPLITS", splits), ("THREADS", COMBINE_THREADS)]
    grid = (COMBINE_THREADS, rows * n_heads, 1)
    return _COMBINE(parts, template, grid, (COMBINE_THREADS, 1, 1), [q.shape], q.dtype)[0]


def decode_attention_fallback(
    q: mx.array,
    kv: mx.array,
    recent_kv: mx.array,
    position: mx.array,
    scale: float,
    window: int | None = None,
    first: mx.array | None = None,
) -> mx.array:
    """decode_attention in MLX's own operations."""
    n_kv_heads, newest, filled = kv.shape[1] // 2, position[0], position[1]
    slots, recent = mx.arange(kv.shape[2]), mx.arange(recent_kv.shape[2])
    # A token's distance from the newest one; slots that are not filled lie after it.
    distance = mx.concatenate([mx.where(slots < filled, newest - slots, -1), newest - filled - recent])
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if first is not None:
        seen = seen & (mx.concatenate([slots, filled + recent]) >= first[:, None, None, None])
    both = mx.concatenate([kv, recent_kv], axis=2).astype(mx.float32)
    queries = q.swapaxes(1, 2).astype(mx.float32)
    out = attention(queries, both[:, :n_kv_heads], both[:, n_kv_heads:], scale, seen[None] if seen.ndim == 1 else seen)
    return out.swapaxes(1, 2).astype(q.dtype)
