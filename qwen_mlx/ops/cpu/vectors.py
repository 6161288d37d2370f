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
intrinsic: Callable[[Callable[..., Any]], Any] = extending.intrinsic

F32X8, F32X16 = Vector(types.float32, 8), Vector(types.float32, 16)
I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES  # type: ignore[attr-defined]
# Without its instructions for float16, LLVM would call a function that numba does not have.
_KNOWS_HALVES = platform.machine() not in ("x86_64", "AMD64") or "+f16c" in _FEATURES
LANES = 16 if "+avx512f" in _FEATURES else 8  # floats of a row's products that are summed side by side
Sums = F32X16 if LANES == 16 else F32X8


def constant(element: ir.Type, values: Sequence[float]) -> ir.Constant:
    """A vector of these elements."""
    return ir.Constant(ir.VectorType(element, len(values)), [ir.Constant(element, value) for value in values])


def select(builder: Any, vector: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """The elements of a vector at `lanes`."""
    return builder.shuffle_vector(vector, vector, constant(I32, lanes))


def spread(builder: Any, value: ir.Value, lanes: int) -> ir.Value:
    """A vector of one value repeated."""
    empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(empty, value, I32(0)), empty, constant(I32, [0] * lanes))


def fused(builder: Any, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a b + c, rounded once."""
    name = f"llvm.fma.v{c.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(c.type, [c.type] * 3), name)
    return builder.call(function, [a, b, c])


def _pointer(context: Any, builder: Any, array_type: Any, array: ir.Value, index: ir.Value, to: ir.Type) -> ir.Value:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _load(result: Vector) -> Any:
    """An intrinsic that reads a vector at an element of an array."""

    def load(typing_context: Any, array: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
            stored = ir.VectorType(F32, result.lanes)
            return builder.load(_pointer(context, builder, signature.args[0], values[0], values[1], stored), align=1)

        return result(array, types.uintp), codegen

    return intrinsic(load)


floats8, floats16 = _load(F32X8), _load(F32X16)


def from_halves(builder: Any, value: ir.Value) -> ir.Value:
    """float32 of the bits of a float16, or of a vector of them."""
    lanes = value.type.count if isinstance(value.type, ir.VectorType) else 1

    def of(element: ir.Type) -> ir.Type:
        return element if lanes == 1 else ir.VectorType(element, lanes)

    def all_of(number: float, element: ir.Type = I32) -> ir.Constant:
        return ir.Constant(of(element), number if lanes == 1 else [ir.Constant(element, number)] * lanes)

    if _KNOWS_HALVES:
        return builder.fpext(builder.bitcast(value, of(ir.HalfType())), of(F32))
    bits = builder.zext(value, of(I32))
    magnitude = builder.shl(builder.and_(bits, all_of(0x7FFF)), all_of(13))
    # The exponent's bias is 127 instead of 15; numbers below 2^-14 are subnormal in both.
    finite = builder.bitcast(builder.fmul(builder.bitcast(magnitude, of(F32)), all_of(2.0**112, F32)), of(I32))
    special = builder.icmp_unsigned(">=", magnitude, all_of(0x7C00 << 13))
    magnitude = builder.select(special, builder.or_(magnitude, all_of(0x7F800000)), finite)
    sign = builder.shl(builder.and_(bits, all_of(0x8000)), all_of(16))
    return builder.bitcast(builder.or_(magnitude, sign), of(F32))


@intrinsic
def store(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """Writes a vector to the elements of an array from `index` on."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        pointer = _pointer(context, builder, signature.args[0], values[0], values[1], values[2].type)
        builder.store(values[2], pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.uintp, vector), codegen


# Cody and Waite's reduction and Cephes' polynomial for e^r, |r| <= ln(2) / 2.
_LOG2_E, _LN_2_HIGH, _LN_2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_SMALLEST, _LARGEST = -87.3, 88.3  # whose powers are normal numbers
_ROUNDING = 1.5 * 2**23  # added to a float below 2^22, it leaves the nearest integer in the lowest bits


def _exp(builder: Any, x: ir.Value) -> ir.Value:
    """e^x of 16 floats within 2 ulp; 0 below _SMALLEST, e^_LARGEST above that. NaN stays NaN."""

    def all_of(value: float) -> ir.Constant:
        return ir.Constant(x.type, [ir.Constant(F32, value)] * 16)

    too_small = builder.fcmp_ordered("<", x, all_of(_SMALLEST))
    clipped = builder.select(too_small, all_of(_SMALLEST), x)
    clipped = builder.select(builder.fcmp_ordered(">", clipped, all_of(_LARGEST)), all_of(_LARGEST), clipped)
    shifted = fused(builder, clipped, all_of(_LOG2_E), all_of(_ROUNDING))
    n = builder.fsub(shifted, all_of(_ROUNDING))
    r = fused(builder, n, all_of(-_LN_2_LOW), fused(builder, n, all_of(-_LN_2_HIGH), clipped))
    power = all_of(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        power = fused(builder, power, r, all_of(coefficient))
    power = builder.fadd(fused(builder, power, builder.fmul(r, r), r), all_of(1.0))
    exponent = builder.shl(builder.bitcast(shifted, ir.VectorType(I32, 16)), constant(I32, [23] * 16))
    factor = builder.bitcast(builder.add(exponent, constant(I32, [127 << 23] * 16)), x.type)
    return builder.select(too_small, all_of(0.0), builder.fmul(power, factor))


@intrinsic
def exp16(typing_context: Any, x: Any) -> Any:
    """e^x of 16 elements; see _exp."""
    return F32X16(x), lambda context, builder, signature, values: _exp(builder, values[0])


@intrinsic
def silu16(typing_context: Any, x: Any) -> Any:
    """x / (1 + e^-x) of 16 elements."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        (x,) = values
        return builder.fdiv(x, builder.fadd(constant(F32, [1.0] * 16), _exp(builder, builder.fneg(x))))

    return F32X16(x), codegen


def _pairwise(combine: Callable[[Any, ir.Value, ir.Value], ir.Value]) -> Any:
    """An intrinsic of two vectors of 16 elements, or of one and a number."""

    def pairwise(typing_context: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
            a, b = (v if isinstance(v.type, ir.VectorType) else spread(builder, v, 16) for v in values)
            return combine(builder, a, b)

        own = (v if isinstance(v, Vector) else types.float32 for v in (a, b))
        return F32X16(*own), codegen

    return intrinsic(pairwise)


plus16 = _pairwise(lambda builder, a, b: builder.fadd(a, b))
minus16 = _pairwise(lambda builder, a, b: builder.fsub(a, b))
times16 = _pairwise(lambda builder, a, b: builder.fmul(a, b))
maximum16 = _pairwise(lambda builder, a, b: _maximum(builder, a, b))


def _zeros(result: Vector) -> Any:
    def zeros(typing_context: Any) -> Any:
        return result(), lambda context, builder, signature, values: constant(F32, [0.0] * result.lanes)

    return intrinsic(zeros)


zeros8, zeros16, no_sums = _zeros(F32X8), _zeros(F32X16), _zeros(Sums)


@intrinsic
def fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once; a may be a number."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
        a, b, c = values
        return fused(builder, a if a.type == c.type else spread(builder, a, c.type.count), b, c)

    return c(a if isinstance(a, Vector) else types.float32, b, c), codegen


def _reduction(combine: Callable[[Any, ir.Value, ir.Value], ir.Value]) -> Any:
    """An intrinsic that combines the elements of a vector, pairwise."""

    def reduce(typing_context: Any, vector: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> ir.Value:
            (v,) = values
            while v.type.count > 1:
                n = v.type.count // 2
                v = combine(builder, select(builder, v, range(n)), select(builder, v, range(n, 2 * n)))
            return builder.extract_element(v, I32(0))

        return types.float32(vector), codegen

    return intrinsic(reduce)


def _maximum(builder: Any, a: ir.Value, b: ir.Value) -> ir.Value:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


total = _reduction(lambda builder, a, b: builder.fadd(a, b))
largest16 = _reduction(_maximum)
