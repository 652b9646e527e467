"""Vectors of channels for the CPU kernels: a Numba type whose values are LLVM vectors, with its arithmetic.

Numba has no such type and LLVM's own vectorization is not to be relied on. Here each operation is one vector
instruction, or as many as the processor's registers need, in the order in which it is written: no sum is reordered.
Memory is addressed by numbers: an address and the index of an element.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 32 if llvm.get_host_cpu_features().get("avx512f") else 16
X86 = llvm.get_process_triple().startswith("x86_64")
FLUSH = 0x8040  # bits of the register MXCSR: denormal inputs and results count as zero


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
