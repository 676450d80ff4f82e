"""Adds the sparse entries of `pallas_kernels.sparse_matmul.tiles` to decoded weights, in the registers of a warp.

For a tile, a lane

    fetches     its entry of the first round: the bits of the mask below its own, counted, are its index
    adds        it: every register becomes hit * value + register, hit being 1 in the half that the entry names, else 0
    multiplies  it, if there is one token, by that token's input instead: two sums a lane, one for each of its rows

`set.eq` on halves gives hit: the 32 places of a lane are the numbers 128 + place in bfloat16 (1024 + place in float16),
whose low byte is the place, so one byte permutation spreads the place of an entry over both halves, and another one its
value. A lane without an entry adds 0 at place 0. The product is exact and the sum rounded once. That is 49 instructions
a warp and tile, nine of them of the integer pipe, and none depends on the lane. Multiplying takes 22 instead; the sums
of the four lanes that share rows are added at the end of the whole product. Fetching comes long before, so that no load
is waited for. Further rounds, which one list in four has at 0.45 %, and lists elsewhere follow in a loop that the whole
warp takes or leaves.

The instructions are text with named operands, so that the text that was carried out on NumPy is the one that runs.
"""

import string

from pallas_kernels import compat
from pallas_kernels.compat import Value, arith, constant
from pallas_kernels.sparse_matmul.tiles import BLOCK, ELSEWHERE, TILE

_FIRST_PLACE = {"bf16": 0x43, "f16": 0x64}  # the high byte of 128 and of 1024
_HEAD_BYTES = 32  # where the bytes that describe lists begin, after eight masks


def fetch_text(offset: int, half: int) -> str:
    """Instructions that fetch what a lane adds first, and whether more follows.

    Operands: entry, follows; start: address in shared memory of the slots of the warpgroup's first block, lists: start
    + 4 * warp; bit: 1 << lane, below: bit - 1. offset: bytes to the tile's block, half: which tile of the block.
    """
    mask, head = offset + 16 * half, offset + _HEAD_BYTES + 2 * half
    return f"""{{ .reg .pred there; .reg .b32 mask, own, index;
ld.shared.b32 mask, [$lists + {mask}];
ld.shared.u8 index, [$lists + {head}];
ld.shared.u8 $follows, [$lists + {head + 1}];
and.b32 own, mask, $bit;
setp.ne.u32 there, own, 0;
and.b32 own, mask, $below;
popc.b32 own, own;
add.u32 index, index, own;
mad.lo.u32 index, index, 4, $start;
mov.b32 $entry, 0;
@there ld.shared.b32 $entry, [index + {offset}];
}}"""


def add_text(offset: int, half: int, operand: str) -> str:
    """Instructions that add entries to the registers a0..a15 of a tile.

    Operands: a0..a15; entry and follows, as fetched; lists, bit, below, start as there; overflow: 64-bit address.
    """
    return _every_round(offset, half, _add_once(operand))


def multiply_text(offset: int, half: int, operand: str, first_input: int) -> str:
    """Instructions that add entries times inputs to the float32 sums of rows r0 and r1.

    Operands: sum0, sum1; x: address in shared memory of the warpgroup's inputs of one token; the others as for adding.
    first_input: bytes from there to those of the tile.
    """
    return _every_round(offset, half, _multiply_once(operand, first_input))


def _every_round(offset: int, half: int, once: str) -> str:
    mask, head = offset + 16 * half, offset + _HEAD_BYTES + 2 * half
    return f"""{{ .reg .pred done, there; .reg .b64 list, item; .reg .b16 narrow;
.reg .b32 place, value, hit, mask, own, count, entry;
mov.b32 entry, $entry;
{once}
setp.eq.u32 done, $follows, 0;
@done bra.uni finished;
ld.shared.b32 mask, [$lists + {mask}];
ld.shared.u8 own, [$lists + {head}];
popc.b32 mask, mask;
add.u32 own, own, mask;
mad.lo.u32 own, own, 4, $start;
add.u32 own, own, {offset};
cvt.u64.u32 list, own;
cvta.shared.u64 list, list;
and.b32 count, $follows, {ELSEWHERE - 1};
setp.lt.u32 done, $follows, {ELSEWHERE};
@done bra.uni next;
ld.shared.b32 own, [own];
mad.wide.u32 list, own, 4, $overflow;
next:
ld.b32 mask, [list];
and.b32 own, mask, $bit;
setp.ne.u32 there, own, 0;
and.b32 own, mask, $below;
popc.b32 own, own;
mad.wide.u32 item, own, 4, list;
mov.b32 entry, 0;
@there ld.b32 entry, [item + 4];
{once}
popc.b32 mask, mask;
mad.wide.u32 list, mask, 4, list;
add.s64 list, list, 4;
sub.u32 count, count, 1;
setp.ne.u32 there, count, 0;
@there bra.uni next;
finished:
}}"""


def _add_once(operand: str) -> str:
    high = _FIRST_PLACE[operand]
    lines = [
        f"prmt.b32 place, entry, {high * 0x01010101}, 0x4040;",
        "prmt.b32 value, entry, entry, 0x3232;",
    ]
    for register in range(16):
        places = (high << 8 | 2 * register) | (high << 8 | 2 * register + 1) << 16
        lines.append(f"mov.b32 hit, {places};")
        lines.append(f"set.eq.{operand}x2.{operand}x2 hit, place, hit;")
        lines.append(f"fma.rn.{operand}x2 $a{register}, hit, value, $a{register};")
    return "\n".join(lines)


def _multiply_once(operand: str, first_input: int) -> str:
    if operand == "bf16":
        floats = """cvt.u32.u16 hit, narrow;
shl.b32 hit, hit, 16;
and.b32 value, entry, 0xffff0000;"""
    else:
        floats = """cvt.f32.f16 hit, narrow;
shr.u32 value, entry, 16;
cvt.u16.u32 narrow, value;
cvt.f32.f16 value, narrow;"""
    return f"""prmt.b32 place, entry, 0, 0x4441;
add.u32 place, place, $x;
ld.shared.u16 narrow, [place + {first_input}];
{floats}
and.b32 place, entry, 2;
setp.ne.u32 there, place, 0;
@there fma.rn.f32 $sum1, hit, value, $sum1;
setp.eq.u32 there, place, 0;
@there fma.rn.f32 $sum0, hit, value, $sum0;"""


class EntryAdder:
    """Adds entries on behalf of one thread, inside `plgpu.inline_mgpu`.

    slots: byte address in shared memory of the first block of the warpgroup; overflow: 64-bit address in global memory;
    operand: "bf16" or "f16"; words: of a block.
    """

    def __init__(self, slots: Value, overflow: Value, operand: str, words: int):
        thread = compat.thread_in_warpgroup()
        warp, lane = arith.shrui(thread, constant(5)), arith.andi(thread, constant(31))
        bit = arith.shli(constant(1), lane)
        self._inputs = {
            "lists": arith.addi(slots, arith.muli(warp, constant(4))),
            "start": slots,
            "bit": bit,
            "below": arith.subi(bit, constant(1)),
        }
        self._overflow, self._operand, self._words = overflow, operand, words

    def fetch(self, tile: int) -> list[Value]:
        """What this thread adds first to the `tile`th tile, and what follows. Long before `add`, to hide the loads."""
        return _assemble(fetch_text(*self._block(tile)), ["entry", "follows"], {}, self._inputs)

    def add(self, fragments: list[list[Value]], tile: int, fetched: list[Value]) -> list[list[Value]]:
        """Registers [4 steps][a0..a3] of the tile plus its entries. For all threads of a warp together."""
        names = [f"a{i}" for i in range(16)]
        tied = dict(zip(names, (register for step in fragments for register in step), strict=True))
        inputs = {"entry": fetched[0], "follows": fetched[1], **self._inputs, "overflow": self._overflow}
        added = _assemble(add_text(*self._block(tile), self._operand), [], tied, inputs)
        return [added[4 * step : 4 * step + 4] for step in range(4)]

    def multiply(self, sums: list[Value], tile: int, fetched: list[Value], x: Value, first_input: int) -> list[Value]:
        """sums, of rows r0 and r1 as integer registers that hold float32, plus the entries of the tile times inputs."""
        tied = {"sum0": sums[0], "sum1": sums[1]}
        inputs = {"entry": fetched[0], "follows": fetched[1], **self._inputs, "x": x, "overflow": self._overflow}
        return _assemble(multiply_text(*self._block(tile), self._operand, first_input), [], tied, inputs)

    def _block(self, tile: int) -> tuple[int, int]:
        block, half = divmod(tile, BLOCK // TILE)
        return 4 * self._words * block, half


def _assemble(text: str, results: list[str], tied: dict[str, Value], inputs: dict[str, Value]) -> list[Value]:
    """Runs a text; returns the registers that it writes, those in `tied` being read before."""
    written = [*results, *tied]
    names = [*written, *(f"old {name}" for name in tied), *inputs]
    numbered = string.Template(text).substitute({name: f"${i}" for i, name in enumerate(names)})
    kinds = ["l" if name == "overflow" else "r" for name in inputs]
    # a result may not share a register with an input that is still read after it is written
    constraints = ["=&r"] * len(written) + [str(len(results) + i) for i in range(len(tied))] + kinds
    operands = [*tied.values(), *inputs.values()]
    return compat.inline_assembly([compat.i32()] * len(written), operands, numbered, ",".join(constraints), False)
