"""The products of the tensor core.

`multiply_tile` issues those of one 64 x 64 tile of weights, without waiting for them:

    D [64, n] (+)= A [64, 64] B [64, n]     A in registers, B in shared memory, K-major, 128-byte swizzle or none

    16-bit: 4 x m64 n k16, D float32        8-bit: 2 x m64 n k32, D int32

Thread (w, g, t) holds D in n / 2 registers: register 4j + 2h + e is row 16w + g + 8h, column 8j + 2t + e.
PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate".
"""

from collections.abc import Sequence

from pallas_kernels import compat
from pallas_kernels.affine_matmul.instructions.arithmetic import Operand
from pallas_kernels.compat import Value


def columns_descriptor(address: Value, group_stride: int) -> Value:
    """What tells `wgmma` where B lies: rows of 128 bytes in groups of eight (1 KiB), `group_stride` bytes apart.

    Bits 0-13 address / 16, 32-45 group stride / 16, 62-63 the swizzle (1: 128 bytes). The other fields are of no
    effect for this swizzle.
    """
    text = (
        "{ .reg .b32 low; bfe.u32 low, $1, 4, 14; or.b32 low, low, 0x10000; "
        f"mov.b64 $0, {{low, {(1 << 30) | (group_stride >> 4)}}}; }}"
    )
    return compat.inline_assembly([compat.i64()], [address], text, "=l,r", True)[0]


def rows_descriptor(address: Value, rows: int) -> Value:
    """What tells `wgmma` where B lies, eight columns of it: core matrices of eight rows of 16 bytes, without swizzle,
    each `rows` of these rows after the one before along K; the columns from `rows` on belong to those that follow.

    Bits 0-13 address / 16, 16-29 what lies between core matrices along K / 16; 32-45, along N, is of no effect.
    """
    text = f"{{ .reg .b32 low; bfe.u32 low, $1, 4, 14; or.b32 low, low, {rows << 16}; mov.b64 $0, {{low, {rows}}}; }}"
    return compat.inline_assembly([compat.i64()], [address], text, "=l,r", True)[0]


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
