"""The cases of a trial: every kernel that one model launches, on data whose results are exact, and on random data.

Exact data are small integers, norms of signs, quarter turns and scores of 0 or minus infinity: each sum is exact in
float32 in whatever order it is formed, so that a kernel has to give plain MLX's bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...backend import mx
from ...gguf.packing import Packing
from .. import dispatch
from ..attention import attention
from ..best_token import best_token, or_not_finite
from ..decode_attention import SHORT, decode_attention
from ..matmul import ON as MATMUL_ON
from ..matmul import matmul
from ..matrix import BLOCKS, Matrix
from ..matvec import Norm, matvec, matvec_qkv, matvec_swiglu
from ..rms_norm import add_rms_norm, rms_norm
from ..rope import qkv_rope
from ..swiglu import swiglu_joined
from ..unpack import raw_matrix, unpack, unpack_fallback

MOST_ELEMENTS = 70_000_000  # of a matrix; more rows repeat what these show
LIMIT = 2.0  # units in the last place of the largest element, on random data: the self-test's
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

Arrays = Sequence[mx.array]
Call = Callable[..., Arrays]


@dataclass(frozen=True)
class MatrixSpec:
    """A matrix's shape and packing; `scales` is the dtype of an affine one's scales."""

    kind: str
    bits: int
    group_size: int
    rows: int
    columns: int
    scales: str = ""

    @property
    def packing(self) -> Packing:
        return Packing(self.kind, self.bits, self.group_size)


@dataclass(frozen=True)
class Product:
    """Something that reads matrices for a token: "matvec" with a residual, "matvec_normed" after a norm,
    "matvec_swiglu", "matvec_qkv", or "rows", an embedding's. count: how often a token needs it."""

    name: str
    matrices: tuple[MatrixSpec, ...]
    count: int

    @property
    def kernel(self) -> str:
        """The operation's name in tunings.key."""
        return "matvec" if self.name == "matvec_normed" else self.name

    def __str__(self) -> str:
        packings = " and ".join(str(m.packing) for m in self.matrices)
        return f"{self.name} {packings} {sum(m.rows for m in self.matrices)}x{self.matrices[0].columns}"


@dataclass(frozen=True)
class Spec:
    """Everything that the kernels of a model depend on. windows: numbers of keys that its layers see, 0 for all."""

    dtype: str
    eps: float
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    width: int
    vocab_size: int
    recent: int
    windows: tuple[int, ...]
    products: tuple[Product, ...]

    def as_json(self) -> dict[str, Any]:
        """As JSON would give it back."""
        data = asdict(self)
        data["windows"] = list(self.windows)
        data["products"] = [{**asdict(p), "matrices": [asdict(m) for m in p.matrices]} for p in self.products]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spec:
        """The spec that as_json described. Raises TypeError or KeyError for anything else."""
        products = tuple(
            Product(p["name"], tuple(MatrixSpec(**m) for m in p["matrices"]), p["count"]) for p in data["products"]
        )
        return cls(**{**data, "windows": tuple(data["windows"]), "products": products})


@dataclass(frozen=True)
class Case:
    """An operation of one of dispatch.PARTS.

    make(data): its inputs; kernel: the operation; plain: what the model computes instead without its kernel, to
    compare times; count: how often a token needs it, 0 where it belongs to prompts; exact: whether exact data give
    exact results (a norm's factor rounds to 1 in 16 bits only).
    """

    part: str
    name: str
    make: Callable[[Data], tuple[Any, ...]]
    kernel: Call
    plain: Call
    count: int = 0
    exact: bool = True
    product: Product | None = None


class Data:
    """Values of one seed, exact or random."""

    def __init__(self, spec: Spec, exact: bool, seed: int) -> None:
        self.exact, self._dtype = exact, DTYPES[spec.dtype]
        self._rng = np.random.default_rng(seed)

    def array(self, values: np.ndarray, dtype: mx.Dtype | None = None) -> mx.array:
        return mx.array(values.astype(np.float32, copy=False)).astype(dtype or self._dtype)

    def floats(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Integers from -2 to 2, or normal deviates."""
        if self.exact:
            return self.array(self._rng.integers(-2, 3, shape, np.int8))
        return self.array(self._rng.standard_normal(shape, np.float32) * np.float32(scale))

    def among(self, values: Sequence[float], *shape: int, scale: float = 1.0) -> mx.array:
        """These values at random, or normal deviates."""
        chosen = self._rng.choice(np.array(values), shape)
        return self.array(chosen if self.exact else self._rng.standard_normal(shape, np.float32) * scale)

    def signs(self, *shape: int) -> mx.array:
        return self.among((-1, 1), *shape)

    def norm(self, width: int, eps: float, factor: int = 1) -> Norm:
        weight = self._rng.integers(1, 3, width) if self.exact else 1 + 0.1 * self._rng.standard_normal(width)
        return self.array(weight * factor), eps

    def table(self, positions: int, pairs: int) -> mx.array:
        """Cosines and sines (positions, pairs, 2): of quarter turns, or of any angles."""
        angles = self._rng.uniform(0, 2 * np.pi, (positions, pairs))
        if self.exact:
            angles = np.round(angles * 2 / np.pi) * np.pi / 2
        turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        return mx.array((np.round(turns) if self.exact else turns).astype(np.float32))

    def words(self, *shape: int) -> np.ndarray:
        return self._rng.integers(0, 2**32, shape, dtype=np.uint32)

    def factors(self, *shape: int, scale: float) -> np.ndarray:
        """float32: powers of two, or deviates about `scale`."""
        if self.exact:
            return self._rng.choice(np.array([0.5, 1.0, 2.0], np.float32), shape)
        return (scale * (1 + 0.3 * self._rng.standard_normal(shape))).astype(np.float32)

    def matrix(self, spec: MatrixSpec) -> Matrix:
        """A matrix of this kind, of at most MOST_ELEMENTS."""
        rows, columns = rows_tried(spec), spec.columns
        if spec.kind == "dense":
            return Matrix(spec.packing, rows, columns, (self.floats(rows, columns, scale=0.05),))
        if spec.kind == "affine":
            groups, middle = (rows, columns // spec.group_size), float(1 << spec.bits - 1)
            scales = self.factors(*groups, scale=0.3 / middle)
            codes = mx.array(self.words(rows, columns * spec.bits // 32))
            dtype = DTYPES[spec.scales]
            return Matrix(
                spec.packing, rows, columns, (codes, self.array(scales, dtype), self.array(-middle * scales, dtype))
            )
        return raw_matrix(self._blocks(spec.kind, rows, columns // 256).reshape(rows, -1), spec.kind)

    def _blocks(self, kind: str, rows: int, blocks: int) -> np.ndarray:
        """GGUF's bytes, whose elements are below 2048 where they are exact."""
        size, at = {"q4_k": (144, (0, 2)), "q6_k": (210, (208,))}[kind]
        raw = self._rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
        if kind == "q6_k" and self.exact:
            raw[..., 192:208] &= 31
        for place, scale in zip(at, (1e-4, 7e-4)):
            factors = self.factors(rows, blocks, 1, scale=scale).astype(np.float16)
            raw[..., place : place + 2] = (np.ones_like(factors) if self.exact else factors).view(np.uint8)
        return raw


def rows_tried(spec: MatrixSpec) -> int:
    """Rows that the trial multiplies; an even number, as gate's and up's are."""
    return spec.rows if spec.rows * spec.columns <= MOST_ELEMENTS else MOST_ELEMENTS // spec.columns // 256 * 256


def cases(spec: Spec) -> Iterator[Case]:
    """All cases of a model; those on which others build come first."""
    yield from _unpack_cases(spec)
    yield from _prompt_cases(spec)
    yield from _batch_cases(spec)
    yield from _product_cases(spec)
    yield from _attention_cases(spec)


def _unpack_cases(spec: Spec) -> Iterator[Case]:
    matrices = [m for p in spec.products if p.name != "rows" for m in p.matrices if m.kind in BLOCKS]
    for kind in dict.fromkeys(m.packing for m in matrices):
        widest = max((m for m in matrices if m.packing == kind), key=lambda m: m.columns)
        yield _unpack(spec, f"unpack {kind}", replace(widest, rows=min(widest.rows, 64)))
    for product in (p for p in spec.products if p.name == "rows"):
        matrix = replace(product.matrices[0], rows=min(product.matrices[0].rows, 4096))
        ids = mx.array([[matrix.rows - 1], [0], [matrix.rows // 2]])
        yield _unpack(spec, f"unpack rows {matrix.packing}", matrix, ids)


def _unpack(spec: Spec, name: str, matrix: MatrixSpec, ids: mx.array | None = None) -> Case:
    dtype = DTYPES[spec.dtype]
    return Case(
        "unpack",
        name,
        lambda data: (data.matrix(matrix),),
        lambda m: [unpack(m, dtype, ids)],
        lambda m: [unpack_fallback(m, dtype, ids)],
        count=0 if ids is None else 1,
    )


def _prompt_cases(spec: Spec) -> Iterator[Case]:
    """Kernels that read a prompt, and the choice of a token."""
    hidden, eps, in_16_bits = spec.hidden_size, spec.eps, spec.dtype != "float32"
    heads, kv_heads, head_dim = spec.n_heads, spec.n_kv_heads, spec.head_dim
    width = (heads + 2 * kv_heads) * head_dim

    def added(data: Data) -> tuple[mx.array, ...]:
        x, y = data.signs(5, hidden), data.floats(5, hidden)
        return x - y, y, data.norm(hidden, eps)[0]

    def plain_rope(x: mx.array, bias: mx.array, _: mx.array) -> Arrays:
        q = _plain_rope((x + bias).reshape(1, 7, -1, head_dim).swapaxes(1, 2), head_dim)
        return [q[:, :heads].swapaxes(1, 2), q[:, heads:].swapaxes(1, 2)]

    yield Case(
        "rms_norm",
        "rms_norm",
        lambda data: (data.signs(5, hidden), data.norm(hidden, eps)[0]),
        lambda x, w: [rms_norm(x, w, eps)],
        lambda x, w: [mx.fast.rms_norm(x, w, eps)],
        exact=in_16_bits,
    )
    yield Case(
        "rms_norm",
        "add_rms_norm",
        added,
        lambda x, y, w: add_rms_norm(x, y, w, eps),
        lambda x, y, w: [x + y, mx.fast.rms_norm(x + y, w, eps)],
        exact=in_16_bits,
    )
    yield Case(
        "rope",
        "qkv_rope",
        lambda data: (data.floats(1, 7, width), data.floats(width), data.table(7, head_dim // 2)[None]),
        lambda x, bias, table: qkv_rope(x, bias, table, heads, kv_heads),
        plain_rope,
    )
    yield Case(
        "swiglu",
        "swiglu_joined",
        lambda data: (mx.concatenate([data.among((0, 32, 64), 3, spec.width), data.floats(3, spec.width)], axis=-1),),
        lambda x: [swiglu_joined(x)],
        lambda x: [_plain_swiglu(x)],
    )
    yield Case(
        "best_token",
        "best_token",
        lambda data: (_logits(data, spec.vocab_size),),
        lambda x: [best_token(x)],
        lambda x: [or_not_finite(x, mx.argmax(x, axis=-1))],
        count=1,
    )


def _batch_cases(spec: Spec) -> Iterator[Case]:
    """A dense product with a few vectors, where it has a kernel."""
    dense = [m for p in spec.products for m in p.matrices if m.kind == "dense"]
    if dense and dispatch.device() in MATMUL_ON and spec.dtype != "float32":
        matrix = dense[0]
        yield Case(
            "matmul",
            "matmul of 4 rows",
            lambda data: (data.floats(4, 1, matrix.columns), data.matrix(matrix).arrays[0]),
            lambda x, w: [matmul(x, w)],
            lambda x, w: [x @ w.T],
        )


@mx.compile
def _plain_swiglu(x: mx.array) -> mx.array:
    gate, up = mx.split(x, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


def _logits(data: Data, count: int) -> mx.array:
    """Rows whose largest number is the last, stands twice, or is below 0, and one with a number that is not finite."""
    x = np.array(data.floats(4, count).astype(mx.float32))
    x[0, -1] = x[1, count // 3] = x[1, count // 2] = 90
    x[2] = -1 - np.abs(x[2])
    x[2, count // 5] = -0.5
    x[3, count // 7] = np.inf
    return data.array(x)


def _product_cases(spec: Spec) -> Iterator[Case]:
    kinds = {"matvec": _matvec, "matvec_normed": _normed, "matvec_swiglu": _swiglu, "matvec_qkv": _qkv}
    for product in spec.products:
        if product.name in kinds:
            yield kinds[product.name](spec, product)


def _matvec(spec: Spec, product: Product) -> Case:
    (matrix,) = product.matrices

    def make(data: Data) -> tuple[Any, ...]:
        return data.floats(1, 1, matrix.columns), data.matrix(matrix), data.floats(1, 1, rows_tried(matrix))

    def kernel(x: mx.array, m: Matrix, residual: mx.array) -> Arrays:
        return [matvec(x, m, None, residual)]

    def plain(x: mx.array, m: Matrix, residual: mx.array) -> Arrays:
        return [residual + _plain_product(x, m)]

    return Case("matvec", str(product), make, kernel, plain, product.count, product=product)


def _normed(spec: Spec, product: Product) -> Case:
    (matrix,), in_16_bits = product.matrices, spec.dtype != "float32"

    def make(data: Data) -> tuple[Any, ...]:
        return data.signs(1, 1, matrix.columns), data.matrix(matrix), data.norm(matrix.columns, spec.eps)

    def kernel(x: mx.array, m: Matrix, norm: Norm) -> Arrays:
        return [matvec(x, m, norm)]

    def plain(x: mx.array, m: Matrix, norm: Norm) -> Arrays:
        return [_plain_product(mx.fast.rms_norm(x, *norm), m)]

    return Case("matvec", str(product), make, kernel, plain, product.count, in_16_bits, product)


def _swiglu(spec: Spec, product: Product) -> Case:
    (matrix,) = product.matrices

    def make(data: Data) -> tuple[Any, ...]:
        # Where data are exact, sums are multiples of 128, of which silu is the number itself or 0.
        norm = data.norm(matrix.columns, spec.eps, 256 if data.exact else 1)
        return data.signs(1, 1, matrix.columns), data.matrix(matrix), norm

    def kernel(x: mx.array, m: Matrix, norm: Norm) -> Arrays:
        return [matvec_swiglu(x, m, norm)]

    def plain(x: mx.array, m: Matrix, norm: Norm) -> Arrays:
        return [_plain_swiglu(_plain_product(mx.fast.rms_norm(x, *norm), m))]

    return Case("matvec", str(product), make, kernel, plain, product.count, spec.dtype == "bfloat16", product)


def _qkv(spec: Spec, product: Product) -> Case:
    heads, kv_heads, head_dim, columns = spec.n_heads, spec.n_kv_heads, spec.head_dim, product.matrices[0].columns

    def make(data: Data) -> tuple[Any, ...]:
        matrices, rows = [data.matrix(m) for m in product.matrices], sum(m.rows for m in product.matrices)
        x, bias, norm = data.signs(1, 1, columns), data.floats(rows), data.norm(columns, spec.eps)
        position = mx.array([40 + spec.recent - 1 if data.exact else 43, 40], mx.int32)
        recent = data.floats(1, 2 * kv_heads, spec.recent, head_dim)
        return x, matrices, bias, norm, data.table(1, head_dim // 2)[0], recent, position

    def kernel(*inputs: Any) -> Arrays:
        x, matrices, bias, norm, table, recent, position = inputs
        return matvec_qkv(x, matrices, bias, norm, table, recent, position, heads)

    def plain(*inputs: Any) -> Arrays:
        x, matrices, bias, norm, _, recent, _ = inputs
        y = mx.concatenate([_plain_product(mx.fast.rms_norm(x, *norm), m) for m in matrices], axis=-1) + bias
        y = y.reshape(1, 1, -1, head_dim).swapaxes(1, 2)
        q = _plain_rope(y[:, : heads + kv_heads], head_dim)
        kv = mx.concatenate([q[:, heads:], y[:, heads + kv_heads :]], axis=1)
        return [q[:, :heads], mx.slice_update(recent, kv, mx.array([3]), axes=[2])]

    return Case("matvec", str(product), make, kernel, plain, product.count, spec.dtype != "float32", product)


def _plain_rope(x: mx.array, head_dim: int) -> mx.array:
    return mx.fast.rope(x, head_dim, traditional=False, base=1e6, scale=1.0, offset=7)


def _plain_product(x: mx.array, matrix: Matrix) -> mx.array:
    """x W^T as the model computes it without matrix-vector kernels."""
    if matrix.packing.kind == "dense":
        return x @ matrix.arrays[0].T
    if matrix.packing.kind == "affine":
        codes, scales, biases = matrix.arrays
        packing = matrix.packing
        y = mx.quantized_matmul(x, codes, scales, biases, group_size=packing.group_size, bits=packing.bits)
        return y.astype(x.dtype)
    return x @ unpack(matrix, x.dtype).T


def _attention_cases(spec: Spec) -> Iterator[Case]:
    heads, kv_heads, head_dim, scale = spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.head_dim**-0.5
    layers = max(1, sum(p.count for p in spec.products if p.name == "matvec_qkv"))

    def plain(q: mx.array, kv: mx.array, recent: mx.array, *_: Any) -> Arrays:
        return [attention(q.swapaxes(1, 2), kv[:, :kv_heads], kv[:, kv_heads:], scale, None)]

    def case(name: str, room: int, rows: int, window: int, count: int) -> Case:
        def make(data: Data) -> tuple[Any, ...]:
            filled = room if data.exact else room - 37
            newest = filled + (spec.recent - 1 if data.exact else 3)
            first = mx.array([0, 70, newest - 2][:rows], mx.int32) if rows > 1 else None
            position = mx.array([newest, filled], mx.int32)
            q = data.floats(rows, heads, 1, head_dim)
            kv, recent = (data.floats(rows, 2 * kv_heads, n, head_dim) for n in (room, spec.recent))
            if data.exact:
                oldest = newest + 1 - window if window else 0
                starts = [max(oldest, 0 if first is None else int(first[i])) for i in range(rows)]
                q, kv, recent = _selected(data, q, kv, recent, starts, newest, filled)
            return q, kv, recent, position, first

        def kernel(q: mx.array, kv: mx.array, recent: mx.array, position: mx.array, first: mx.array | None) -> Arrays:
            return [decode_attention(q, kv, recent, position, scale, window or None, first)]

        return Case("attend", name, make, kernel, plain, count)

    for window in spec.windows:
        suffix = f", window of {window}" if window else ""
        yield case(f"attention{suffix}", 512, 1, window, layers)
        yield case(f"attention on a long cache{suffix}", 2 * SHORT, 1, window, 0)
    yield case("attention of rows", 512, 3, spec.windows[0], 0)


def _selected(
    data: Data, q: mx.array, kv: mx.array, recent: mx.array, starts: Sequence[int], newest: int, filled: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Inputs whose softmax is the mean of a power of two of the rows that are seen, the oldest and the newest among
    them. Rows that must not be seen would be selected too."""
    rng = np.random.default_rng(7)
    both = np.array(mx.concatenate([kv[:, :, :filled], recent], axis=2).astype(mx.float32))
    kv_heads, queries = both.shape[1] // 2, np.zeros(q.shape, np.float32)
    queries[..., 0] = 64
    for row, start in enumerate(starts):
        seen = newest + 1 - start
        count = 1 << int(math.log2(seen)) if seen < 64 else 32
        for head in range(kv_heads):
            others = rng.permutation(np.arange(start + 1, newest))[: max(count - 2, 0)]
            selected = [start, *others, newest][:count] if count > 1 else [newest]
            both[row, head, start : newest + 1, 0] = -128  # whose weight, e^-500 and less, is 0
            both[row, head, selected, 0] = 0
            both[row, head, :start, 0] = both[row, head, newest + 1 :, 0] = 0
    filled_part, rest = np.split(both, [filled], axis=2)
    return data.array(queries), data.array(filled_part), data.array(rest)


def outputs(call: Call, inputs: Sequence[Any]) -> list[mx.array]:
    """The call's outputs, computed."""
    arrays = list(call(*inputs))
    mx.eval(arrays)
    return arrays


def fault(case: Case, spec: Spec) -> str | None:
    """The fault of a case's kernel on exact and then on random data, None if nothing is; MLX's own exceptions go
    through."""
    for exact in (True, False):
        inputs = case.make(Data(spec, exact, 11 + exact))
        got = outputs(case.kernel, inputs)
        with dispatch.forced("reference"):
            want = outputs(case.kernel, inputs)
        for a, b in zip(got, want, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{a.shape} of {a.dtype} instead of {b.shape} of {b.dtype}"
            wrong = difference(a, b, exact and case.exact)
            if wrong is not None:
                return wrong
    return None


def difference(got: mx.array, want: mx.array, exact: bool) -> str | None:
    """The difference in words, None where they agree: in every bit of a number if `exact`, else within LIMIT."""
    floating = mx.issubdtype(got.dtype, mx.floating)
    a, b = (np.array(x.astype(mx.float32) if floating else x).astype(np.float64) for x in (got, want))
    if exact or not floating:
        wrong = np.count_nonzero(a != b)
        return f"{wrong} of {a.size} numbers are not MLX's" if wrong else None
    unit = max({mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7}[got.dtype], 2**-19) * np.abs(b).max()
    error = float(np.abs(a - b).max()) / unit if a.size else 0.0
    return None if error <= LIMIT else f"{error:.3g} units in the last place off, more than {LIMIT:g}"
