"""Sparse entries added to decoded weights in the registers of a tensor-core kernel: for more than a few tokens.

A product of its own cannot be cheap there. For M = 2048 and N = 28672, reading and writing y again takes 55 us in
bfloat16, a twentieth of the whole matrix product, and every entry reads M inputs: 4.3 GB for 0.45 % of 28672 x 8192,
150 us at the speed of shared memory. Added to the weight itself an entry costs once for a block of tokens.

The kernels of `pallas_kernels.fragments` decode tiles of 64 x 64: warp w of four owns rows 16w..16w + 15 of a tile and
thread l of it the registers a0..a3 of steps s = 0..3. An entry is the word place << 16 | bits of its 16-bit value:

    place     [warp 4][step 4][thread 32][register 4][half 2], 2 bytes each: the warp in bits 11, 12, and below them the
              byte in the warp's scratch, 2 KiB
    slots     uint32 [ceil(N/64), ceil(K/64), 32]: the entries of a tile, EMPTY where there are fewer; of more than 32,
              the first 31 and LINK | first, a place in `overflow`
    overflow  uint32 [F]: there, how many entries are left, then these; at least one word

Slots are copied beside the packed words: 128 bytes a tile, 18 of 32 in use for 0.45 %. Scratch is all zeros between
tiles. `add_entries` writes the values of a warp there, a thread each, reads the four registers of every step back with
16-byte loads, adds them, and puts the zeros back: some 40 instructions a warp for 1024 weights.

Values are added to what the decoder made, so they are in its units: divided by the scale that multiplies afterwards.
They and the sums are rounded to 16 bits: the weight is right within a unit or two of its last place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat
from pallas_kernels.compat import Value, arith, constant

TILE = 64
SLOTS = 32  # of a tile
WARPS = 4
SCRATCH_BYTES = 2048  # of a warp
EMPTY = 0x7FFF0000
LINK = 0x80000000


class EntryTiles(NamedTuple):
    """Entries by tile, as drawn above."""

    slots: jax.Array
    overflow: jax.Array


def prepare_tiles(
    values: np.ndarray, columns: np.ndarray, row_pointer: np.ndarray, num_columns: int, dtype: Any
) -> EntryTiles:
    """The entries of a compressed-row matrix by tile, values rounded to `dtype`. Once, after loading; NumPy.

    values [nnz] in the decoder's units, columns [nnz] below num_columns = K and different within a row,
    row_pointer [N + 1]; dtype that of the activations, bfloat16 or float16. ValueError for another, or where a value
    does not fit.
    """
    kind = jnp.dtype(dtype)
    if kind.name not in ("bfloat16", "float16"):
        raise ValueError(f"entries are added to 16-bit weights, not to {kind.name}; expected bfloat16 or float16")
    pointer, column = np.asarray(row_pointer, np.int64), np.asarray(columns, np.int64)
    with np.errstate(over="ignore"):  # found out below
        rounded = np.asarray(values).astype(np.float32).astype(kind)
    if not np.all(np.isfinite(rounded.astype(np.float32))):
        raise ValueError(f"some sparse values do not fit {kind.name}; use bfloat16 activations")
    rows, blocks = pointer.size - 1, -(-num_columns // TILE)
    row = np.repeat(np.arange(rows), np.diff(pointer))
    warp, step, thread = row % TILE // 16, column % TILE // 16, row % 8 * 4 + column % 8 // 2
    register = row % 16 // 8 + column % 16 // 8 * 2
    place = warp * SCRATCH_BYTES + step * 512 + thread * 16 + register * 4 + column % 2 * 2
    words = place.astype(np.uint32) << 16 | rounded.view(np.uint16).astype(np.uint32)

    tile = row // TILE * blocks + column // TILE
    order = np.argsort(tile, kind="stable")
    tile, words = tile[order], words[order]
    count = -(-rows // TILE) * blocks
    starts = np.searchsorted(tile, np.arange(count + 1))
    nth, many = np.arange(tile.size) - starts[tile], np.diff(starts)
    slots = np.full((count, SLOTS), EMPTY, np.uint32)
    direct = (nth < SLOTS - 1) | (many[tile] <= SLOTS)
    slots[tile[direct], nth[direct]] = words[direct]
    full = np.flatnonzero(many > SLOTS)
    left = many[full] - (SLOTS - 1)
    firsts = np.cumsum(left + 1) - (left + 1)
    slots[full, SLOTS - 1] = firsts.astype(np.uint32) | np.uint32(LINK)
    overflow = np.zeros(max(int(np.sum(left + 1)), 1), np.uint32)
    overflow[firsts] = left
    first_of = np.zeros(count, np.int64)
    first_of[full] = firsts
    overflow[first_of[tile[~direct]] + 1 + nth[~direct] - (SLOTS - 1)] = words[~direct]
    return EntryTiles(jnp.asarray(slots.reshape(-1, blocks, SLOTS)), jnp.asarray(overflow))


class EntryAdder:
    """Adds entries on behalf of one thread, inside `plgpu.inline_mgpu`.

    scratch: byte address in shared memory of WARPS * SCRATCH_BYTES for this warpgroup, zeros (`clear`); overflow:
    64-bit address in global memory; operand: "bf16" or "f16".
    """

    def __init__(self, scratch: Value, overflow: Value, operand: str):
        thread = compat.thread_in_warpgroup()
        self.warp = arith.shrui(thread, constant(5))
        self.lane = arith.andi(thread, constant(31))
        self.scratch, self.overflow, self.operand = scratch, overflow, operand

    def clear(self) -> None:
        """Fills this warp's scratch with zeros, which `add_entries` expects and leaves behind."""
        own = arith.addi(arith.muli(self.warp, constant(SCRATCH_BYTES)), arith.muli(self.lane, constant(16)))
        own = arith.addi(self.scratch, own)
        lines = ["{ .reg .b32 zero; mov.b32 zero, 0;"]
        lines += [f"st.shared.v4.b32 [$0 + {512 * step}], {{zero, zero, zero, zero}};" for step in range(4)]
        compat.inline_assembly([], [own], "\n".join([*lines, "bar.warp.sync 0xffffffff; }"]), "r", False)

    def add_entries(self, fragments: list[list[Value]], slots: Value) -> list[list[Value]]:
        """Registers [4 steps][a0..a3] of a tile plus its entries. slots: byte address of its slots in shared memory.

        For all threads of a warp together. The tile's slots may be overwritten when it is done.
        """
        registers = [register for step in fragments for register in step]
        slots_, scratch, warp, lane, overflow = (f"${place}" for place in range(32, 37))
        # An entry is this warp's if its place lies in the warp's scratch. LINK and EMPTY are no warp's.
        own_entry = f"""shr.u32 there, entry, 16; shr.u32 other, entry, {16 + 11}; add.u32 there, there, {scratch};"""

        def rest(label: str, value: str) -> str:
            """The same for what lies in `overflow`."""
            return f"""@!linked bra {label}_end;
                mov.b32 base, {lane};
                {label}_next: setp.ge.u32 mine, base, left;
                mov.b32 entry, {EMPTY}; mad.wide.u32 place, base, 4, list;
                @!mine ld.global.nc.b32 entry, [place];
                {own_entry}
                setp.eq.u32 mine, other, {warp}; {value} @mine st.shared.b16 [there], value;
                add.u32 base, base, 32; sub.u32 other, base, {lane}; setp.lt.u32 mine, other, left;
                @mine bra {label}_next;
                {label}_end:"""

        lines = [
            "{ .reg .pred linked, own_mine, mine; .reg .b16 value; .reg .b64 place, list;",
            ".reg .b32 entry, link, there, address, other, base, left, own, d0, d1, d2, d3;",
            f"shl.b32 own, {lane}, 2; add.u32 own, own, {slots_};",
            f"ld.shared.b32 entry, [own]; ld.shared.b32 link, [{slots_} + {4 * SLOTS - 4}];",
            own_entry,
            f"mov.b32 address, there; setp.eq.u32 own_mine, other, {warp};",
            "cvt.u16.u32 value, entry; @own_mine st.shared.b16 [address], value;",
            "setp.lt.s32 linked, link, 0;",
            "mov.b64 list, 0; mov.b32 left, 0;",
            "and.b32 link, link, 0x7fffffff;",
            f"@linked mad.wide.u32 list, link, 4, {overflow};",
            "@linked ld.global.nc.b32 left, [list]; add.s64 list, list, 4;",
            rest("put", "cvt.u16.u32 value, entry;"),
            "bar.warp.sync 0xffffffff;",
            f"shl.b32 own, {lane}, 4; mad.lo.u32 own, {warp}, {SCRATCH_BYTES}, own; add.u32 own, own, {scratch};",
        ]
        for step in range(4):
            lines.append(f"ld.shared.v4.b32 {{d0, d1, d2, d3}}, [own + {512 * step}];")
            lines += [f"add.rn.{self.operand}x2 ${4 * step + i}, ${4 * step + i}, d{i};" for i in range(4)]
        lines += [
            "bar.warp.sync 0xffffffff;",
            "mov.b16 value, 0; @own_mine st.shared.b16 [address], value;",
            rest("clear", "mov.b16 value, 0;"),
            "bar.warp.sync 0xffffffff; }",
        ]
        constraints = ["=r"] * 16 + [str(i) for i in range(16)] + ["r"] * 4 + ["l"]
        operands = [*registers, slots, self.scratch, self.warp, self.lane, self.overflow]
        added = compat.inline_assembly([compat.i32()] * 16, operands, "\n".join(lines), ",".join(constraints), False)
        return [added[4 * step : 4 * step + 4] for step in range(4)]


def global_address(ref: Value) -> Value:
    """The byte address of a ref in global memory, as a 64-bit register."""
    return compat.llvm.ptrtoint(compat.ir.IntegerType.get_signless(64), compat.pointer(ref))


def shared_address(ref: Value) -> Value:
    """The byte address of a ref in shared memory, as an integer register."""
    return compat.llvm.ptrtoint(compat.i32(), compat.pointer(ref))
