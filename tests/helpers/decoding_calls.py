"""Small calls of every kernel that decoding one token launches, for the lint and for seeded defects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

from qwen_mlx import ops
from qwen_mlx.cli.selftest_decoding import EPS, FORMATS, matrix
from qwen_mlx.ops import dispatch
from reference.emulator.build import HERE

# NVIDIA's instructions, and what they mean in Metal.
INSTRUCTIONS = "nvidia/instructions.h"
EMULATED = '#line 1 "nvidia_instructions.h"\n' + (HERE / "shim/nvidia_instructions.h").read_text()
TILED = ("affine4", "q4_k", "q6_k")


@contextmanager
def tiles() -> Iterator[None]:
    """Within it products are made of tiles wherever kernels run, as on NVIDIA's GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["qwen_mlx.ops.matvec"], "TILED_ON", ("metal", "cuda"))
        patch.setattr(sys.modules["qwen_mlx.ops.matmul"], "ON", ("metal", "cuda"))
        patch.setattr(sys.modules["qwen_mlx.ops.decode_attention"], "TILED_ON", ("metal", "cuda"))
        text = dispatch.source_text
        patch.setattr(dispatch, "source_text", lambda file: EMULATED if file == INSTRUCTIONS else text(file))
        dispatch._compiled.cache_clear()
        yield
    dispatch._compiled.cache_clear()


def as_tiles(call: Callable[[], list[mx.array]]) -> Callable[[], list[mx.array]]:
    """The call within `tiles`."""

    def tiled() -> list[mx.array]:
        with tiles():
            return call()

    return tiled


def calls(dtype: mx.Dtype) -> dict[str, Callable[[], list[mx.array]]]:
    """name: call; among them rows that fill no whole unit, splits, heads in groups, a window, a cache not full."""
    mx.random.seed(11)

    def random(*shape: int) -> mx.array:
        return mx.random.normal(shape).astype(dtype)

    logits = random(4, 1000)  # the largest in a part's middle, twice, in the last part; and one that is not finite
    logits[2] = -1 - mx.abs(logits[2])
    for row, column, value in ((0, 300, 90), (1, 20, 90), (1, 21, 90), (2, 999, -0.5), (3, 500, float("inf"))):
        logits[row, column] = value

    def twice(array: mx.array) -> mx.array:
        return mx.concatenate([array, array[:, :, ::-1] * 0.5])

    heads, kv_heads, head_dim, columns = 3, 1, 16, 512
    rows = (heads + 2 * kv_heads) * head_dim
    x, weight, bias, residual = random(1, 1, columns), random(columns), random(rows), random(37)
    recent, position = random(1, 2 * kv_heads, 4, head_dim), mx.array([100_000, 99_998], mx.int32)
    table = ops.Rotary.plain(head_dim, 1e6).table(100_000, 1)[0, 0]
    q, kv, new = random(1, 4, 1, 64), random(1, 4, 256, 64), random(1, 4, 16, 64)
    long, seen = random(1, 4, 2304, 64), mx.array([45, 40], mx.int32)
    wide, first, w = random(1, 1, 8192), mx.array([17, 3], mx.int32), random(37, 224)
    found: dict[str, Callable[[], list[mx.array]]] = {
        "attend": lambda: [ops.decode_attention(q, kv, new, seen, 0.125, 42)],
        "attend_split": lambda: [ops.decode_attention(q, long, new, seen, 0.125)],
        "attend rows": lambda: [ops.decode_attention(*(twice(a) for a in (q, kv, new)), seen, 0.125, None, first)],
        "attend_split rows": lambda: [
            ops.decode_attention(*(twice(a) for a in (q, long, new)), seen, 0.125, None, first)
        ],
        "best_token": lambda: [ops.best_token(logits)],
        "matvec dense, split": lambda: [ops.matvec(wide, matrix("dense", 21, 8192, dtype))],
    }
    mixed = [matrix("affine5", rows - head_dim, columns, dtype), matrix("q6_k", head_dim, columns, dtype)]
    found["matvec_qkv mixed"] = lambda: list(
        ops.matvec_qkv(x, mixed, bias, (weight, EPS), table, recent, position, heads)
    )
    for form in FORMATS:
        odd, qkv, ffn = (matrix(form, n, columns, dtype) for n in (37, rows, 38))
        found |= {
            f"matvec {form}": lambda odd=odd: [ops.matvec(x, odd, (weight, EPS), residual)],
            f"matvec_swiglu {form}": lambda ffn=ffn: [ops.matvec_swiglu(x, ffn, (weight, EPS))],
            f"matvec_qkv {form}": lambda qkv=qkv: list(
                ops.matvec_qkv(x, [qkv], bias, (weight, EPS), table, recent, position, heads)
            ),
        }
        if form != "dense":
            found[f"unpack {form}"] = lambda odd=odd: [ops.unpack(odd, dtype)]
            found[f"unpack_rows {form}"] = lambda odd=odd: [ops.unpack(odd, dtype, mx.array([[36, 0], [5, 5]]))]
    if dtype != mx.float32:
        few, many, wide_rows = (
            random(3, 1, 160),
            random(4, 5, 224),
            random(9, 768),
        )  # an odd number of steps; three tiles of rows, one not full
        found["matmul"] = as_tiles(lambda: [ops.matmul(few, w[:, :160])])
        found["matmul, 20 rows"] = as_tiles(lambda: [ops.matmul(many, w)])
        found["attend_split, tiles"] = as_tiles(found["attend_split"])
        found["attend_split rows, tiles"] = as_tiles(found["attend_split rows"])
        for form in ("q4_k", "q6_k"):  # 3 blocks, in more than one part
            odd = matrix(form, 37, 768, dtype)
            found[f"multiply {form}"] = as_tiles(lambda odd=odd: [ops.multiply(wide_rows, odd)])
        ragged = matrix("affine4", 37, 224, dtype)  # a block that ends early
        found["matvec affine4, ragged, tiles"] = as_tiles(lambda: [ops.matvec(x[..., :224], ragged)])
        for form in TILED:  # two stages a simdgroup, and a vector that is not normed there
            tall = matrix(form, 21, 4096, dtype)
            found[f"matvec {form}, long, tiles"] = as_tiles(lambda tall=tall: [ops.matvec(wide[..., :4096], tall)])
        both = [matrix("q4_k", rows - head_dim, columns, dtype), matrix("q6_k", head_dim, columns, dtype)]
        call = lambda: list(ops.matvec_qkv(x, both, bias, (weight, EPS), table, recent, position, heads))  # noqa: E731
        found["matvec_qkv q4_k and q6_k, tiles"] = as_tiles(call)
        for name in [f"{kind} {form}" for kind in ("matvec", "matvec_swiglu") for form in TILED]:
            found[f"{name}, tiles"] = as_tiles(found[name])
    return found
