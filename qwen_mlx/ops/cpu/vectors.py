"""Vectors of a fixed number of elements for functions that numba compiles, as numba has no types for them.

LLVM cuts them to what the processor has (AVX2, AVX-512, NEON), so nothing depends on what its loop vectorizer happens
to recognise. Indexes count an array's elements; they are not checked, and memory need not be aligned.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.extending import register_model


class Vector(types.Type):
    """The type of `lanes` elements of a numba number type."""

    def __init__(self, element: Any, lanes: int):
        self.element, self.lanes = element, lanes
        super().__init__(name=f"Vector({element}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector):
        super().__init__(manager, vector, ir.VectorType(manager.lookup(vector.element).get_value_type(), vector.lanes))


# Typed so because a call in a compiled function has fewer arguments than the definition.
_intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic

_U8X16, U8X32, I8X32 = Vector(types.uint8, 16), Vector(types.uint8, 32), Vector(types.int8, 32)
F32X8, F32X16, F32X32 = (Vector(types.float32, lanes) for lanes in (8, 16, 32))
_I1, _I8, _I16, _I32, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
# Without its instructions for float16, LLVM would call a function that numba does not have.
_KNOWS_HALVES = platform.machine() not in ("x86_64", "AMD64") or "+f16c" in (
    get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES  # type: ignore[attr-defined]
)
_LOW, _HIGH = range(16), range(16, 32)


def _constant(element: ir.Type, values: Sequence[float]) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, len(values)), [ir.Constant(element, value) for value in values])


def _select(builder: Any, vector: ir.Value, lanes: Sequence[int]) -> ir.Value:
    return builder.shuffle_vector(vector, vector, _constant(_I32, lanes))


def _spread(builder: Any, value: ir.Value, lanes: int) -> ir.Value:
    """A vector of one value repeated."""
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(empty, value, _I32(0)), empty, _constant(_I32, [0] * lanes))


def _fma(builder: Any, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a b + c, rounded once."""
    name = f"llvm.fma.v{c.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(c.type, [c.type] * 3), name)
    return builder.call(function, [a, b, c])


def _pointer(context: Any, builder: Any, array_type: Any, array: ir.Value, index: ir.Value, to: ir.Type) -> ir.Value:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _load(result: Any, stored: ir.Type, convert: Callable[[Any, ir.Value], ir.Value] = lambda builder, v: v) -> Any:
    """An intrinsic that reads `stored` at an element of an array."""

    def load(typing_context: Any, array: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
            pointer = _pointer(context, builder, signature.args[0], values[0], values[1], stored)
            return convert(builder, builder.load(pointer, align=1))

        return result(array, types.uintp), codegen

    return _intrinsic(load)


bytes16 = _load(_U8X16, ir.VectorType(_I8, 16))
bytes32 = _load(U8X32, ir.VectorType(_I8, 32))
signed_bytes32 = _load(I8X32, ir.VectorType(_I8, 32))
floats8 = _load(F32X8, ir.VectorType(_F32, 8))
floats16 = _load(F32X16, ir.VectorType(_F32, 16))
floats32 = _load(F32X32, ir.VectorType(_F32, 32))
halves32 = _load(F32X32, ir.VectorType(_I16, 32), lambda builder, v: _from_halves(builder, v))
bfloats32 = _load(F32X32, ir.VectorType(ir.IntType(16), 32), lambda builder, v: _from_bfloats(builder, v))
word = _load(types.uint32, _I32)
half = _load(types.float32, _I16, lambda builder, v: _from_halves(builder, v))


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, 32)


def _from_halves(builder: Any, value: ir.Value) -> ir.Value:
    """float32 of the bits of a float16, or of a vector of them."""
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1

    def of(element: ir.Type) -> ir.Type:
        return element if lanes == 1 else ir.VectorType(element, lanes)

    def constant(number: float, element: ir.Type = _I32) -> ir.Constant:
        return ir.Constant(of(element), number if lanes == 1 else [ir.Constant(element, number)] * lanes)

    if _KNOWS_HALVES:
        return builder.fpext(builder.bitcast(value, of(ir.HalfType())), of(_F32))
    bits = builder.zext(value, of(_I32))
    magnitude = builder.shl(builder.and_(bits, constant(0x7FFF)), constant(13))
    # The exponent's bias is 127 instead of 15; numbers below 2^-14 are subnormal in both.
    finite = builder.bitcast(builder.fmul(builder.bitcast(magnitude, of(_F32)), constant(2.0**112, _F32)), of(_I32))
    special = builder.icmp_unsigned(">=", magnitude, constant(0x7C00 << 13))
    magnitude = builder.select(special, builder.or_(magnitude, constant(0x7F800000)), finite)
    sign = builder.shl(builder.and_(bits, constant(0x8000)), constant(16))
    return builder.bitcast(builder.or_(magnitude, sign), of(_F32))


def _from_bfloats(builder: Any, vector: ir.Value) -> ir.Value:
    words = builder.shl(builder.zext(vector, _vector(_I32)), _constant(_I32, [16] * 32))
    return builder.bitcast(words, _vector(_F32))


@_intrinsic
def store(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Writes a vector to the elements of an array from `index` on."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        pointer = _pointer(context, builder, signature.args[0], values[0], values[1], values[2].type)
        builder.store(values[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.uintp, vector), codegen


@_intrinsic
def nibbles(typing_context: Any, vector: Any) -> Any:
    """The low halves of 16 bytes, then their high halves."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        low = builder.and_(values[0], _constant(_I8, [15] * 16))
        high = builder.lshr(values[0], _constant(_I8, [4] * 16))
        return builder.shuffle_vector(low, high, _constant(_I32, range(32)))

    return U8X32(vector), codegen


@_intrinsic
def bits(typing_context: Any, vector: Any, shift: Any, mask: Any) -> Any:
    """(byte >> shift) & mask of 32 bytes, for a mask of at most 8 - shift bits."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        words = builder.bitcast(values[0], ir.VectorType(_I32, 8))
        masks = _spread(builder, builder.mul(values[2], _I32(0x01010101)), 8)
        shifted = builder.and_(builder.lshr(words, _spread(builder, values[1], 8)), masks)
        return builder.bitcast(shifted, values[0].type)

    return U8X32(vector, types.uint32, types.uint32), codegen


@_intrinsic
def with_high_bits(typing_context: Any, low: Any, high: Any) -> Any:
    """low + 16 high for 32 codes below 16; high: bytes below 16, or a word with a bit for each code."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        low, high = values
        if high.type == _I32:
            set_ = builder.or_(low, _constant(_I8, [16] * 32))
            return builder.select(builder.bitcast(high, ir.VectorType(_I1, 32)), set_, low)
        return builder.or_(low, builder.shl(high, _constant(_I8, [4] * 32)))

    return U8X32(low, types.uint32 if isinstance(high, types.Integer) else high), codegen


@_intrinsic
def minus(typing_context: Any, codes: Any, offset: Any) -> Any:
    """codes - offset as signed bytes."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        return builder.sub(values[0], _spread(builder, values[1], 32))

    return I8X32(codes, types.uint8), codegen


def unpacked(n_bits: int) -> Any:
    """An intrinsic that reads 32 codes of `n_bits` from bytes, the lowest bits first."""
    stored = ir.VectorType(_I8, 4 * n_bits)
    firsts = [lane * n_bits // 8 for lane in range(32)]
    shifts = [lane * n_bits % 8 for lane in range(32)]

    def load(typing_context: Any, array: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
            raw = builder.load(_pointer(context, builder, signature.args[0], values[0], values[1], stored), align=1)
            words = ir.VectorType(_I32, 32)
            codes = builder.zext(_select(builder, raw, firsts), words)
            if 8 % n_bits:  # a code may end in the next byte
                seconds = builder.zext(_select(builder, raw, [min(i + 1, 4 * n_bits - 1) for i in firsts]), words)
                codes = builder.or_(codes, builder.shl(seconds, _constant(_I32, [8] * 32)))
            codes = builder.and_(builder.lshr(codes, _constant(_I32, shifts)), _constant(_I32, [2**n_bits - 1] * 32))
            return builder.trunc(codes, ir.VectorType(_I8, 32))

        return U8X32(array, types.uintp), codegen

    return _intrinsic(load)


def _floats(builder: Any, vector: Any, codes: ir.Value) -> ir.Value:
    if vector == F32X32:
        return codes
    extend = builder.sext if vector.element.signed else builder.zext
    return builder.sitofp(extend(codes, _vector(_I32)), _vector(_F32))


@_intrinsic
def add_products(typing_context: Any, codes: Any, scale: Any, x: Any, sums: Any) -> Any:
    """sums + scale (codes x), 32 products in 16 sums; two scales are one for each half."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        codes, scale, x, sums = values
        floats = _floats(builder, signature.args[0], codes)
        (c0, x0), (c1, x1) = ([_select(builder, v, lanes) for v in (floats, x)] for lanes in (_LOW, _HIGH))
        first = builder.fmul(c0, x0)
        if isinstance(signature.args[1], types.BaseTuple):
            scales = [_spread(builder, builder.extract_value(scale, i), 16) for i in (0, 1)]
            return _fma(builder, scales[1], builder.fmul(c1, x1), _fma(builder, scales[0], first, sums))
        return _fma(builder, _spread(builder, scale, 16), _fma(builder, c1, x1, first), sums)

    return F32X16(codes, scale, x, sums), codegen


@_intrinsic
def values(typing_context: Any, codes: Any, scale: Any, minimum: Any) -> Any:
    """scale codes + minimum; two scales are one for each half."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        codes, scale, minimum = values
        if isinstance(signature.args[1], types.BaseTuple):
            halves = [_spread(builder, builder.extract_value(scale, i), 16) for i in (0, 1)]
            scales = builder.shuffle_vector(*halves, _constant(_I32, range(32)))
        else:
            scales = _spread(builder, scale, 32)
        products = builder.fmul(scales, _floats(builder, signature.args[0], codes))
        return builder.fadd(products, _spread(builder, minimum, 32))

    return F32X32(codes, scale, types.float32), codegen


# Cody and Waite's reduction and Cephes' polynomial for e^r, |r| <= ln(2) / 2.
_LOG2_E, _LN_2_HIGH, _LN_2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_SMALLEST, _LARGEST = -87.3, 88.3  # whose powers are normal numbers
_ROUNDING = 1.5 * 2**23  # added to a float below 2^22, it leaves the nearest integer in the lowest bits


def _exp(builder: Any, x: ir.Value) -> ir.Value:
    """e^x of 16 floats within 2 ulp; 0 below _SMALLEST, e^_LARGEST above that. NaN stays NaN."""

    def all_of(value: float) -> ir.Constant:
        return ir.Constant(x.type, [ir.Constant(_F32, value)] * 16)

    too_small = builder.fcmp_ordered("<", x, all_of(_SMALLEST))
    clipped = builder.select(too_small, all_of(_SMALLEST), x)
    clipped = builder.select(builder.fcmp_ordered(">", clipped, all_of(_LARGEST)), all_of(_LARGEST), clipped)
    shifted = _fma(builder, clipped, all_of(_LOG2_E), all_of(_ROUNDING))
    n = builder.fsub(shifted, all_of(_ROUNDING))
    r = _fma(builder, n, all_of(-_LN_2_LOW), _fma(builder, n, all_of(-_LN_2_HIGH), clipped))
    power = all_of(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        power = _fma(builder, power, r, all_of(coefficient))
    power = builder.fadd(_fma(builder, power, builder.fmul(r, r), r), all_of(1.0))
    exponent = builder.shl(builder.bitcast(shifted, ir.VectorType(_I32, 16)), _constant(_I32, [23] * 16))
    factor = builder.bitcast(builder.add(exponent, _constant(_I32, [127 << 23] * 16)), x.type)
    return builder.select(too_small, all_of(0.0), builder.fmul(power, factor))


@_intrinsic
def exp16(typing_context: Any, x: Any) -> Any:
    """e^x of 16 elements; see _exp."""
    return F32X16(x), lambda context, builder, signature, values: _exp(builder, values[0])


@_intrinsic
def silu16(typing_context: Any, x: Any) -> Any:
    """x / (1 + e^-x) of 16 elements."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        (x,) = values
        return builder.fdiv(x, builder.fadd(_constant(_F32, [1.0] * 16), _exp(builder, builder.fneg(x))))

    return F32X16(x), codegen


def _pairwise(combine: Callable[[Any, ir.Value, ir.Value], ir.Value]) -> Any:
    """An intrinsic of two vectors of 16 elements, or of one and a number."""

    def pairwise(typing_context: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
            a, b = (v if isinstance(v.type, ir.VectorType) else _spread(builder, v, 16) for v in values)
            return combine(builder, a, b)

        own = (v if isinstance(v, Vector) else types.float32 for v in (a, b))
        return F32X16(*own), codegen

    return _intrinsic(pairwise)


plus16 = _pairwise(lambda builder, a, b: builder.fadd(a, b))
minus16 = _pairwise(lambda builder, a, b: builder.fsub(a, b))
times16 = _pairwise(lambda builder, a, b: builder.fmul(a, b))
maximum16 = _pairwise(lambda builder, a, b: _maximum(builder, a, b))


def _zeros(result: Vector) -> Any:
    def zeros(typing_context: Any) -> Any:
        return result(), lambda context, builder, signature, values: _constant(_F32, [0.0] * result.lanes)

    return _intrinsic(zeros)


zeros8, zeros16 = _zeros(F32X8), _zeros(F32X16)


@_intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once; a may be a number."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        a, b, c = values
        return _fma(builder, a if a.type == c.type else _spread(builder, a, c.type.count), b, c)

    return c(a if isinstance(a, Vector) else types.float32, b, c), codegen


def _reduction(combine: Callable[[Any, ir.Value, ir.Value], ir.Value]) -> Any:
    """An intrinsic that combines the elements of a vector, pairwise."""

    def reduce(typing_context: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
            (v,) = values
            while v.type.count > 1:
                n = v.type.count // 2
                v = combine(builder, _select(builder, v, range(n)), _select(builder, v, range(n, 2 * n)))
            return builder.extract_element(v, _I32(0))

        return types.float32(vector), codegen

    return _intrinsic(reduce)


def _maximum(builder: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


total = _reduction(lambda builder, a, b: builder.fadd(a, b))
largest16 = _reduction(_maximum)
