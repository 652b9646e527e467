"""Arithmetic of the CPU kernels' vectors: exp, softplus and SiLU as the instructions that are written here.

In float32 exponentials are polynomials of degree 5, to 1e-7 of their value; in float64 they are LLVM's.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic, overload

from model.ops.fused_cpu.vectors import Vector

LOG2E = math.log2(math.e)
# 2^f = 1 + f q(f) for |f| ≤ 1/2, to 9e-8 of its value and far closer near 0: exact steps of small size.
POWER = (0.6931469775987157, 0.24022242084635148, 0.05550733743574582, 0.009671512688145305, 0.0013264727246967145)
ROUND = 1.5 * 2.0**23  # added to a small float32, it leaves the nearest integer in the lowest bits
LINEAR = 20.0  # softplus is the identity above
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4


def _constant(like: ir.VectorType, value: float) -> ir.Constant:
    value = float(np.float32(value)) if like.element == ir.FloatType() else value
    return ir.Constant(like, [value] * like.count)


def _call(builder: ir.IRBuilder, name: str, *inputs: ir.Value) -> ir.Value:
    """LLVM's function of that name for vectors, such as llvm.exp.v16f64."""
    like = inputs[0].type
    kind = ir.FunctionType(like, [like] * len(inputs))
    suffix = f"v{like.count}f{32 if like.element == ir.FloatType() else 64}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}"), inputs)


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


def _sigmoid(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    small, one = _exp(builder, builder.fneg(_call(builder, "fabs", x))), _constant(x.type, 1.0)
    # 0 far below, where _exp has its least value, so that x times it is 0, too.
    small = builder.select(builder.fcmp_ordered("<", x, _constant(x.type, -87.0)), _constant(x.type, 0.0), small)
    return builder.fdiv(_below(builder, x, 0.0, small, one), builder.fadd(one, small))


def _silu(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return builder.fmul(x, _sigmoid(builder, x))


def _silu_slope(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """s + x s (1 - s) with s the sigmoid of x."""
    s = _sigmoid(builder, x)
    rest = builder.fsub(_constant(x.type, 1.0), s)
    return _call(builder, "fmuladd", builder.fmul(x, s), rest, s)


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
silu = _operation(1, _silu)
silu_slope = _operation(1, _silu_slope)


@overload(operator.add)
def _add(x, y):  # Numba wants the same signature inside
    return (lambda x, y: add(x, y)) if isinstance(x, Vector) and x == y else None


@overload(operator.mul)
def _multiply(x, y):
    return (lambda x, y: multiply(x, y)) if isinstance(x, Vector) and x == y else None
