"""A matrix as the compiled functions see it: for each packing a type with its arrays, and how to read a block of it.

A block is one group of 32 weights or eight of them, and a weight is scale * code + minimum. The readers write LLVM's
instructions, so that a block is one straight piece of code whose scales are decoded together. Sources of the layouts:
ggml's ggml-common.h, and MLX's `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types

from . import vectors
from .vectors import F32, I8, I16, I32, constant, select, spread

Bytes = np.ndarray  # uint8, flat


class Q40(NamedTuple):
    """GGUF's Q4_0."""

    blocks: Bytes


class Q41(NamedTuple):
    """GGUF's Q4_1."""

    blocks: Bytes


class Q50(NamedTuple):
    """GGUF's Q5_0."""

    blocks: Bytes


class Q51(NamedTuple):
    """GGUF's Q5_1."""

    blocks: Bytes


class Q80(NamedTuple):
    """GGUF's Q8_0."""

    blocks: Bytes


class Q4K(NamedTuple):
    """GGUF's Q4_K."""

    blocks: Bytes


class Q5K(NamedTuple):
    """GGUF's Q5_K."""

    blocks: Bytes


class Q6K(NamedTuple):
    """The fields of GGUF's Q6_K, as ops.Matrix has them."""

    low: Bytes
    high: Bytes
    scales: Bytes
    d: Bytes


class Floats(NamedTuple):
    """Dense float32."""

    values: np.ndarray


class Halves(NamedTuple):
    """Dense float16, as bytes."""

    values: Bytes


class BFloats(NamedTuple):
    """Dense bfloat16, as bytes."""

    values: Bytes


class Affine2(NamedTuple):
    """MLX's affine form; 2^shift groups of 32 weights share a scale."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    shift: int


class Affine3(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    shift: int


class Affine4(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    shift: int


class Affine5(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    shift: int


class Affine6(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    shift: int


class Affine8(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    shift: int


class Group(NamedTuple):
    """32 weights as LLVM's values."""

    codes: ir.Value  # <32 x i8>, or the values themselves, <32 x float>
    scales: tuple[ir.Value, ...] = ()  # one float, or one for each half; none if the codes are the values
    minimum: ir.Value | None = None  # a float; none is 0
    offset: int = 0  # what the codes, which are unsigned, are less
    signed: bool = False


class _Block:
    """The bytes of an array from those of a block on."""

    def __init__(self, builder: Any, pointer: ir.Value, index: ir.Value, n_bytes: int):
        self._builder = builder
        start = builder.bitcast(pointer, I8.as_pointer())
        self._start = builder.gep(start, [builder.mul(index, ir.Constant(index.type, n_bytes))])

    def load(self, at: int, element: ir.Type, lanes: int = 0) -> ir.Value:
        """An element, or a vector of some, from byte `at` on."""
        kind = ir.VectorType(element, lanes) if lanes else element
        pointer = self._builder.gep(self._start, [I32(at)])
        return self._builder.load(self._builder.bitcast(pointer, kind.as_pointer()), align=1)

    def half(self, at: int) -> ir.Value:
        """A float16 as a float."""
        return vectors.from_halves(self._builder, self.load(at, I16))


def _nibbles(builder: Any, raw: ir.Value) -> ir.Value:
    """The low halves of 16 bytes, then their high halves."""
    twice = builder.shuffle_vector(raw, raw, constant(I32, range(32)))
    words = builder.lshr(builder.bitcast(twice, ir.VectorType(I32, 8)), constant(I32, [0] * 4 + [4] * 4))
    return builder.and_(builder.bitcast(words, twice.type), constant(I8, [15] * 32))


def _bits(builder: Any, raw: ir.Value, shift: int, n_bits: int) -> ir.Value:
    """(byte >> shift) & (2^n_bits - 1) of 32 bytes."""
    words = builder.lshr(builder.bitcast(raw, ir.VectorType(I32, 8)), constant(I32, [shift] * 8))
    return builder.bitcast(builder.and_(words, constant(I32, [(2**n_bits - 1) * 0x01010101] * 8)), raw.type)


def _with_high_bits(builder: Any, low: ir.Value, high: ir.Value) -> ir.Value:
    """low + 16 high for 32 codes below 16; high: bytes below 16, or a word with a bit for each code."""
    if high.type == I32:
        set_ = builder.sext(builder.bitcast(high, ir.VectorType(ir.IntType(1), 32)), low.type)
        return builder.or_(low, builder.and_(set_, constant(I8, [16] * 32)))
    return builder.or_(low, builder.shl(high, constant(I8, [4] * 32)))


def _q4_0(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    block = _Block(builder, arrays[0], index, 18)
    codes = _nibbles(builder, block.load(2, I8, 16))
    return [Group(codes, (block.half(0),), offset=8)]


def _q4_1(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    block = _Block(builder, arrays[0], index, 20)
    return [Group(_nibbles(builder, block.load(4, I8, 16)), (block.half(0),), block.half(2))]


def _q5_0(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    block = _Block(builder, arrays[0], index, 22)
    codes = _with_high_bits(builder, _nibbles(builder, block.load(6, I8, 16)), block.load(2, I32))
    return [Group(codes, (block.half(0),), offset=16)]


def _q5_1(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    block = _Block(builder, arrays[0], index, 24)
    codes = _with_high_bits(builder, _nibbles(builder, block.load(8, I8, 16)), block.load(4, I32))
    return [Group(codes, (block.half(0),), block.half(2))]


def _q8_0(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    block = _Block(builder, arrays[0], index, 34)
    return [Group(block.load(2, I8, 32), (block.half(0),), signed=True)]


def _scales_and_minima(builder: Any, block: _Block) -> tuple[list[ir.Value], list[ir.Value]]:
    """Those of the eight groups of a block of Q4_K or Q5_K: six bits each, times d and dmin.

    The last four groups' highest two bits are the first four's spare ones.
    """
    first, second, third = (block.load(at, I32) for at in (4, 8, 12))

    def part(word: ir.Value, shift: int, mask: int) -> ir.Value:
        return builder.and_(builder.lshr(word, I32(shift)), I32(mask * 0x01010101))

    def last_four(low: ir.Value, high: ir.Value) -> ir.Value:
        return builder.or_(low, builder.shl(part(high, 6, 3), I32(4)))

    words = (
        (part(first, 0, 63), last_four(part(third, 0, 15), first)),
        (part(second, 0, 63), last_four(part(third, 4, 15), second)),
    )
    factors = block.half(0), builder.fneg(block.half(2))
    found = []
    for (low, high), factor in zip(words, factors):
        pair = ir.Constant(ir.VectorType(I32, 2), ir.Undefined)
        pair = builder.insert_element(builder.insert_element(pair, low, I32(0)), high, I32(1))
        codes = builder.zext(builder.bitcast(pair, ir.VectorType(I8, 8)), ir.VectorType(I32, 8))
        products = builder.fmul(builder.sitofp(codes, ir.VectorType(F32, 8)), spread(builder, factor, 8))
        found.append([builder.extract_element(products, I32(i)) for i in range(8)])
    return found[0], found[1]


def _q4_k(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    block = _Block(builder, arrays[0], index, 144)
    scales, minima = _scales_and_minima(builder, block)
    raw = [block.load(16 + 32 * pair, I8, 32) for pair in range(4)]
    codes = [_bits(builder, raw[i // 2], i % 2 * 4, 4) for i in range(8)]
    return [Group(codes[i], (scales[i],), minima[i]) for i in range(8)]


def _q5_k(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    block = _Block(builder, arrays[0], index, 176)
    scales, minima = _scales_and_minima(builder, block)
    raw, high = [block.load(48 + 32 * pair, I8, 32) for pair in range(4)], block.load(16, I8, 32)
    low = [_bits(builder, raw[i // 2], i % 2 * 4, 4) for i in range(8)]
    codes = [_with_high_bits(builder, low[i], _bits(builder, high, i, 1)) for i in range(8)]
    return [Group(codes[i], (scales[i],), minima[i]) for i in range(8)]


def _q6_k(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    sizes = (128, 64, 16, 2)
    lows, highs, scales, d = (_Block(builder, array, index, size) for array, size in zip(arrays, sizes))
    factors = builder.sitofp(builder.sext(scales.load(0, I8, 16), ir.VectorType(I32, 16)), ir.VectorType(F32, 16))
    factors = builder.fmul(factors, spread(builder, d.half(0), 16))
    groups = []
    for i in range(8):
        part, quarter = divmod(i, 4)  # of 128 weights, which share 64 bytes and 32
        low = _bits(builder, lows.load(64 * part + 32 * (quarter % 2), I8, 32), quarter // 2 * 4, 4)
        high = _bits(builder, highs.load(32 * part, I8, 32), 2 * quarter, 2)
        halves = tuple(builder.extract_element(factors, I32(2 * i + half)) for half in (0, 1))
        groups.append(Group(_with_high_bits(builder, low, high), halves, offset=32))
    return groups


def _floats(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    return [Group(_Block(builder, arrays[0], index, 128).load(0, F32, 32))]


def _halves(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    return [Group(vectors.from_halves(builder, _Block(builder, arrays[0], index, 64).load(0, I16, 32)))]


def _bfloats(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
    words = builder.zext(_Block(builder, arrays[0], index, 64).load(0, I16, 32), ir.VectorType(I32, 32))
    return [Group(builder.bitcast(builder.shl(words, constant(I32, [16] * 32)), ir.VectorType(F32, 32)))]


def _affine(n_bits: int) -> Callable[..., list[Group]]:
    """The reader of codes of `n_bits`, the lowest bits first."""
    firsts = [lane * n_bits // 8 for lane in range(32)]
    shifts = [lane * n_bits % 8 for lane in range(32)]

    def read(builder: Any, arrays: Sequence[ir.Value], index: ir.Value) -> list[Group]:
        raw = _Block(builder, arrays[0], index, 4 * n_bits).load(0, I8, 4 * n_bits)
        if n_bits == 8:
            codes = raw
        elif n_bits == 4:
            codes = select(builder, _nibbles(builder, raw), [lane // 2 + lane % 2 * 16 for lane in range(32)])
        else:
            words = ir.VectorType(I32, 32)
            codes = builder.zext(select(builder, raw, firsts), words)
            if 8 % n_bits:  # a code may end in the next byte
                seconds = builder.zext(select(builder, raw, [min(i + 1, 4 * n_bits - 1) for i in firsts]), words)
                codes = builder.or_(codes, builder.shl(seconds, constant(I32, [8] * 32)))
            codes = builder.and_(builder.lshr(codes, constant(I32, shifts)), constant(I32, [2**n_bits - 1] * 32))
            codes = builder.trunc(codes, ir.VectorType(I8, 32))
        shared = builder.lshr(index, arrays[3])
        scale, minimum = (_Block(builder, array, shared, 4).load(0, F32) for array in arrays[1:3])
        return [Group(codes, (scale,), minimum)]

    return read


_ONE_GROUP: dict[type, Callable[..., list[Group]]] = {
    Q40: _q4_0,
    Q41: _q4_1,
    Q50: _q5_0,
    Q51: _q5_1,
    Q80: _q8_0,
    Floats: _floats,
    Halves: _halves,
    BFloats: _bfloats,
    Affine2: _affine(2),
    Affine3: _affine(3),
    Affine4: _affine(4),
    Affine5: _affine(5),
    Affine6: _affine(6),
    Affine8: _affine(8),
}
_EIGHT_GROUPS: dict[type, Callable[..., list[Group]]] = {Q4K: _q4_k, Q5K: _q5_k, Q6K: _q6_k}


def groups_of(matrix: Any) -> int:
    """The groups of 32 weights in a block of a matrix of one of the types above."""
    return 8 if type(matrix) in _EIGHT_GROUPS else 1


def by_words(matrix: Any) -> bool:
    """True if x is ordered for this matrix by the words that four codes make."""
    return _is_by_words(type(matrix))


def _is_by_words(matrix_type: type) -> bool:
    """AVX-512 makes 16 floats of 16 bytes at once. Elsewhere it is quicker to shift words of four signed codes."""
    return vectors.LANES == 8 and matrix_type not in (Floats, Halves, BFloats, Affine8)


def _pieces(builder: Any, group: Group, by_words: bool) -> list[ir.Value]:
    """The codes as floats, LANES at a time; by words the lowest bytes first, all 2^24 times as large."""
    if not by_words:
        numbers = _as_floats(builder, group)
        return [select(builder, numbers, range(at, at + vectors.LANES)) for at in range(0, 32, vectors.LANES)]
    words = builder.bitcast(_signed(builder, group), ir.VectorType(I32, 8))
    shifted = [builder.shl(words, constant(I32, [shift] * 8)) for shift in (24, 16, 8, 0)]
    highest = [builder.and_(word, constant(I32, [255 << 24] * 8)) for word in shifted]
    return [builder.sitofp(word, ir.VectorType(F32, 8)) for word in highest]


def _signed(builder: Any, group: Group) -> ir.Value:
    """The codes, less their offset."""
    return builder.sub(group.codes, constant(I8, [group.offset] * 32)) if group.offset else group.codes


def _as_floats(builder: Any, group: Group) -> ir.Value:
    """The codes, less their offset, as floats."""
    if group.codes.type.element == F32:
        return group.codes
    extend = builder.sext if group.signed or group.offset else builder.zext
    return builder.sitofp(extend(_signed(builder, group), ir.VectorType(I32, 32)), ir.VectorType(F32, 32))


def _read(context: Any, builder: Any, matrix_type: types.NamedTuple, matrix: ir.Value, index: ir.Value) -> list[Group]:
    """The groups of the block of a number, counted through all rows."""
    fields = [builder.extract_value(matrix, i) for i in range(len(matrix_type.types))]
    arrays = [
        context.make_array(kind)(context, builder, field).data if isinstance(kind, types.Array) else field
        for kind, field in zip(matrix_type.types, fields)
    ]
    return (_ONE_GROUP | _EIGHT_GROUPS)[matrix_type.instance_class](builder, arrays, index)


@vectors.intrinsic
def add_products(typing_context: Any, matrix: Any, index: Any, block: Any, x: Any, totals: Any, sums: Any) -> Any:
    """sums + the products of the weights of block `index` with the elements of x for block `block` of a row.

    x, totals: what kernels.ordered gives, float32; sums: LANES sums.
    """

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        matrix, index, block, x, totals, sums = values
        groups = _read(context, builder, signature.args[0], matrix, index)
        first = builder.mul(block, ir.Constant(block.type, len(groups)))
        x_block = _Block(builder, context.make_array(signature.args[3])(context, builder, x).data, first, 128)
        for i, group in enumerate(groups):
            pieces = _pieces(builder, group, _is_by_words(signature.args[0].instance_class))
            lanes = pieces[0].type.count
            operands = [(piece, x_block.load(128 * i + 4 * lanes * k, F32, lanes)) for k, piece in enumerate(pieces)]
            sums = _add_group(builder, operands, group.scales, sums)
        minima = [group.minimum for group in groups if group.minimum is not None]
        if minima:
            data = context.make_array(signature.args[4])(context, builder, totals).data
            factors = _Block(builder, data, first, 4).load(0, F32, len(groups))
            packed = ir.Constant(ir.VectorType(F32, len(groups)), ir.Undefined)
            for i, minimum in enumerate(minima):
                packed = builder.insert_element(packed, minimum, I32(i))
            products, zeros = builder.fmul(packed, factors), ir.Constant(packed.type, None)
            lanes = [min(i, len(groups)) for i in range(vectors.LANES)]
            sums = builder.fadd(sums, builder.shuffle_vector(products, zeros, constant(I32, lanes)))
        return sums

    return vectors.Sums(matrix, types.uintp, types.uintp, x, totals, vectors.Sums), codegen


def _add_group(
    builder: Any, operands: Sequence[tuple[ir.Value, ir.Value]], scales: Sequence[ir.Value], sums: ir.Value
) -> ir.Value:
    """sums + scale (codes x)."""
    if len(scales) == len(operands):  # one for each half
        for (codes, x), scale in zip(operands, scales):
            factor = spread(builder, scale, codes.type.count)
            sums = vectors.fused(builder, factor, builder.fmul(codes, x), sums)
        return sums
    products = builder.fmul(*operands[0])
    for codes, x in operands[1:]:
        products = vectors.fused(builder, codes, x, products)
    if not scales:
        return builder.fadd(sums, products)
    lanes = products.type.count
    factors = spread(builder, scales[0], lanes)
    if len(scales) == 2:
        other = spread(builder, scales[1], lanes)
        halves = [*range(lanes // 2), *range(lanes, lanes + lanes // 2)]
        factors = builder.shuffle_vector(factors, other, constant(I32, halves))
    return vectors.fused(builder, factors, products, sums)


@vectors.intrinsic
def store_values(typing_context: Any, matrix: Any, index: Any, out: Any, to: Any) -> Any:
    """Writes the values of block `index` of a matrix to block `to` of out, float32."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        matrix, index, out, to = values
        groups = _read(context, builder, signature.args[0], matrix, index)
        data = context.make_array(signature.args[2])(context, builder, out).data
        start = builder.gep(data, [builder.mul(to, ir.Constant(to.type, 32 * len(groups)))])
        for i, group in enumerate(groups):
            numbers = _as_floats(builder, group)
            if group.scales:
                halves = [spread(builder, scale, 16) for scale in (group.scales[0], group.scales[-1])]
                numbers = builder.fmul(builder.shuffle_vector(*halves, constant(I32, range(32))), numbers)
            if group.minimum is not None:
                numbers = builder.fadd(numbers, spread(builder, group.minimum, 32))
            pointer = builder.bitcast(builder.gep(start, [I32(32 * i)]), numbers.type.as_pointer())
            builder.store(numbers, pointer, align=4)
        return context.get_dummy_value()

    return types.void(matrix, types.uintp, out, types.uintp), codegen
