"""The instructions of `decode` as PTX on the registers of a kernel.

Look-ups keep the integer pipe busy, and a right shift by k is the high half of a product with 2**(32 - k), which
the multiplier computes. The assembler would turn a product with a known power of two back into a shift; so the factor
comes from a register whose value it cannot know (`unknown_one`).
"""

from typing import Any

from pallas_kernels import compat
from pallas_kernels.compat import Value, constant, inline_assembly


def unknown_one() -> Value:
    """A register that holds 1: one more than the number of multiprocessors divided by 2**24."""
    text = "{ .reg .b32 count; mov.u32 count, %nsmid; shr.u32 count, count, 24; add.u32 $0, count, 1; }"
    # not pure, so that it is computed once and kept
    return inline_assembly([compat.i32()], [], text, "=r", False)[0]


class Registers:
    """`Instructions` on MLIR values. one: what `unknown_one` gave, to shift by multiplications; None shifts."""

    def __init__(self, one: Value | None = None):
        self._one = one
        self._powers: dict[int, Value] = {}

    def logic(self, a: Value, b: Value, c: Value, table: int) -> Value:
        return _instruction("lop3.b32", a, b, c, table)

    def mask(self, a: Value, mask: int) -> Value:
        return _instruction("and.b32", a, mask)

    def permute(self, a: Value, b: Value, selector: Value) -> Value:
        return _instruction("prmt.b32", a, b, selector)

    def shift_right(self, a: Value, count: int) -> Value:
        if self._one is None:
            return _instruction("shr.u32", a, count)
        return _instruction("mul.hi.u32", a, self._power(count))

    def shift_add(self, a: Value, count: int, addend: Value) -> Value:
        if self._one is None:
            return _instruction("add.u32", _instruction("shr.u32", a, count), addend)
        return _instruction("mad.hi.u32", a, self._power(count), addend)

    def multiply_add(self, a: Value, factor: int, addend: int) -> Value:
        return _instruction("mad.lo.u32", a, factor, addend)

    def subtract_halves(self, a: Value, b: int) -> Value:
        return _instruction("sub.rn.f16x2", a, constant(b))

    def _power(self, count: int) -> Value:
        if count not in self._powers:
            self._powers[count] = _instruction("shl.b32", self._one, 32 - count)
        return self._powers[count]


def _instruction(name: str, *operands: Any) -> Value:
    """One instruction; ints are immediates."""
    values = [operand for operand in operands if not isinstance(operand, int)]
    texts, place = [], 1
    for operand in operands:
        if isinstance(operand, int):
            texts.append(hex(operand))
        else:
            texts.append(f"${place}")
            place += 1
    constraints = ",".join(["=r"] + ["r"] * len(values))
    return inline_assembly([compat.i32()], values, f"{name} $0, {', '.join(texts)};", constraints, True)[0]
