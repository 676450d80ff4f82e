"""The instructions of the kernel of `pallas_kernels.sparse_matmul.shared_token`, step by step, as text.

A register is named by what it holds; those of one step are free in the next unless it says so:

    word, start, stop, before, index    what is asked for ahead: words of quads; of rows, their bounds, y and its place
    row, first, last, base              rows of the part, and its first quad
    lane, piece, own_sums               the thread's token in the block, its share of a row, where its sums begin
    shift                               16, once inputs are there

What the assembler makes of it counts: waiting for one load is waiting for all that share its counter, of which there
are six, and it moves the use of a register in front of a barrier if nothing keeps it behind.
"""

import dataclasses

from pallas_kernels import compat
from pallas_kernels.sparse_matmul.rows import LONG, QUAD

_REGISTERS = 32  # that inputs on their way may take
_PASSES = 4  # at most so many rows a thread are asked for ahead
_LONG_QUADS = 2  # of a long row at once by a thread
_LOADS = {16: "v4.b32", 8: "v2.b32", 4: "b32", 2: "u16"}  # by their bytes
_ONE_BY_ONE = '.pragma "nounroll";'  # more instructions take longer to arrive than they save
OUTPUTS = {  # how a float32 register becomes what is stored
    "float32": ("mov.b32 value, sum;", "b32", "value"),
    "bfloat16": ("cvt.rn.bf16.f32 low, sum;", "b16", "low"),
    "float16": ("cvt.rn.f16.f32 low, sum;", "b16", "low"),
}


@dataclasses.dataclass(frozen=True)
class SharedConfig:
    """block_m tokens, 1, 2, 4 or 8, in a CTA of so many warpgroups; `lanes` threads, block_m to 32, add up a row."""

    block_m: int
    warpgroups: int
    lanes: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the text depends on, beside its configuration."""

    tokens: int
    columns: int
    rows: int
    quads: int  # of `words`
    parts: int
    part: int  # quads that begin in a part, C
    halo: int  # and those of its last row behind them, H
    long_rows: int
    dtype: str
    out_dtype: str


def rows_of_part(shape: Shape) -> int:
    """What most parts have no more of: a twentieth over the mean."""
    return max(-(-shape.rows * 21 // (20 * shape.parts)), 1)


def kernel_text(shape: Shape, config: SharedConfig) -> str:
    """All instructions of a thread.

    Operands: thread; part, block: indices of the CTA; inputs, sums, totals: addresses in shared memory; all arrays of
    `SparseRows`, x, y, out: addresses in global memory.
    """
    return "\n".join(_Text(shape, config).lines)


class _Text:
    """Writes the text, a step of the module's list after the other."""

    def __init__(self, shape: Shape, config: SharedConfig):
        self.shape, self.config = shape, config
        self.tokens, self.threads = config.block_m, compat.THREADS * config.warpgroups
        self.blocks = -(-shape.tokens // self.tokens)
        self.pieces = config.lanes // self.tokens  # threads that share the sum of one row and token
        self.rows = self.threads // config.lanes  # in a pass
        self.passes = min(-(-rows_of_part(shape) // self.rows), _PASSES)
        self.quads = range(-(-(shape.part + shape.halo) // self.threads))
        self.lines: list[str] = []
        self._registers()
        self._add("mad.wide.u32 at, $part, 4, $first_rows;", "ld.global.nc.b32 first, [at];")
        self._add("ld.global.nc.b32 last, [at + 4];", f"mul.lo.u32 base, $part, {shape.part};")
        self._copy_inputs()
        self._wait_for_inputs()
        for quad in self.quads:
            self._store_sums(quad)
        self._add("bar.sync 0;")
        for number in range(self.passes):
            self._sum_row(number)
        self._other_rows()
        if shape.long_rows:
            self._long_rows()
        self._add("}")

    def _add(self, *lines: str) -> None:
        self.lines.extend(lines)

    def _registers(self) -> None:
        counts = {"start": self.passes + 1, "stop": self.passes + 1, "before": self.passes + 1}
        counts |= {"index": self.passes + 1, "word": 4 * max(len(self.quads), _LONG_QUADS), "sum": self.tokens}
        counts |= {"input": max(_REGISTERS, 4 * self.tokens), "pair": 8, "ahead": 4}
        names = "first last base place begin row lane piece token own_sums from to sum other value which warpgroup end"
        self._add(
            "{ .reg .b64 at; .reg .b16 low, high; .reg .pred there, more, both;",
            f".reg .pred owned<{self.passes + 1}>, valid<{self.tokens}>, some<{_LONG_QUADS}>;",
            f".reg .b32 shift, {', '.join(names.split())};",
            *(f".reg .b32 {name}<{count}>;" for name, count in counts.items()),
        )

    def _load_words(self) -> None:
        """The quads of the part. What is not there is zero: an input that exists."""
        whole = self.shape.part + self.shape.halo
        self._add("add.u32 place, $thread, base;", "mad.wide.u32 at, place, 16, $words;")
        for quad in self.quads:
            before = quad * self.threads  # a difference as a constant: one address serves all
            self._add(f"setp.lt.s32 there, $thread, {whole - before};")
            self._add(f"setp.lt.and.s32 there, place, {self.shape.quads - before}, there;")
            self._load_quad(quad, "there", 16 * before)

    def _load_quad(self, quad: int, there: str, offset: int = 0) -> None:
        """The quad at an address, if it is there, as registers 4 quad .. 4 quad + 3."""
        words = [f"word{4 * quad + i}" for i in range(QUAD)]
        self._add(*(f"mov.b32 {word}, 0;" for word in words))
        self._add(f"@{there} ld.global.nc.L1::no_allocate.v4.b32 {_group(words)}, [at + {offset}];")

    def _copy_inputs(self) -> None:
        """Tokens to shared memory. All else is asked for while the first of them are on their way: words come from
        farther, bounds of rows need `first`."""
        columns = self.shape.columns
        widest = 16 if self.tokens == 1 else 4  # of one token they stay as they are
        size = next(size for size in _LOADS if size <= widest and 2 * columns % size == 0)
        words = -(-size // 4)
        for m in range(self.tokens):
            self._add(f"mad.lo.u32 token, $block, {self.tokens}, {m};")
            self._add(f"setp.lt.u32 valid{m}, token, {self.shape.tokens};")
        self._add(f"mul.lo.u32 begin, $block, {self.tokens * columns};")
        rounds = range(-(-columns * 2 // (size * self.threads)))
        # past the registers: waiting for what is copied so is not waiting for words
        past = self.tokens == 1 and size >= 4
        batch = len(rounds) if past else max(_REGISTERS // (words * self.tokens), 1)
        for start in range(0, len(rounds), batch):
            stores: list[str] = []
            for number, round_ in enumerate(rounds[start : start + batch]):
                unit = [f"add.u32 place, $thread, {round_ * self.threads};"]
                unit += [f"setp.lt.u32 there, place, {columns * 2 // size};"]
                self._add(*unit, f"mad.lo.u32 other, place, {size // 2}, begin;", "mad.wide.u32 at, other, 2, $x;")
                if past:
                    self._add(f"mad.lo.u32 place, place, {size}, $inputs;")
                    self._add(f"@there cp.async.ca.shared.global [place], [at], {size};")
                    continue
                inputs = [
                    [f"input{(number * self.tokens + m) * words + i}" for i in range(words)] for m in range(self.tokens)
                ]
                for m, registers in enumerate(inputs):
                    self._add(
                        *(f"mov.b32 {register}, 0;" for register in registers), f"and.pred both, there, valid{m};"
                    )
                    self._add(f"@both ld.global.nc.{_LOADS[size]} {_group(registers)}, [at + {2 * m * columns}];")
                stores += unit + self._store_inputs(inputs, size)
            if start == 0:
                self._load_words()
                self._load_bounds()
            self._add(*stores)
        if past:  # behind a barrier that needs what was loaded, or the assembler would have the wait in front of loads
            self._add("setp.le.u32 more, first, last;", "bar.red.and.pred more, 0, more;", "cp.async.wait_all;")

    def _store_inputs(self, inputs: list[list[str]], size: int) -> list[str]:
        """The inputs that a thread loaded of each token, those of `place`, as shared memory has them."""
        bytes_ = size * self.tokens
        lines = [f"mad.lo.u32 place, place, {bytes_}, $inputs;"]
        if self.tokens == 1:
            return [*lines, f"@there st.shared.{_LOADS[size]} [place], {_group(inputs[0])};"]
        pairs = [f"pair{i}" for i in range(max(bytes_ // 4, 1))]
        for i, pair in enumerate(pairs):
            column, token = divmod(i, self.tokens // 2)
            low, high = (inputs[2 * token + e][0] for e in range(2))
            lines.append(f"prmt.b32 {pair}, {low}, {high}, {'0x7632' if column else '0x5410'};")
        for i in range(0, len(pairs), 4):
            group = pairs[i : i + 4]
            lines.append(f"@there st.shared.{_LOADS[4 * len(group)]} [place + {4 * i}], {_group(group)};")
        return lines

    def _wait_for_inputs(self) -> None:
        """A barrier that answers what to shift words by. Without it the assembler would move the first use of words in
        front of the barrier, where all threads of the CTA would wait for the words of all."""
        self._add("setp.eq.u32 more, 0, 0;", "bar.red.and.pred more, 0, more;", "selp.b32 shift, 16, 0, more;")

    def _load_bounds(self) -> None:
        shape, lanes = self.shape, self.config.lanes
        self._add(f"and.b32 lane, $thread, {lanes - 1};", f"shr.u32 piece, lane, {_log(self.tokens)};")
        self._add(f"and.b32 lane, lane, {self.tokens - 1};", f"mad.lo.u32 token, $block, {self.tokens}, lane;")
        self._add("mad.lo.u32 own_sums, lane, 4, $sums;")
        self._add(f"shr.u32 row, $thread, {_log(lanes)};", "add.u32 row, row, first;")
        for number in range(self.passes):
            self._load_row(number)
        if shape.long_rows:
            self._add("shr.u32 warpgroup, $thread, 7;", f"mad.lo.u32 which, warpgroup, {shape.parts}, $part;")

    def _load_row(self, number: int) -> None:
        """Where row `row` lies and what y has there; then the next row. A row past the part's last has no quads."""
        start, stop = f"start{number}", f"stop{number}"
        self._add("setp.lt.u32 there, row, last;", "mad.wide.u32 at, row, 4, $starts;")
        self._add(f"mov.b32 {start}, base;", f"mov.b32 {stop}, base;")
        self._add(f"@there ld.global.nc.b32 {start}, [at];", f"@there ld.global.nc.b32 {stop}, [at + 4];")
        if self.shape.tokens % self.tokens:
            self._add(f"setp.lt.and.u32 there, token, {self.shape.tokens}, there;")
        # by all threads of the row, so that it waits for nothing else
        self._load_before(number, "there")
        self._add(f"setp.lt.and.u32 owned{number}, piece, 1, there;", f"add.u32 row, row, {self.rows};")

    def _load_before(self, number: int, there: str) -> None:
        index, before = f"index{number}", f"before{number}"
        self._add(f"mad.lo.u32 {index}, token, {self.shape.rows}, row;", f"mad.wide.u32 at, {index}, 4, $y;")
        self._add(f"mov.b32 {before}, 0;", f"@{there} ld.global.nc.b32 {before}, [at];")

    def _multiply(self, quad: int, there: str | None = None) -> None:
        """Adds the products of a quad to sum0 .. of each token; if it may not be there, reading no input then."""
        each, words = 2 * self.tokens, max(self.tokens // 2, 1)
        gathered = [[f"input{words * i + j}" for j in range(words)] for i in range(QUAD)]
        for i, registers in enumerate(gathered):
            self._add(f"shr.u32 place, word{4 * quad + i}, shift;", f"mad.lo.u32 place, place, {each}, $inputs;")
            if there is not None:
                self._add(*(f"mov.b32 {register}, 0;" for register in registers))
            guard = "" if there is None else f"@{there} "
            self._add(f"{guard}ld.shared.{_LOADS[each]} {_group(registers)}, [place];")
        for i, registers in enumerate(gathered):
            self._add(f"cvt.u16.u32 low, word{4 * quad + i};", "cvt.f32.f16 value, low;")
            for m in range(self.tokens):
                self._add(*self._widen(registers[m // 2], m % 2), f"fma.rn.f32 sum{m}, other, value, sum{m};")

    def _widen(self, pair: str, half: int) -> list[str]:
        """One of the two inputs of a register, as float32 in `other`."""
        if self.shape.dtype == "bfloat16":
            return [f"and.b32 other, {pair}, 0xffff0000;" if half else f"shl.b32 other, {pair}, 16;"]
        half_of = [f"shr.u32 other, {pair}, 16;", "cvt.u16.u32 low, other;"] if half else [f"cvt.u16.u32 low, {pair};"]
        return [*half_of, "cvt.f32.f16 other, low;"]

    def _store_sums(self, quad: int) -> None:
        sums = [f"sum{m}" for m in range(self.tokens)]
        self._add(*(f"mov.b32 {each}, 0;" for each in sums))
        self._multiply(quad)
        self._add(f"add.u32 place, $thread, {quad * self.threads};")
        self._add(f"setp.lt.u32 there, place, {self.shape.part + self.shape.halo};")
        self._add(f"mad.lo.u32 place, place, {4 * self.tokens}, $sums;")
        for i in range(0, self.tokens, 4):
            group = sums[i : i + 4]
            self._add(f"@there st.shared.{_LOADS[4 * len(group)]} [place + {4 * i}], {_group(group)};")

    def _sum_row(self, number: int) -> None:
        """The quads of a row, four at a time, then those of the other threads that share it. A row without any may lie
        in front of the part: its places are negative."""
        each = 4 * self.tokens
        self._add(f"and.b32 from, start{number}, {~LONG};", f"and.b32 to, stop{number}, {~LONG};")
        self._add("sub.u32 from, from, base;", "sub.u32 to, to, base;", "add.u32 from, from, piece;")
        self._add(f"mad.lo.u32 from, from, {each}, own_sums;", f"mad.lo.u32 to, to, {each}, $sums;")
        self._add("mov.b32 sum, 0;", f"again{number}:", _ONE_BY_ONE)
        stride = each * self.pieces
        for i in range(4):
            self._add(f"add.u32 place, from, {i * stride};", "setp.lt.s32 there, place, to;", f"mov.b32 ahead{i}, 0;")
            self._add(f"@there ld.shared.b32 ahead{i}, [place];")
        self._add(*(f"add.rn.f32 sum, sum, ahead{i};" for i in range(4)), f"add.u32 from, from, {4 * stride};")
        self._add("setp.lt.s32 more, from, to;", f"@more bra again{number};")
        self._add(*_over_lanes("sum", self.tokens, self.config.lanes))
        self._add(f"setp.ge.and.s32 there, start{number}, 0, owned{number};")
        self._write(number)

    def _write(self, number: int) -> None:
        """`sum` and what y had, if there."""
        convert, kind, register = OUTPUTS[self.shape.out_dtype]
        self._add(f"add.rn.f32 sum, sum, before{number};", convert)
        self._add(f"mad.wide.u32 at, index{number}, {4 if kind == 'b32' else 2}, $out;")
        self._add(f"@there st.global.{kind} [at], {register};")

    def _other_rows(self) -> None:
        """Rows of a part that has more of them than were asked for: many must be empty."""
        self._add(f"add.u32 begin, first, {self.passes * self.rows};", "others:", "setp.ge.u32 more, begin, last;")
        self._add("@more bra.uni summed;")
        self._load_row(self.passes)
        self._sum_row(self.passes)
        self._add(f"add.u32 begin, begin, {self.rows};", "bra.uni others;", "summed:")

    def _long_rows(self) -> None:
        shape, each, number = self.shape, 4 * self.tokens, self.passes
        self._add("and.b32 lane, $thread, 127;", f"mad.lo.u32 token, $block, {self.tokens}, lane;")
        self._add(f"mad.lo.u32 own_sums, warpgroup, {4 * each}, $totals;", "add.u32 end, warpgroup, 1;", "long:")
        self._add(f"setp.ge.u32 more, which, {shape.long_rows};", "@more bra.uni finished;")
        self._add("mad.wide.u32 at, which, 4, $long_rows;", "ld.global.nc.b32 row, [at];")
        self._add("mad.wide.u32 at, which, 4, $long_starts;", "ld.global.nc.b32 from, [at];")
        self._add("ld.global.nc.b32 to, [at + 4];", f"setp.lt.u32 there, row, {shape.rows};")
        self._add(f"setp.lt.and.u32 there, token, {shape.tokens}, there;")
        self._add(f"setp.lt.and.u32 owned{number}, lane, {self.tokens}, there;")
        self._load_before(number, f"owned{number}")
        self._add(
            "add.u32 from, from, lane;", *(f"mov.b32 sum{m}, 0;" for m in range(self.tokens)), "longer:", _ONE_BY_ONE
        )
        for i in range(_LONG_QUADS):
            self._add(f"add.u32 place, from, {i * compat.THREADS};", f"setp.lt.u32 some{i}, place, to;")
            self._add("mad.wide.u32 at, place, 16, $long_words;")
            self._load_quad(i, f"some{i}")
        for i in range(_LONG_QUADS):
            self._multiply(i, f"some{i}")
        self._add(f"add.u32 from, from, {_LONG_QUADS * compat.THREADS};", "setp.lt.u32 more, from, to;")
        self._add("@more bra longer;")
        self._add("and.b32 place, lane, 31;", "setp.eq.u32 there, place, 0;")
        self._add("shr.u32 place, lane, 5;", f"mad.lo.u32 place, place, {each}, own_sums;")
        for m in range(self.tokens):
            self._add(*_over_lanes(f"sum{m}", 1, 32), f"@there st.shared.b32 [place + {4 * m}], sum{m};")
        self._add(f"bar.sync end, {compat.THREADS};", "mad.lo.u32 place, lane, 4, own_sums;", "mov.b32 sum, 0;")
        for warp in range(4):
            self._add(f"mov.b32 other, 0; @owned{number} ld.shared.b32 other, [place + {each * warp}];")
            self._add("add.rn.f32 sum, sum, other;")
        self._add(f"and.pred there, owned{number}, owned{number};")  # that there is a row to write
        self._write(number)
        self._add(f"bar.sync end, {compat.THREADS};")  # before the totals of another row take their place
        self._add(f"add.u32 which, which, {shape.parts * self.config.warpgroups};", "bra.uni long;", "finished:")


def _over_lanes(register: str, begin: int, end: int) -> list[str]:
    """Adds up a register over the lanes begin, 2 begin .. end / 2 apart."""
    lines: list[str] = []
    while begin < end:
        lines.append(f"shfl.sync.bfly.b32 other, {register}, {begin}, 0x1f, 0xffffffff;")
        lines.append(f"add.rn.f32 {register}, {register}, other;")
        begin *= 2
    return lines


def _group(registers: list[str]) -> str:
    return registers[0] if len(registers) == 1 else f"{{{', '.join(registers)}}}"


def _log(power: int) -> int:
    return power.bit_length() - 1
