"""From packed codes to tensor-core operands by table look-ups in registers.

`prmt d, a, b, s` picks four bytes of the eight in (a, b) by the four low nibbles of s: a look-up of four codes in a
table of eight bytes. Words come in the order "rows" of `pallas_kernels.fragments`, where four codes of one row lie in
half a word and so are their own selector, once the top bit of each nibble is clear (it would replicate the sign).

Tables of 16-bit entries are two planes of bytes, L (low) and H (high). Four look-ups of each become two registers:

    l = prmt(L, n), h = prmt(H, n)                       columns 2t, 2t+8, 2t+1, 2t+9 of one row
    a(2t, 2t+1)   = prmt(l, h, 0x6240)                   l0 h0 l2 h2
    a(2t+8, 2t+9) = prmt(l, h, 0x7351)                   l1 h1 l3 h3

Sixteen entries are two tables of eight: both are asked, and a third prmt takes byte j of the first or of the second
by the selector nibble j | 4 * (bit 3 of code j). Four entries of 16 bits fit one register pair (L, H), so there the
nibbles c and c + 4 fetch both bytes of a code at once, and c * 0x11 + 0x40 makes them by a multiplication, which costs
the integer pipe nothing. Tables of 8-bit entries have one plane, and what it gives is the operand of 8 bits.

8-bit entries e also make the operand of float16 inputs, exactly. Their tables then hold u = e + 128 (`biased_table`),
and four looked-up bytes are put under the exponent whose last place is worth 1, two at a time, and lose what the
exponent and the 128 brought, by a packed subtraction, which is no work of the integer pipe:

    prmt(u, 0x64646464, 0x4240) = 1024 + u0, 1024 + u2      columns 2t, 2t+1
    prmt(u, 0x64646464, 0x4341) = 1024 + u1, 1024 + u3      columns 2t+8, 2t+9
    a = that - 1152, both halves

Of bfloat16, whose mantissa has seven bits, a byte would need two exponents and so two more instructions.

Tables of 16-bit fixed-point numbers 256 h + l (`pallas_kernels.codebook_matmul.fixed_point`) make two operands of 8
bits, one of each plane, whose products have sums of their own: what puts the bytes together is then not needed.

Instructions of the integer pipe a weight (it can afford 1.7 at 4 bits and 1.3 at 3 bits at the bandwidth of an H200):

    bits                            2       3       4
    16-bit entries                  1.19    1.41    2.63
    8-bit entries, float16 inputs   1.06    1.16    1.88
    16-bit fixed point, 8-bit inputs 0.81   0.91    2.13
    8-bit entries, 8-bit inputs     0.56    0.66    1.38

Right shifts (0.44 of the first, else 0.31, 0.22 and 0.38 of these) can be had from the multiplier, too, as the high
half of a product; `Instructions.shift_right` chooses.

The functions are written over `Instructions`, so that the sequence proven on NumPy is the one that runs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# A lop3 table is the function's value on 0xF0 (a), 0xCC (b), 0xAA (c).
_AND_OR = 0xEA  # a & b | c

_EXPONENT = 0x64646464  # the high byte of the float16 numbers from 1024 to 1279
_EXPONENT_AND_BIAS = 0x64806480  # 1152 = 1024 + 128, twice

# (bits, bytes of an entry, bytes of an input): instructions of the integer pipe a weight, those of the module's table
INTEGER_OPERATIONS = {
    (2, 2, 2): 1.19,
    (3, 2, 2): 1.41,
    (4, 2, 2): 2.63,
    (2, 1, 2): 1.06,
    (3, 1, 2): 1.16,
    (4, 1, 2): 1.88,
    (2, 2, 1): 0.81,
    (3, 2, 1): 0.91,
    (4, 2, 1): 2.13,
    (2, 1, 1): 0.56,
    (3, 1, 1): 0.66,
    (4, 1, 1): 1.38,
}

Word = Any  # 32 bits: a value of the compiler's, or an array of NumPy's


class Instructions(Protocol):
    """The instructions that a decode is made of. Where a `Word` is expected an int is an immediate."""

    def logic(self, a: Word, b: Word, c: Word, table: int) -> Word:
        """lop3.b32: the bitwise function `table` of three words."""
        ...

    def mask(self, a: Word, mask: int) -> Word:
        """a & mask."""
        ...

    def permute(self, a: Word, b: Word, selector: Word) -> Word:
        """prmt.b32: byte i of the result is byte `selector >> 4i & 7` of (a, b), the lowest byte of a being 0."""
        ...

    def shift_right(self, a: Word, count: int) -> Word:
        """a >> count, zeros shifted in."""
        ...

    def shift_add(self, a: Word, count: int, addend: Word) -> Word:
        """(a >> count) + addend."""
        ...

    def multiply_add(self, a: Word, factor: int, addend: int) -> Word:
        """The low 32 bits of a * factor + addend."""
        ...

    def subtract_halves(self, a: Word, b: int) -> Word:
        """sub.rn.f16x2: a - b as two float16 numbers each."""
        ...


def table_planes(codebook: jax.Array) -> jax.Array:
    """Tables [N or 1, 2**bits] of 16 or 8 bits an entry as uint32 [planes, N or 1], the words `decode` looks up in.

    Byte j of plane word i is a byte of entry 4i + j: the low bytes of all entries first, then the high bytes if the
    entries have 16 bits. That makes 2**bits * bytes / 4 words a row.
    """
    size = codebook.dtype.itemsize
    if size not in (1, 2) or codebook.shape[1] not in (4, 8, 16):
        raise ValueError(
            f"a codebook {codebook.dtype}{list(codebook.shape)} has no planes; expected 4, 8 or 16 entries a row of "
            "8 or 16 bits"
        )
    bits = jax.lax.bitcast_convert_type(codebook, jnp.uint8 if size == 1 else jnp.uint16).astype(jnp.uint32)
    planes = [(bits >> jnp.uint32(8 * byte)) & jnp.uint32(255) for byte in range(size)]
    quads = jnp.concatenate(planes, axis=1).reshape(codebook.shape[0], -1, 4)
    word = quads[..., 0]
    for j in range(1, 4):
        word = word | (quads[..., j] << jnp.uint32(8 * j))
    return word.T


def words_per_thread(bits: int) -> tuple[int, ...]:
    """How many words of a tile a thread has in each of its planes."""
    return {2: (2,), 3: (2, 1), 4: (4,)}[bits]


def table_words(bits: int, entry_bytes: int) -> int:
    """Words of one row's table."""
    return 2**bits * entry_bytes // 4


def biased_table(table: Sequence[Word], flip: Callable[[Word, int], Word]) -> list[Word]:
    """The plane words of int8 entries e as those of unsigned e + 128, what float16 operands are made from."""
    return [flip(word, 0x80808080) for word in table]


def decode_tile(
    instructions: Instructions,
    words: Sequence[Word],
    tables: Sequence[Sequence[Word]],
    bits: int,
    entry_bytes: int,
    operand_bytes: int,
) -> list[list[Word]]:
    """The operand registers of one thread for a tile of 64 columns.

    words: the thread's words of the tile, plane after plane; tables: the plane words of rows r0 and r1, biased if 8-bit
    entries are to make 16-bit operands, which are float16 then.
    16-bit operands are four steps of m64k16, 8-bit operands two of m64k32, each [a0, a1, a2, a3]; of 16-bit entries in
    fixed point the two of the low bytes come before the two of the high ones.
    """
    if bits == 2 and entry_bytes == 2 and operand_bytes == 2:
        return _two_bits(instructions, words, tables)
    steps: list[list[Word]] = [[None] * 4 for _ in range(4)]  # [step][row, 2 + row]
    bytes_: list[list[Word]] = [[None] * 4 for _ in range(2 * entry_bytes)]
    for j, choose in enumerate(_selectors(instructions, words, bits)):
        u, row = divmod(j, 2)
        for v, selectors in enumerate(choose):
            planes = [
                _look_up(instructions, tables[row][i : i + 2**bits // 4], selectors)
                for i in range(0, table_words(bits, entry_bytes), 2**bits // 4)
            ]
            if operand_bytes == 1:
                for plane, found in enumerate(planes):
                    bytes_[2 * plane + u][row + 2 * v] = found
            elif entry_bytes == 1:
                for pair, selector in ((0, 0x4240), (2, 0x4341)):
                    raised = instructions.permute(planes[0], _EXPONENT, selector)
                    steps[2 * u + v][row + pair] = instructions.subtract_halves(raised, _EXPONENT_AND_BIAS)
            else:
                steps[2 * u + v][row] = instructions.permute(planes[0], planes[1], 0x6240)
                steps[2 * u + v][row + 2] = instructions.permute(planes[0], planes[1], 0x7351)
    return bytes_ if operand_bytes == 1 else steps


def _look_up(instructions: Instructions, table: Sequence[Word], selectors: Sequence[Word]) -> Word:
    """Four bytes of one plane, by the selector (and, of sixteen entries, the choice between the halves)."""
    first = instructions.permute(table[0], table[len(table) > 1], selectors[0])
    if len(table) <= 2:
        return first
    return instructions.permute(first, instructions.permute(table[2], table[3], selectors[0]), selectors[1])


def _selectors(instructions: Instructions, words: Sequence[Word], bits: int) -> list[list[list[Word]]]:
    """For n0..n3, for their low and their high half: the selector, followed at 4 bits by the choice of the half."""
    shift, mask = instructions.shift_right, instructions.mask
    if bits == 4:
        found = []
        for word in words:
            pair = [
                mask(word, 0x77777777),
                instructions.logic(shift(word, 1), 0x44444444, 0x32103210, _AND_OR),
            ]
            found.append([pair, [shift(half, 16) for half in pair]])
        return found
    if bits == 3:
        nibbles = [mask(word, 0x77777777) for word in words]
        stolen = [mask(word, 0x88888888) for word in words]
        last = instructions.shift_add(stolen[2], 1, stolen[1])
        last = instructions.shift_add(last, 1, stolen[0])
        nibbles.append(shift(last, 1))
    else:
        nibbles = [mask(half, 0x33333333) for word in words for half in (word, shift(word, 2))]
    return [[[word], [shift(word, 16)]] for word in nibbles]


def _two_bits(instructions: Instructions, words: Sequence[Word], tables: Sequence[Sequence[Word]]) -> list[list[Word]]:
    """Each byte of a masked word is a code; its two nibbles select both bytes of the entry."""
    steps: list[list[Word]] = [[None] * 4 for _ in range(4)]
    for u, word in enumerate(words):
        for register in range(4):  # row r0 or r1, then columns +0 or +8: two bits further each
            row, place = register % 2, 2 * (register % 2) + 4 * (register // 2)
            codes = instructions.mask(instructions.shift_right(word, place) if place else word, 0x03030303)
            both = instructions.multiply_add(codes, 0x11, 0x40404040)
            for v, selector in enumerate((both, instructions.shift_right(both, 16))):
                steps[2 * u + v][register] = instructions.permute(tables[row][0], tables[row][1], selector)
    return steps
