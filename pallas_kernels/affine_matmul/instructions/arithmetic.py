"""Arithmetic on 32-bit registers, integers or floats, and within a warp.

Integer and packed 16-bit arithmetic is spelled in PTX where the instruction count matters: one `lop3` does any function
of three bits, so masking a nibble and putting an exponent over it is one instruction.
"""

import struct
from typing import Literal

from pallas_kernels import compat
from pallas_kernels.compat import Value

Operand = Literal["bf16", "f16", "s8"]

_AND_OR = 0xEA  # a & b | c
_AND_XOR = 0x6A  # (a & b) ^ c


def and_or(word: Value, mask: int, value: int) -> Value:
    """word & mask | value, in one instruction."""
    return _lop3(word, mask, value, _AND_OR)


def and_xor(word: Value, mask: int, value: int) -> Value:
    """(word & mask) ^ value, in one instruction."""
    return _lop3(word, mask, value, _AND_XOR)


def merge(word: Value, mask: int, other: Value) -> Value:
    """word & mask | other."""
    return compat.inline_assembly(
        [compat.i32()], [word, other], f"lop3.b32 $0, $1, {mask}, $2, {_AND_OR};", "=r,r,r", True
    )[0]


def and_(word: Value, mask: int) -> Value:
    return compat.arith.andi(word, compat.constant(mask))


def shift(word: Value, left: int) -> Value:
    """word << left, or >> -left, zeros coming in."""
    if left == 0:
        return word
    operation = compat.arith.shli if left > 0 else compat.arith.shrui
    return operation(word, compat.constant(abs(left)))


def xor(word: Value, value: int) -> Value:
    return compat.arith.xori(word, compat.constant(value))


def subtract_words(a: Value, b: Value) -> Value:
    return compat.arith.subi(a, b)


def packed(operation: Literal["sub", "mul"], a: Value, b: Value, operand: Operand) -> Value:
    """Two 16-bit floats at a time, rounded to nearest."""
    name = f"{operation}.rn.bf16x2" if operand == "bf16" else f"{operation}.rn.f16x2"
    return compat.inline_assembly([compat.i32()], [a, b], f"{name} $0, $1, $2;", "=r,r,r", True)[0]


def packed_multiply_add(a: Value, b: Value, c: Value, operand: Operand) -> Value:
    """a * b + c of two 16-bit floats at a time, rounded once."""
    name = "fma.rn.bf16x2" if operand == "bf16" else "fma.rn.f16x2"
    return compat.inline_assembly([compat.i32()], [a, b, c], f"{name} $0, $1, $2, $3;", "=r,r,r,r", True)[0]


def pack_twice(value: Value, operand: Operand) -> Value:
    """A float32 register as two equal 16-bit floats."""
    text = f"cvt.rn.{operand}x2.f32 $0, $1, $1;"
    return compat.inline_assembly([compat.i32()], [value], text, "=r,f", True)[0]


def pack_pair(low: Value, high: Value, operand: Operand) -> Value:
    """Two float32 registers as 16-bit floats in one."""
    text = f"cvt.rn.{operand}x2.f32 $0, $2, $1;"
    return compat.inline_assembly([compat.i32()], [low, high], text, "=r,f,f", True)[0]


def multiply_add(a: Value, b: Value, c: Value) -> Value:
    """a * b + c in float32, rounded once."""
    return compat.inline_assembly([compat.f32()], [a, b, c], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", True)[0]


def replaced(register: Value, value: float) -> Value:
    """A constant instead of a finite float32 register, by a multiply-add: on Hopper twice as fast as a move."""
    zero, constant = (f"0f{struct.unpack('>I', struct.pack('>f', each))[0]:08x}" for each in (0.0, value))
    text = f"fma.rn.f32 $0, $1, {zero}, {constant};"
    return compat.inline_assembly([compat.f32()], [register], text, "=f,f", True)[0]


def multiply(a: Value, b: Value) -> Value:
    return compat.arith.mulf(a, b)


def add(a: Value, b: Value) -> Value:
    return compat.arith.addf(a, b)


def divide(value: Value, divisor: float) -> Value:
    """value / divisor, correctly rounded."""
    text = "div.rn.f32 $0, $1, $2;"
    return compat.inline_assembly([compat.f32()], [value, float_constant(divisor)], text, "=f,f,f", True)[0]


def reciprocal(value: Value) -> Value:
    """1 / value, correctly rounded."""
    return compat.inline_assembly([compat.f32()], [value], "rcp.rn.f32 $0, $1;", "=f,f", True)[0]


def float_constant(value: float) -> Value:
    return compat.arith.constant(compat.f32(), compat.ir.FloatAttr.get(compat.f32(), value))


def to_float(integer: Value) -> Value:
    """A signed integer as float32."""
    return compat.arith.sitofp(compat.f32(), integer)


def half_to_float(value: Value) -> Value:
    """The float16 in the lower half of a register, as float32."""
    text = "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, low; }"
    return compat.inline_assembly([compat.f32()], [value], text, "=f,r", True)[0]


def as_float(word: Value) -> Value:
    """The float32 of these bits."""
    return compat.arith.bitcast(compat.f32(), word)


def as_word(value: Value) -> Value:
    """The bits of a float32."""
    return compat.arith.bitcast(compat.i32(), value)


def permute(a: Value, b: Value, selector: int) -> Value:
    """Four of the bytes of b and a, which are numbered from the lowest of a; a digit of the selector each."""
    return compat.inline_assembly([compat.i32()], [a, b], f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", True)[0]


def where_below(value: Value, bound: int, below: Value, other: Value) -> Value:
    """below if an unsigned register is less than `bound`, else other."""
    text = f"{{ .reg .pred p; setp.lt.u32 p, $1, {bound}; selp.b32 $0, $2, $3, p; }}"
    return compat.inline_assembly([compat.i32()], [value, below, other], text, "=r,r,r,r", True)[0]


def larger_halves(a: Value, b: Value) -> Value:
    """The larger of two unsigned numbers of 16 bits, twice."""
    return compat.inline_assembly([compat.i32()], [a, b], "max.u16x2 $0, $1, $2;", "=r,r,r", True)[0]


def largest_of_warp(value: Value) -> Value:
    """The largest of an unsigned register of all threads of a warp."""
    text = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    return compat.inline_assembly([compat.i32()], [value], text, "=r,r", False)[0]


def sum_of_four(value: Value) -> Value:
    """The sum of a float32 register over the four threads that hold the same rows of a product."""
    text = (
        "{ .reg .f32 other; shfl.sync.bfly.b32 other, $1, 1, 0x1f, 0xffffffff; add.f32 $0, $1, other; "
        "shfl.sync.bfly.b32 other, $0, 2, 0x1f, 0xffffffff; add.f32 $0, $0, other; }"
    )
    return compat.inline_assembly([compat.f32()], [value], text, "=&f,f", False)[0]


def _lop3(word: Value, mask: int, value: int, table: int) -> Value:
    text = f"lop3.b32 $0, $1, {mask}, {value}, {table};"
    return compat.inline_assembly([compat.i32()], [word], text, "=r,r", True)[0]
