"""The codebook as the kernel's decoder: tables of two rows in the registers of a thread.

A thread loads the tables of its rows r0 and r1 once for a block of outputs, [planes] words a row, while it still works
on the block before, and looks every code of the block up in them (`pallas_kernels.codebook_matmul.decode`). If the
whole matrix has one table, both rows share its registers. Tables of 8-bit entries serve 8-bit and float16 operands
alike: for the latter the entries' sign bits are flipped as they are loaded.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.affine_matmul.epilogue import row_of
from pallas_kernels.codebook_matmul.decode import biased_table, decode_tile, table_words
from pallas_kernels.codebook_matmul.registers import Registers, unknown_one
from pallas_kernels.compat import Value, arith, constant


class TableDecoder:
    """Decodes tiles of `bits`-bit codes into operands of `operand_bytes`; tables are words [planes, rows] of entries of
    `entry_bytes`, rows = 1 if all outputs share one. multiplier: shift by multiplications, see
    `pallas_kernels.codebook_matmul.registers`."""

    def __init__(self, bits: int, entry_bytes: int, operand_bytes: int, rows: int, multiplier: bool):
        self.bits, self.entry_bytes, self.operand_bytes = bits, entry_bytes, operand_bytes
        self.rows, self.multiplier = rows, multiplier
        self.planes = table_words(bits, entry_bytes)
        self.registers = self.planes * (1 if rows == 1 else 2) + multiplier

    def load(self, tables: Any, first_row: Any) -> Any:
        """The state of every thread for the 64 outputs from first_row; for outputs past the end, of the last ones."""

        def load(_: Any, tables: Value, first_row: Any) -> Any:
            base = compat.address(tables)
            rows = [constant(0)] if self.rows == 1 else _own_rows(compat.scalar_of(first_row), self.rows)
            # every word of a plane, then the next plane: the addresses differ by a constant
            words = [_load_word(base, row, 4 * plane * self.rows) for row in rows for plane in range(self.planes)]
            if self.entry_bytes < self.operand_bytes:
                words = biased_table(words, lambda word, mask: arith.xori(word, constant(mask)))
            return compat.array_of(words + [unknown_one()] * self.multiplier)

        layout = compat.registers_type(self.registers, jnp.int32)
        run: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), compat.SCALAR), return_type=layout)(load)
        return run(tables, first_row)

    def fragments(self, words: list[Value], state: list[Value]) -> list[list[Value]]:
        """The operand registers of a tile, four an instruction."""
        tables = [
            state[: self.planes],
            state[: self.planes] if self.rows == 1 else state[self.planes : 2 * self.planes],
        ]
        instructions = Registers(state[-1] if self.multiplier else None)
        return decode_tile(instructions, words, tables, self.bits, self.entry_bytes, self.operand_bytes)


def _own_rows(first_row: Value, rows: int) -> list[Value]:
    """Rows r0 = first_row + 16 * warp + lane // 4 and r1 = r0 + 8 of a thread, less than `rows`."""
    row = arith.addi(first_row, row_of(compat.thread_in_warpgroup()))
    return [arith.minui(own, constant(rows - 1)) for own in (row, arith.addi(row, constant(8)))]


def _load_word(base: Value, index: Value, offset: int) -> Value:
    """Word `index` from `offset` bytes after a 64-bit address of global memory."""
    text = f"{{ .reg .b64 place; mad.wide.u32 place, $2, 4, $1; ld.global.nc.b32 $0, [place + {offset}]; }}"
    return compat.inline_assembly([compat.i32()], [base, index], text, "=r,l,r", True)[0]
