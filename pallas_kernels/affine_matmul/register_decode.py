"""From packed words to the register operand of the tensor core, in two stages; layouts in `pallas_kernels.fragments`.

1. `read_tile`: a thread reads its share of a 64 x 64 tile, four nibble words n0..n3 for 2, 3 and 4 bits (a code of b
   bits in the low b bits of every nibble; other bits are set to zero), eight byte words for 8 bits.
2. `half_fragments` or `byte_fragments`: those words become the A registers, four for each instruction.

16-bit operands, order "pairs". Two codes q of a word are isolated as halves and put under an exponent in the same
instruction; subtracting the same number plus the zero point is exact:

    bf16   0x4300 | q = 128 + q        f16   0x6400 | q = 1024 + q
    (0x43004300 | n >> 4i & 0x000f000f) - (128 + zero)      i = 0..3

A bfloat16 has seven bits of mantissa, so the eighth bit of a byte is subtracted as a number of its own. With a whole
scale s up to 16 a group, 4 bits become (q - 8) s by one multiply-add: 136 s and 1032 s have few enough bits.

8-bit operands. Even nibbles of n_s are row r0, odd ones row r1. Without zeros the code less 2**(b - 1) is put in the
topmost bits of its byte: the operand is 2**(8 - b) times the weight (`byte_factor`), three instructions for 8 codes.
With zeros: (q | 0x80) - zero per byte borrows nothing, and flipping the top bit makes it q - zero, signed.
With a whole scale s up to 16 a group, which 8 bits have room for: q s + (128 - h s), h = 2**(b - 1), is between 0 and
255 in every byte, so one multiply-add of words does four of them, and flipping the top bit makes it (q - h) s.
"""

from collections.abc import Sequence

from pallas_kernels.affine_matmul import instructions as ops
from pallas_kernels.compat import Value, arith, constant

_EXPONENT = {"bf16": 0x4300, "f16": 0x6400}  # 128 and 1024: the last place of the mantissa is worth 1


def byte_factor(bits: int, has_zeros: bool, two_level: bool = False) -> int:
    """How many times the weight an 8-bit operand is, or with scales in two levels the weight of step 1."""
    return 1 if has_zeros or two_level else 2 ** (8 - bits)


def read_tile(base: Value, thread: Value, tile: int, bits: int) -> list[Value]:
    """The words of thread `thread` (0..127) of a tile, the `tile`th from the byte address `base` of shared memory."""
    start = tile * 512 * bits
    if bits == 4:
        return ops.load_shared(base, _place(thread, 16, start), 4)
    if bits == 8:
        halves = [ops.load_shared(base, _place(thread, 16, start + 2048 * u), 4) for u in range(2)]
        return halves[0] + halves[1]
    planes = ops.load_shared(base, _place(thread, 8, start), 2)
    return planes if bits == 2 else planes + ops.load_shared(base, _place(thread, 4, start + 1024), 1)


def nibble_words(words: Sequence[Value], bits: int) -> list[Value]:
    """n0..n3, from what `read_tile` gives for 2, 3 or 4 bits."""
    if bits == 4:
        return list(words)
    low = [ops.and_(ops.shift(words[j // 2], -2 * (j % 2)), 0x33333333) for j in range(4)]
    if bits == 2:
        return low
    return [ops.merge(ops.shift(words[2], 2 - j), 0x44444444, low[j]) for j in range(4)]


def half_zeros(zero: Value | None, bits: int, operand: ops.Operand) -> Value:
    """What is subtracted from both halves of a register: exponent plus zero point. zero: integer register or None."""
    exponent = _EXPONENT[operand]
    if bits == 8 and operand == "bf16":  # read with its top bit split off: already less 128
        if zero is None:
            return constant(0)
        # (zero - 128) is exact in bfloat16
        shifted = ops.to_float(arith.subi(zero, constant(128)))
        return ops.pack_twice(shifted, operand)
    if zero is None:
        return constant((exponent + 2 ** (bits - 1)) * 0x00010001)
    return arith.muli(arith.addi(zero, constant(exponent)), constant(0x00010001))


def half_multiples(scale: Value, operand: ops.Operand) -> tuple[Value, Value]:
    """A whole scale, and what a multiply-add of 4-bit codes needs beside it, as two equal 16-bit floats each."""
    factor = ops.to_float(scale)
    middle = ops.multiply(factor, ops.float_constant(-136.0 if operand == "bf16" else -1032.0))
    return ops.pack_twice(factor, operand), ops.pack_twice(middle, operand)


def half_fragments(
    words: Sequence[Value],
    bits: int,
    operand: ops.Operand,
    zeros: Sequence[Value],
    has_zeros: bool,
    multiples: Sequence[tuple[Value, Value]] | None = None,
) -> list[list[Value]]:
    """A of the four m64k16 of a tile: registers (r0; 2t, 2t+1), (r1; same), (r0; 2t+8, 2t+9), (r1; same).

    zeros: what `half_zeros` gives for rows r0, r1; multiples, instead of these: what `half_multiples` does.
    """
    exponent = _EXPONENT[operand] * 0x00010001
    fragments = []
    if bits != 8:
        for word in nibble_words(words, bits):
            codes = [ops.and_or(ops.shift(word, -4 * i), 0x000F000F, exponent) for i in range(4)]
            if multiples is None:
                fragments.append([ops.packed("sub", code, zeros[i % 2], operand) for i, code in enumerate(codes)])
            else:
                pairs = [multiples[i % 2] for i in range(4)]
                fragments.append(
                    [ops.packed_multiply_add(c, *pair, operand) for c, pair in zip(codes, pairs, strict=True)]
                )
    else:
        for step in range(4):
            registers = []
            for i in range(4):  # words of a step: r0, r1; bytes 0, 2 are columns 2t, 2t+1, bytes 1, 3 are 2t+8, 2t+9
                row, second = i % 2, i // 2
                word = ops.shift(words[2 * step + row], -8 * second)
                registers.append(_byte_pair(word, operand, zeros[row], has_zeros))
            fragments.append(registers)
    return fragments


def scaled(fragments: Sequence[Sequence[Value]], scales: Sequence[Value], operand: ops.Operand) -> list[list[Value]]:
    """16-bit operands times a scale each row, two equal 16-bit floats for r0 and for r1."""
    return [[ops.packed("mul", a, scales[i % 2], operand) for i, a in enumerate(step)] for step in fragments]


def byte_zeros(zero: Value) -> Value:
    """A zero point in every byte of a register."""
    return arith.muli(zero, constant(0x01010101))


def byte_multiples(scale: Value, bits: int) -> tuple[Value, Value]:
    """A whole scale, and what its multiplication needs beside it."""
    middle = constant(-(2 ** (bits - 1)) * 0x01010101 % 2**32)
    return scale, arith.addi(arith.muli(scale, middle), constant(0x80808080))


def byte_fragments(
    words: Sequence[Value],
    bits: int,
    zeros: Sequence[Value] | None,
    multiples: Sequence[tuple[Value, Value]] | None = None,
) -> list[list[Value]]:
    """A of the two m64k32 of a tile: registers (r0; step 2u), (r1; same), (r0; step 2u+1), (r1; same).

    zeros, multiples: what `byte_zeros` or `byte_multiples` gives for rows r0, r1; None if there are none of them. 8
    bits have neither.
    """
    if bits == 8:
        signed = [ops.xor(word, 0x80808080) for word in words]
        return [signed[:4], signed[4:]]
    rows = []
    for word in nibble_words(words, bits):
        for row in range(2):
            if multiples is not None:
                code, (scale, middle) = ops.and_(ops.shift(word, -4 * row), 0x0F0F0F0F), multiples[row]
                rows.append(ops.xor(arith.addi(arith.muli(code, scale), middle), 0x80808080))
            elif zeros is None:
                top = ((1 << bits) - 1 << (8 - bits)) * 0x01010101
                rows.append(ops.and_xor(ops.shift(word, 8 - bits - 4 * row), top, 0x80808080))
            else:
                code = ops.and_or(ops.shift(word, -4 * row), 0x0F0F0F0F, 0x80808080)
                rows.append(ops.xor(ops.subtract_words(code, zeros[row]), 0x80808080))
    return [rows[:4], rows[4:]]


def _byte_pair(word: Value, operand: ops.Operand, zero: Value, has_zeros: bool) -> Value:
    """Two weights from bytes 0 and 2 of a word."""
    if operand == "f16":
        code = ops.and_or(word, 0x00FF00FF, 0x64006400)
        return ops.packed("sub", code, zero, operand)
    low = ops.and_or(word, 0x007F007F, 0x43004300)  # 128 + (q & 127)
    high = ops.and_xor(word, 0x00800080, 0x43804380)  # 256 less q & 128
    signed = ops.packed("sub", low, high, operand)  # q - 128
    return ops.packed("sub", signed, zero, operand) if has_zeros else signed


def _place(thread: Value, stride: int, start: int) -> Value:
    return arith.addi(arith.muli(thread, constant(stride)), constant(start))
