"""Adds the sparse entries of `pallas_kernels.sparse_matmul.tiles` to decoded weights, in the registers of a warp.

For a tile, a lane

    fetches     its entries of the first two rounds: the bits of a mask below its own, counted, are an entry's index
    adds        them: the value moves to its half of a register, and is added to the one that the place names
    multiplies  them, if there is one token, by that token's input instead: two sums a lane, one for each of its rows

A shift makes the place a bit, and the machine moves seven bits of a byte to predicates at once (R2P): so places leave
out the eighth bits. Each predicate lets one addition happen; it is written as a branch around it, because ptxas
speculates an addition that has a predicate of its own, and moves the sum afterwards. A lane without an entry adds 0 to
the first register. That is 24 instructions a warp, tile and round, and none depends on the lane; multiplying takes 11.
The sums of the four lanes that share rows are added at the end of the whole product. Fetching takes 16 for two rounds,
and comes long before, so that no load is waited for. The second round, which one list in four has at 0.45 %, the whole
warp takes or leaves. So it does a loop for further rounds, one list in seventy, and for lists elsewhere, which reads as
it goes.

The instructions are text with named operands, so that the text that was carried out on NumPy is the one that runs.
"""

import string
from collections.abc import Callable

from pallas_kernels import compat
from pallas_kernels.compat import Value, arith, constant
from pallas_kernels.sparse_matmul.tiles import BLOCK, ELSEWHERE, TILE, register_place


def fetch_text(offset: int, half: int) -> str:
    """Instructions that fetch what a lane adds in the first two rounds, 0 where that is nothing.

    Operands: entry, second; lists: address in shared memory of the slots of the warpgroup's first block + 8 * warp;
    bit: 1 << lane, below: bit - 1. offset: bytes to the tile's block, half: which tile of the block.
    """
    return f"""{{ .reg .pred there; .reg .b32 mask, head, own, list, rank;
ld.shared.v2.b32 {{mask, head}}, [$lists + {_mask(offset, half)}];
and.b32 list, head, 0xff;
mad.lo.u32 list, list, 4, $lists;
and.b32 own, mask, $bit;
setp.ne.u32 there, own, 0;
and.b32 own, mask, $below;
popc.b32 rank, own;
mad.lo.u32 own, rank, 4, list;
mov.b32 $entry, 0;
@there ld.shared.b32 $entry, [own + {offset}];
shl.b32 own, head, rank;
setp.lt.and.s32 there, own, 0, there;
shf.l.wrap.b32 own, head, 0, rank;
popc.b32 own, own;
mad.lo.s32 own, own, -4, list;
mov.b32 $second, 0;
@there ld.shared.b32 $second, [own + {offset - 4}];
}}"""


def add_text(offset: int, half: int, operand: str) -> str:
    """Instructions that add entries to the registers a0..a15 of a tile.

    Operands: a0..a15; entry and second, as fetched; lists, bit, below as there; overflow: 64-bit address.
    """
    return _every_round(offset, half, lambda entry: _add_once(operand, entry))


def multiply_text(offset: int, half: int, operand: str, first_input: int) -> str:
    """Instructions that add entries times inputs to the float32 sums of rows r0 and r1.

    Operands: sum0, sum1; x: address in shared memory of the warpgroup's inputs of one token; the others as for adding.
    first_input: bytes from there to those of the tile.
    """
    return _every_round(offset, half, lambda entry: _multiply_once(operand, first_input, entry))


def _mask(offset: int, half: int) -> int:
    """Bytes to the first mask of a list, which its head follows."""
    return offset + 32 * half


def _every_round(offset: int, half: int, once: Callable[[str], str]) -> str:
    mask = _mask(offset, half)
    # how many rounds follow is read beside the first: two registers a tile wait long enough
    return f"""{{ .reg .pred done, there; .reg .b64 list, item; .reg .b16 narrow;
.reg .b32 place, value, hit, mask, own, count, follows, third;
ld.shared.u8 follows, [$lists + {mask + 5}];
{once("$entry")}
setp.eq.u32 done, follows, 0;
@done bra.uni finished;
{once("$second")}
setp.eq.u32 done, follows, 1;
@done bra.uni finished;
ld.shared.b32 mask, [$lists + {mask}];
ld.shared.u8 own, [$lists + {mask + 4}];
popc.b32 mask, mask;
add.u32 own, own, mask;
mad.lo.u32 own, own, 4, $lists;
add.u32 own, own, {offset};
cvt.u64.u32 list, own;
cvta.shared.u64 list, list;
and.b32 count, follows, {ELSEWHERE - 1};
setp.lt.u32 done, follows, {ELSEWHERE};
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
mov.b32 third, 0;
@there ld.b32 third, [item + 4];
{once("third")}
popc.b32 mask, mask;
mad.wide.u32 list, mask, 4, list;
add.s64 list, list, 4;
sub.u32 count, count, 1;
setp.ne.u32 there, count, 1;
@there bra.uni next;
finished:
}}"""


def _add_once(operand: str, entry: str) -> str:
    # bit 9 of an entry, the lowest of its column, is the half, and bits 5..8 are zero
    lines = [
        f"shf.l.wrap.b32 place, 0, 1, {entry};",
        f"shr.u32 hit, {entry}, 5;",
        f"shr.u32 value, {entry}, 16;",
        "shf.l.wrap.b32 value, 0, value, hit;",
    ]
    for register, place in ((i, register_place(i)) for i in range(16)):
        past = f"past{register}_{entry.strip('$')}"
        lines.append(f"and.b32 hit, place, {1 << place};")
        lines.append("setp.eq.u32 there, hit, 0;")
        lines.append(f"@there bra {past};")
        lines.append(f"add.rn.{operand}x2 $a{register}, $a{register}, value;")
        lines.append(f"{past}:")
    return "\n".join(lines)


def _multiply_once(operand: str, first_input: int, entry: str) -> str:
    if operand == "bf16":
        floats = f"""cvt.u32.u16 hit, narrow;
shl.b32 hit, hit, 16;
and.b32 value, {entry}, 0xffff0000;"""
    else:
        floats = f"""cvt.f32.f16 hit, narrow;
shr.u32 value, {entry}, 16;
cvt.u16.u32 narrow, value;
cvt.f32.f16 value, narrow;"""
    return f"""prmt.b32 place, {entry}, 0, 0x4441;
add.u32 place, place, $x;
ld.shared.u16 narrow, [place + {first_input}];
{floats}
and.b32 place, {entry}, 1;
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
            "lists": arith.addi(slots, arith.muli(warp, constant(8))),
            "bit": bit,
            "below": arith.subi(bit, constant(1)),
        }
        self._overflow, self._operand, self._words = overflow, operand, words

    def fetch(self, tile: int) -> list[Value]:
        """What this thread adds first and second to the `tile`th tile. Long before `add`, to hide the loads."""
        return _assemble(fetch_text(*self._block(tile)), ["entry", "second"], {}, self._inputs)

    def add(self, fragments: list[list[Value]], tile: int, fetched: list[Value]) -> list[list[Value]]:
        """Registers [4 steps][a0..a3] of the tile plus its entries. For all threads of a warp together."""
        names = [f"a{i}" for i in range(16)]
        tied = dict(zip(names, (register for step in fragments for register in step), strict=True))
        inputs = {"entry": fetched[0], "second": fetched[1], **self._inputs, "overflow": self._overflow}
        added = _assemble(add_text(*self._block(tile), self._operand), [], tied, inputs)
        return [added[4 * step : 4 * step + 4] for step in range(4)]

    def multiply(self, sums: list[Value], tile: int, fetched: list[Value], x: Value, first_input: int) -> list[Value]:
        """sums, of rows r0 and r1 as integer registers that hold float32, plus the entries of the tile times inputs."""
        tied = {"sum0": sums[0], "sum1": sums[1]}
        inputs = {"entry": fetched[0], "second": fetched[1], **self._inputs, "x": x, "overflow": self._overflow}
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
