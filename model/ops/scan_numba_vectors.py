"""Vectors of channels for the CPU kernels: a Numba type whose values are LLVM vectors, with its arithmetic.

Numba has no such type and LLVM's own vectorization is not to be relied on. Here each operation is one vector
instruction, or as many as the processor's registers need, in the order in which it is written: no sum is reordered.
Memory is addressed by numbers: an address and the index of an element.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 32 if llvm.get_host_cpu_features().get("avx512f") else 16
X86 = llvm.get_process_triple().startswith("x86_64")
FLUSH = 0x8040  # bits of the register MXCSR: denormal inputs and results count as zero
LOG2E = math.log2(math.e)
# 2^f = 1 + f q(f) for |f| ≤ 1/2, to 9e-8 of its value and far closer near 0: exact steps of small size.
POWER = (0.6931469775987157, 0.24022242084635148, 0.05550733743574582, 0.009671512688145305, 0.0013264727246967145)
ROUND = 1.5 * 2.0**23  # added to a small float32, it leaves the nearest integer in the lowest bits
LINEAR = 20.0  # softplus is the identity above
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4


class Vector(types.Type):
    """`lanes` numbers of type `base`, float32 or float64."""

    def __init__(self, base: types.Float, lanes: int = LANES) -> None:
        self.base, self.lanes = base, lanes
        super().__init__(name=f"Vector({base}, {lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(ir.FloatType() if self.base == types.float32 else ir.DoubleType(), self.lanes)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """In memory and as an argument a vector is LLVM's."""

    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def _constant(like: ir.VectorType, value: float) -> ir.Constant:
    value = float(np.float32(value)) if like.element == ir.FloatType() else value
    return ir.Constant(like, [value] * like.count)


def _call(builder: ir.IRBuilder, name: str, *inputs: ir.Value) -> ir.Value:
    """LLVM's function of that name for vectors, such as llvm.exp.v16f64."""
    like = inputs[0].type
    kind = ir.FunctionType(like, [like] * len(inputs))
    suffix = f"v{like.count}f{32 if like.element == ir.FloatType() else 64}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}"), inputs)


def _pointer(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, bits: int, to: ir.Type) -> ir.Value:
    offset = builder.mul(index, ir.Constant(index.type, bits // 8))
    return builder.inttoptr(builder.add(base, offset), to.as_pointer())


def _of(like: types.Type) -> Vector:
    return like if isinstance(like, Vector) else Vector(like)


@intrinsic
def load(_, base, index, like):
    """The vector at an element; its type is `like`'s, or that of vectors of the number `like`."""
    vector = _of(like)
    bits = vector.base.bitwidth

    def generate(context, builder, signature, values):
        return builder.load(_pointer(builder, values[0], values[1], bits, vector.llvm), align=bits // 8)

    return vector(types.int64, types.int64, like), generate


@intrinsic
def store(_, base, index, value):
    """Write a vector to an element."""
    bits = value.base.bitwidth

    def generate(context, builder, signature, values):
        builder.store(values[2], _pointer(builder, values[0], values[1], bits, value.llvm), align=bits // 8)

    return types.void(types.int64, types.int64, value), generate


@intrinsic
def read(_, base, index, like):
    """The number at an element, of the type of `like`."""
    like = types.unliteral(like)

    def generate(context, builder, signature, values):
        return builder.load(_pointer(builder, values[0], values[1], like.bitwidth, context.get_value_type(like)))

    return like(types.int64, types.int64, like), generate


@intrinsic
def write(_, base, index, value):
    """Write a number to an element."""

    def generate(context, builder, signature, values):
        builder.store(values[2], _pointer(builder, values[0], values[1], value.bitwidth, values[2].type))

    return types.void(types.int64, types.int64, value), generate


@intrinsic
def take_one(_: Any, address: Any) -> Any:
    """The integer at an address, which becomes one larger; no two threads get the same."""

    def generate(context, builder, signature, values):
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def splat(_: Any, number: Any) -> Any:
    """A vector of equal numbers."""
    vector = Vector(number)

    def generate(context, builder, signature, values):
        one = builder.insert_element(ir.Constant(vector.llvm, ir.Undefined), values[0], ir.Constant(ir.IntType(32), 0))
        first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(one, ir.Constant(vector.llvm, ir.Undefined), first)

    return vector(number), generate


def _operation(arity: int, emit: Callable[..., ir.Value]) -> Any:
    """An intrinsic of equal vectors, whose result is such a vector."""

    def generate(context, builder, signature, values):
        return emit(builder, *values)

    def one(_: Any, x: Any) -> Any:
        return x(x), generate

    def two(_: Any, x: Any, y: Any) -> Any:
        return x(x, y), generate

    def three(_: Any, x: Any, y: Any, z: Any) -> Any:
        return x(x, y, z), generate

    return intrinsic({1: one, 2: two, 3: three}[arity])


def _at_least(builder: ir.IRBuilder, x: ir.Value, bound: float) -> ir.Value:
    """max(x, bound), and NaN for NaN."""
    limit = _constant(x.type, bound)
    return builder.select(builder.fcmp_ordered("<", x, limit), limit, x)


def _scaled_power(builder: ir.IRBuilder, f: ir.Value, rounded: ir.Value) -> ir.Value:
    """2^(f + n) in float32, |f| ≤ 1/2; the lowest bits of `rounded` are n, which goes into the exponent's bits."""
    q = _constant(f.type, POWER[-1])
    for factor in (*reversed(POWER[:-1]), 1.0):
        q = _call(builder, "fmuladd", q, f, _constant(f.type, factor))
    whole = ir.VectorType(ir.IntType(32), f.type.count)
    shift, one = (ir.Constant(whole, [bits] * f.type.count) for bits in (23, 127 << 23))
    scale = builder.add(builder.shl(builder.bitcast(rounded, whole), shift), one)
    return builder.fmul(q, builder.bitcast(scale, f.type))  # a product, as that keeps NaN


def _exp2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    if x.type.element != ir.FloatType():
        return _call(builder, "exp2", x)
    x = _at_least(builder, x, -126.0)  # below, numbers are denormal: as good as 0
    most = _constant(x.type, 128.0)
    x = builder.select(builder.fcmp_ordered(">", x, most), most, x)  # 2^128 is infinite
    rounded = builder.fadd(x, _constant(x.type, ROUND))
    f = builder.fsub(x, builder.fsub(rounded, _constant(x.type, ROUND)))
    return _scaled_power(builder, f, rounded)


def _exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    if x.type.element != ir.FloatType():
        return _call(builder, "exp", x)
    x = _at_least(builder, x, -87.0)
    rounded = _call(builder, "fmuladd", x, _constant(x.type, LOG2E), _constant(x.type, ROUND))
    n = builder.fsub(rounded, _constant(x.type, ROUND))
    rest = _call(builder, "fmuladd", n, _constant(x.type, -LN2_HIGH), x)
    rest = _call(builder, "fmuladd", n, _constant(x.type, -LN2_LOW), rest)
    return _scaled_power(builder, builder.fmul(rest, _constant(x.type, LOG2E)), rounded)


def _log1p(builder: ir.IRBuilder, z: ir.Value) -> ir.Value:
    """log(1 + z) for 0 ≤ z ≤ 1, as 2 artanh s = 2 (s + s³/3 + s⁵/5 + …) with s = z / (2 + z) ≤ 1/3."""
    s = builder.fdiv(z, builder.fadd(z, _constant(z.type, 2.0)))
    square = builder.fmul(s, s)
    odd = range(15 if z.type.element == ir.FloatType() else 35, 0, -2)
    total = _constant(z.type, 0.0)
    for number in odd:
        total = _call(builder, "fmuladd", total, square, _constant(z.type, 2.0 / number))
    return builder.fmul(total, s)


def _softplus(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    small = _exp(builder, builder.fneg(_call(builder, "fabs", x)))
    soft = builder.fadd(_at_least(builder, x, 0.0), _log1p(builder, small))
    return _below(builder, x, LINEAR, soft, x)


def _softplus_slope(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    small, one = _exp(builder, builder.fneg(_call(builder, "fabs", x))), _constant(x.type, 1.0)
    slope = builder.fdiv(_below(builder, x, 0.0, small, one), builder.fadd(one, small))
    return _below(builder, x, LINEAR, slope, one)


def _below(builder: ir.IRBuilder, x: ir.Value, bound: float, then: ir.Value, other: ir.Value) -> ir.Value:
    """`then` where x ≤ bound, or `other`; NaN counts as not above."""
    return builder.select(builder.fcmp_ordered(">", x, _constant(x.type, bound)), other, then)


add = _operation(2, lambda builder, x, y: builder.fadd(x, y))
multiply = _operation(2, lambda builder, x, y: builder.fmul(x, y))
fma = _operation(3, lambda builder, x, y, z: _call(builder, "fmuladd", x, y, z))  # x y + z
times_log2e = _operation(1, lambda builder, x: builder.fmul(x, _constant(x.type, LOG2E)))
exp2 = _operation(1, _exp2)  # float32: to 1e-7 of its value
softplus = _operation(1, _softplus)  # x above 20, as torch has it
softplus_slope = _operation(1, _softplus_slope)


@overload(operator.add)
def _add(x, y):  # Numba wants the same signature inside
    return (lambda x, y: add(x, y)) if isinstance(x, Vector) and x == y else None


@overload(operator.mul)
def _multiply(x, y):
    return (lambda x, y: multiply(x, y)) if isinstance(x, Vector) and x == y else None


@intrinsic
def fold(_: Any, vector: Any) -> Any:
    """Half as many lanes: the sums of those of the first and the second half."""
    half = Vector(vector.base, vector.lanes // 2)

    def generate(context, builder, signature, values):
        return _halves(builder, values[0])

    return half(vector), generate


@intrinsic
def total(_: Any, vector: Any) -> Any:
    """The sum of all lanes, always in the same order."""

    def generate(context, builder, signature, values):
        x = values[0]
        while x.type.count > 1:
            x = _halves(builder, x)
        return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))

    return vector.base(vector), generate


def _halves(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    count = x.type.count // 2
    index = ir.VectorType(ir.IntType(32), count)
    parts = [
        builder.shuffle_vector(x, x, ir.Constant(index, list(range(first, first + count)))) for first in (0, count)
    ]
    return builder.fadd(*parts)


@intrinsic
def control(_: Any, place: Any) -> Any:
    """The processor's setting for denormal numbers in this thread; `place` is the address of four free bytes."""

    def generate(context, builder, signature, values):
        if not X86:  # elsewhere denormals are as fast as other numbers
            return ir.Constant(ir.IntType(32), 0)
        pointer = builder.inttoptr(values[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.stmxcsr"), [pointer])
        return builder.load(builder.bitcast(pointer, ir.IntType(32).as_pointer()))

    return types.int32(types.int64), generate


@intrinsic
def set_control(_: Any, place: Any, setting: Any) -> Any:
    """Change that setting."""

    def generate(context, builder, signature, values):
        if not X86:
            return
        pointer = builder.inttoptr(values[0], ir.IntType(8).as_pointer())
        builder.store(values[1], builder.bitcast(pointer, ir.IntType(32).as_pointer()))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.ldmxcsr"), [pointer])

    return types.void(types.int64, types.int32), generate
