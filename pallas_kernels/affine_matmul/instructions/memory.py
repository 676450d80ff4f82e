"""Loads and stores, addresses, and what orders them: fences, barriers and semaphores.

Addresses of shared memory are 32-bit registers, those of global memory 64.
"""

from typing import Literal

from pallas_kernels import compat
from pallas_kernels.compat import Value


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
    return compat.inline_assembly([compat.i64()], [base, compat.thread_in_warpgroup()], text, "=l,l,r", True)[0]


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


def address_of_chunk(base: Value, index: Value, size: int) -> Value:
    """The address of the chunk number `index`, of `size` bytes each, as a 64-bit register."""
    text = f"mad.wide.u32 $0, $2, {size}, $1;"
    return compat.inline_assembly([compat.i64()], [base, index], text, "=l,l,r", True)[0]


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
    return compat.inline_assembly([compat.i64()], [base, index], "mad.wide.u32 $0, $2, 4, $1;", "=l,l,r", True)[0]


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
