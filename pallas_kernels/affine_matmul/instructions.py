"""The machine instructions of the kernel, as functions on 32-bit registers (MLIR values inside `plgpu.inline_mgpu`).

Integer and packed 16-bit arithmetic is spelled in PTX where the instruction count matters: one `lop3` does any function
of three bits, so masking a nibble and putting an exponent over it is one instruction.

`multiply_tile` issues the tensor-core instructions of one 64 x 64 tile of weights, without waiting for them:

    D [64, n] (+)= A [64, 64] B [64, n]     A in registers, B in shared memory, K-major, 128-byte swizzle or none

    16-bit: 4 x m64 n k16, D float32        8-bit: 2 x m64 n k32, D int32

Thread (w, g, t) holds D in n / 2 registers: register 4j + 2h + e is row 16w + g + 8h, column 8j + 2t + e.
PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".
"""

import struct
from collections.abc import Sequence
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


def float_constant(value: float) -> Value:
    return compat.arith.constant(compat.f32(), compat.ir.FloatAttr.get(compat.f32(), value))


def to_float(integer: Value) -> Value:
    """A signed integer as float32."""
    return compat.arith.sitofp(compat.f32(), integer)


def sum_of_four(value: Value) -> Value:
    """The sum of a float32 register over the four threads that hold the same rows of a product."""
    text = (
        "{ .reg .f32 other; shfl.sync.bfly.b32 other, $1, 1, 0x1f, 0xffffffff; add.f32 $0, $1, other; "
        "shfl.sync.bfly.b32 other, $0, 2, 0x1f, 0xffffffff; add.f32 $0, $0, other; }"
    )
    return compat.inline_assembly([compat.f32()], [value], text, "=&f,f", False)[0]


def load_shared(base: Value, offset: Value, count: int) -> list[Value]:
    """`count` consecutive words (1, 2 or 4) at a byte address base + offset of shared memory, in one instruction.

    Not pure: it must stay between the barriers around it.
    """
    address = compat.arith.addi(base, offset)
    kinds = [compat.i32()] * count
    if count == 1:
        text = "ld.shared.b32 $0, [$1];"
    else:
        text = f"ld.shared.v{count}.b32 {{{', '.join(f'${i}' for i in range(count))}}}, [${count}];"
    return compat.inline_assembly(kinds, [address], text, ",".join(["=r"] * count + ["r"]), False)


def store_shared(address: Value, offset: int, word: Value) -> None:
    """A word to shared memory, `offset` bytes from an address."""
    compat.inline_assembly([], [address, word], f"st.shared.b32 [$0 + {offset}], $1;", "r,r", False)


def store_chunk(address: Value, offset: int, words: list[Value], index: Value, count: int | None) -> None:
    """Four words to 16 bytes of shared memory, `offset` bytes from an address; only if index < count, where there is a
    count."""
    text = f"st.shared.v4.b32 [$0 + {offset}], {{$1, $2, $3, $4}};"
    if count is not None:
        text = f"{{ .reg .pred inside; setp.lt.u32 inside, $5, {count}; @inside {text} }}"
    compat.inline_assembly([], [address, *words, index], text, "r,r,r,r,r,r", False)


def fence_copies() -> None:
    """What this thread wrote to shared memory before, the tensor core sees once a barrier is passed."""
    compat.inline_assembly([], [], "fence.proxy.async.shared::cta;", "", False)


def wait_for_threads(count: int) -> None:
    """Waits until so many threads of the CTA have come here. Mosaic has the barriers of lower numbers."""
    compat.inline_assembly([], [], f"bar.sync 15, {count};", "", False)


def tell_threads(threads: int) -> None:
    """What this thread did before, those see that `wait_for_told`; `threads` of both together."""
    compat.inline_assembly([], [], f"barrier.cta.arrive 14, {threads};", "", False)


def wait_for_told(threads: int) -> None:
    """Waits until the others of so many threads have said `tell_threads`."""
    compat.inline_assembly([], [], f"barrier.cta.sync 14, {threads};", "", False)


def largest_of_warp(value: Value) -> Value:
    """The largest of an unsigned register of all threads of a warp."""
    text = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    return compat.inline_assembly([compat.i32()], [value], text, "=r,r", False)[0]


def larger_halves(a: Value, b: Value) -> Value:
    """The larger of two unsigned numbers of 16 bits, twice."""
    return compat.inline_assembly([compat.i32()], [a, b], "max.u16x2 $0, $1, $2;", "=r,r,r", True)[0]


def permute(a: Value, b: Value, selector: int) -> Value:
    """Four of the bytes of b and a, which are numbered from the lowest of a; a digit of the selector each."""
    return compat.inline_assembly([compat.i32()], [a, b], f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", True)[0]


def where_below(value: Value, bound: int, below: Value, other: Value) -> Value:
    """below if an unsigned register is less than `bound`, else other."""
    text = f"{{ .reg .pred p; setp.lt.u32 p, $1, {bound}; selp.b32 $0, $2, $3, p; }}"
    return compat.inline_assembly([compat.i32()], [value, below, other], text, "=r,r,r,r", True)[0]


def half_to_float(value: Value) -> Value:
    """The float16 in the lower half of a register, as float32."""
    text = "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, low; }"
    return compat.inline_assembly([compat.f32()], [value], text, "=f,r", True)[0]


def divide(value: Value, divisor: float) -> Value:
    """value / divisor, correctly rounded."""
    text = "div.rn.f32 $0, $1, $2;"
    return compat.inline_assembly([compat.f32()], [value, float_constant(divisor)], text, "=f,f,f", True)[0]


def reciprocal(value: Value) -> Value:
    """1 / value, correctly rounded."""
    return compat.inline_assembly([compat.f32()], [value], "rcp.rn.f32 $0, $1;", "=f,f", True)[0]


def as_float(word: Value) -> Value:
    """The float32 of these bits."""
    return compat.arith.bitcast(compat.f32(), word)


def as_word(value: Value) -> Value:
    """The bits of a float32."""
    return compat.arith.bitcast(compat.i32(), value)


def store_matrices(address: Value, matrices: list[Value]) -> None:
    """Four 8 x 8 matrices of 16 bits, transposed, to the lines of 16 bytes that the threads of a warp address."""
    text = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    compat.inline_assembly([], [address, *matrices], text, "r,r,r,r,r", False)


def store_in_cluster(address: Value, offset: int, register: Value) -> None:
    """A register to an address that `address_in_cluster` gave, `offset` bytes further."""
    letter = "f" if register.type == compat.f32() else "r"
    text = f"st.shared::cluster.b32 [$0 + {offset}], $1;"
    compat.inline_assembly([], [address, register], text, f"r,{letter}", False)


def address_in_cluster(address: Value, rank: int) -> Value:
    """The same place in shared memory of the CTA `rank` of the cluster."""
    text = f"mapa.shared::cluster.u32 $0, $1, {rank};"
    return compat.inline_assembly([compat.i32()], [address], text, "=r,r", True)[0]


def fence_cluster() -> None:
    """What this thread wrote before, the other CTAs of the cluster see before what it does afterwards; and it them."""
    compat.inline_assembly([], [], "fence.acq_rel.cluster;", "", False)


def thread_address(base: Value, stride: int) -> Value:
    """base plus `stride` bytes for every thread of the warpgroup before this one, a 64-bit address."""
    text = f"mad.wide.u32 $0, $2, {stride}, $1;"
    return compat.inline_assembly([_i64()], [base, compat.thread_in_warpgroup()], text, "=l,l,r", True)[0]


def store_four(address: Value, offset: int, registers: list[Value]) -> None:
    """Four registers to 16 bytes of global memory, `offset` bytes from an address."""
    letter = "f" if registers[0].type == compat.f32() else "r"
    text = f"st.global.v4.b32 [$0 + {offset}], {{$1, $2, $3, $4}};"
    compat.inline_assembly([], [address, *registers], text, ",".join("l" + 4 * letter), False)


def load_fours(address: Value, offset: int, count: int, kind: Value) -> list[Value]:
    """`count` registers of a type, all loads before anything else: each four of them from 16 bytes of global memory
    that another CTA may have written, `offset` bytes from an address and then what a warpgroup stores at once apart."""
    letter = "f" if kind == compat.f32() else "r"
    lines = [
        f"ld.global.v4.b32 {{${i}, ${i + 1}, ${i + 2}, ${i + 3}}}, [${count} + {offset + 4 * compat.THREADS * i}];"
        for i in range(0, count, 4)
    ]
    constraints = ",".join([f"=&{letter}"] * count + ["l"])
    return compat.inline_assembly([kind] * count, [address], "\n".join(lines), constraints, False)


def fence_device() -> None:
    """What this thread wrote before, other CTAs see before what it does afterwards."""
    compat.inline_assembly([], [], "fence.acq_rel.gpu;", "", False)


def raise_semaphore(address: Value, thread: Value) -> None:
    """Adds one to a semaphore in global memory, by the first thread alone."""
    text = "{ .reg .pred first; setp.eq.u32 first, $1, 0; @first red.release.gpu.global.add.u32 [$0], 1; }"
    compat.inline_assembly([], [address, thread], text, "l,r", False)


def wait_for_semaphore(address: Value) -> None:
    """Waits until a semaphore in global memory is not zero."""
    text = (
        "{ .reg .pred zero; .reg .b32 value; again: ld.acquire.gpu.global.u32 value, [$0]; "
        "setp.eq.u32 zero, value, 0; @zero bra again; }"
    )
    compat.inline_assembly([], [address], text, "l", False)


def wait_for_cluster() -> None:
    """Waits until every thread of the cluster has come here."""
    text = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
    compat.inline_assembly([], [], text, "", False)


def load_narrow(space: Literal["shared", "global"], address: Value, dtype: str) -> Value:
    """One bfloat16, float16, float32 (as a float32 register) or uint8 (as an integer register) of memory."""
    pointer = "r" if space == "shared" else "l"
    if dtype == "float32":
        return compat.inline_assembly([compat.f32()], [address], f"ld.{space}.f32 $0, [$1];", f"=f,{pointer}", False)[0]
    if dtype == "uint8":
        return compat.inline_assembly([compat.i32()], [address], f"ld.{space}.u8 $0, [$1];", f"=r,{pointer}", False)[0]
    if dtype not in ("bfloat16", "float16"):
        raise ValueError(f"a kernel cannot read {dtype}; expected float32, bfloat16, float16 or uint8")
    convert = "mov.b32 $0, {zero, half};" if dtype == "bfloat16" else "cvt.f32.f16 $0, half;"
    text = f"{{ .reg .b16 half, zero; mov.b16 zero, 0; ld.{space}.b16 half, [$1]; {convert} }}"
    return compat.inline_assembly([compat.f32()], [address], text, f"=f,{pointer}", False)[0]


def shared_address(ref: Value) -> Value:
    """The byte address of a shared-memory ref, as an integer register."""
    return compat.llvm.ptrtoint(compat.i32(), compat.pointer(ref))


def global_address(ref: Value) -> Value:
    """The byte address of a ref in global memory, as a 64-bit register."""
    return compat.llvm.ptrtoint(_i64(), compat.pointer(ref))


def address_of_chunk(base: Value, index: Value, size: int) -> Value:
    """The address of the chunk number `index`, of `size` bytes each, as a 64-bit register."""
    text = f"mad.wide.u32 $0, $2, {size}, $1;"
    return compat.inline_assembly([_i64()], [base, index], text, "=l,l,r", True)[0]


def load_constants(address: Value, offset: int, index: Value, count: int | None) -> list[Value]:
    """32 bytes of global memory that nobody writes, `offset` bytes from an address, as eight words. Zeros unless
    index < count, where there is a count.

    Not pure: many of these stay in a row, before anything that waits for one of them."""
    inside = "" if count is None else "@inside "
    lines = ["{ .reg .pred inside;"]
    if count is not None:
        lines += [f"setp.lt.u32 inside, $9, {count};", *(f"mov.b32 ${i}, 0;" for i in range(8))]
    for i in (0, 4):
        words = ", ".join(f"${i + j}" for j in range(4))
        lines.append(f"{inside}ld.global.nc.v4.b32 {{{words}}}, [$8 + {offset + 4 * i}];")
    constraints = ",".join(["=&r"] * 8 + ["l", "r"])
    return compat.inline_assembly([compat.i32()] * 8, [address, index], "\n".join([*lines, "}"]), constraints, False)


def load_float(base: Value, index: Value, dtype: str = "float32") -> Value:
    """Entry `index` of an array of floats in global memory, as a float32 register."""
    load, size = {
        "float32": ("ld.global.nc.f32 $0, [place];", 4),
        "bfloat16": ("ld.global.nc.b16 half, [place]; mov.b16 zero, 0; mov.b32 $0, {zero, half};", 2),
        "float16": ("ld.global.nc.b16 half, [place]; cvt.f32.f16 $0, half;", 2),
    }[dtype]
    text = f"{{ .reg .b64 place; .reg .b16 half, zero; mad.wide.u32 place, $2, {size}, $1; {load} }}"
    return compat.inline_assembly([compat.f32()], [base, index], text, "=f,l,r", True)[0]


def address_of_float(base: Value, index: Value) -> Value:
    """The address of entry `index` of an array of float32 in global memory, as a 64-bit register."""
    return compat.inline_assembly([_i64()], [base, index], "mad.wide.u32 $0, $2, 4, $1;", "=l,l,r", True)[0]


def load_ahead(address: Value, index: Value, ahead: int, count: int) -> Value:
    """The float32 that lies `ahead` entries behind that of `index` at `address`, 0 from entry `count` of the array on.

    Many of these share one address, where those of `load_float` keep two registers each."""
    text = (
        f"{{ .reg .pred inside; setp.lt.s32 inside, $2, {count - ahead}; mov.b32 $0, 0; "
        f"@inside ld.global.nc.f32 $0, [$1 + {4 * ahead}]; }}"
    )
    return compat.inline_assembly([compat.f32()], [address, index], text, "=&f,l,r", True)[0]


def store_output(
    base: Value, value: Value, index: tuple[Value, Value, Value], sizes: tuple[int, int], dtype: str
) -> None:
    """Writes a float32 register to [part, token, row] of an array [parts, M, N], unless past the end of M or N."""
    convert, size = {
        "float32": ("mov.b32 out, $4;", 4),
        "bfloat16": ("cvt.rn.bf16.f32 out, $4;", 2),
        "float16": ("cvt.rn.f16.f32 out, $4;", 2),
    }[dtype]
    tokens, rows = sizes
    lines = [
        f"{{ .reg .pred inside; .reg .b32 line; .reg .b64 place; .reg .b{8 * size} out;",
        f"setp.lt.u32 inside, $2, {tokens}; setp.lt.and.u32 inside, $3, {rows}, inside;",
        f"mad.lo.u32 line, $1, {tokens}, $2; mul.wide.u32 place, line, {rows * size};",
        f"add.s64 place, place, $0; mad.wide.u32 place, $3, {size}, place;",
        f"{convert} @inside st.global.b{8 * size} [place], out; }}",
    ]
    compat.inline_assembly([], [base, *index, value], "\n".join(lines), "l,r,r,r,f", False)


def columns_descriptor(address: Value, group_stride: int) -> Value:
    """What tells `wgmma` where B lies: rows of 128 bytes in groups of eight (1 KiB), `group_stride` bytes apart.

    Bits 0-13 address / 16, 32-45 group stride / 16, 62-63 the swizzle (1: 128 bytes). The other fields are of no
    effect for this swizzle.
    """
    text = (
        "{ .reg .b32 low; bfe.u32 low, $1, 4, 14; or.b32 low, low, 0x10000; "
        f"mov.b64 $0, {{low, {(1 << 30) | (group_stride >> 4)}}}; }}"
    )
    return compat.inline_assembly([_i64()], [address], text, "=l,r", True)[0]


def rows_descriptor(address: Value, rows: int) -> Value:
    """What tells `wgmma` where B lies, eight columns of it: core matrices of eight rows of 16 bytes, without swizzle,
    each `rows` of these rows after the one before along K; the columns from `rows` on belong to those that follow.

    Bits 0-13 address / 16, 16-29 what lies between core matrices along K / 16; 32-45, along N, is of no effect.
    """
    text = f"{{ .reg .b32 low; bfe.u32 low, $1, 4, 14; or.b32 low, low, {rows << 16}; mov.b64 $0, {{low, {rows}}}; }}"
    return compat.inline_assembly([_i64()], [address], text, "=l,r", True)[0]


def multiply_tile(
    accumulator: list[Value] | None,
    fragments: list[list[Value]],
    descriptor: Value,
    offset: int,
    n: int,
    kind: Operand,
    step_bytes: int = 32,
) -> list[Value]:
    """Issues D (+)= A B for one tile; see the module. None starts from zero. Returns registers that are not ready.

    fragments: four registers for every instruction; offset: bytes from the descriptor's address to the tile's columns,
    step_bytes: from the columns of an instruction to those of the next.
    Nothing may touch what is returned before `wait_for_products`, except another `multiply_tile`.
    """
    count = n // 2
    result_kind, letter = (compat.i32(), "r") if kind == "s8" else (compat.f32(), "f")
    instruction, tail = {
        "s8": (f"wgmma.mma_async.sync.aligned.m64n{n}k32.s32.s8.s8", ""),
        "bf16": (f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16", ", 1, 1, 0"),
        "f16": (f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16", ", 1, 1, 0"),
    }[kind]
    inputs = [register for fragment in fragments for register in fragment]
    tied = [] if accumulator is None else accumulator
    place = count + len(tied)
    sums = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    lines = [
        "{ .reg .pred first, rest; .reg .b64 columns;",
        f"setp.ne.b32 first, {0 if accumulator is None else 1}, 0; setp.ne.b32 rest, 1, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(len(fragments)):
        a = "{" + ", ".join(f"${place + 4 * step + i}" for i in range(4)) + "}"
        lines.append(f"add.s64 columns, ${place + len(inputs)}, {(offset + step_bytes * step) >> 4};")
        lines.append(f"{instruction} {sums}, {a}, columns, {'rest' if step else 'first'}{tail};")
    lines.append("wgmma.commit_group.sync.aligned; }")
    constraints = [f"=&{letter}" if accumulator is None else f"={letter}"] * count
    constraints += [str(i) for i in range(len(tied))] + ["r"] * len(inputs) + ["l"]
    return compat.inline_assembly(
        [result_kind] * count, [*tied, *inputs, descriptor], "\n".join(lines), ",".join(constraints), False
    )


def wait_for_products(accumulator: list[Value], in_flight: int, operands: Sequence[Value] = ()) -> list[Value]:
    """Waits until at most `in_flight` later tiles are unfinished; the registers returned are ready. `operands` belong
    to the products until then: named here, their registers hold nothing else before."""
    letter = "r" if accumulator[0].type == compat.i32() else "f"
    constraints = [f"={letter}"] * len(accumulator) + [str(i) for i in range(len(accumulator))]
    constraints += ["f" if register.type == compat.f32() else "r" for register in operands]
    kinds = [register.type for register in accumulator]
    text = f"wgmma.wait_group.sync.aligned {in_flight};"
    return compat.inline_assembly(kinds, [*accumulator, *operands], text, ",".join(constraints), False)


def wait_for_earlier(in_flight: int) -> None:
    """Waits until at most `in_flight` tiles are unfinished, for the sake of the operand registers of the others."""
    compat.inline_assembly([], [], f"wgmma.wait_group.sync.aligned {in_flight};", "", False)


def _i64() -> Value:
    return compat.ir.IntegerType.get_signless(64)


def _lop3(word: Value, mask: int, value: int, table: int) -> Value:
    text = f"lop3.b32 $0, $1, {mask}, {value}, {table};"
    return compat.inline_assembly([compat.i32()], [word], text, "=r,r", True)[0]
