"""The entries of `tiles` as a matrix: the kernel that checks `EntryAdder` on a device, and nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.compat import Value, arith, constant
from pallas_kernels.sparse_matmul.tiles import (
    SCRATCH_BYTES,
    SLOTS,
    TILE,
    WARPS,
    EntryAdder,
    EntryTiles,
    global_address,
    shared_address,
)


def dense_entries(tiles: EntryTiles, dtype: Any) -> jax.Array:
    """What a kernel would add to its weights: [N, K] of `dtype`, N and K rounded up to whole tiles."""
    rows, blocks, _ = tiles.slots.shape
    operand = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    width = blocks * TILE
    refs_type = [plgpu.RefType()] * 4

    def adder_of(refs: list[Value]) -> EntryAdder:
        return EntryAdder(shared_address(refs[1]), global_address(refs[2]), operand)

    @plgpu.inline_mgpu(arg_types=(refs_type,))
    def clear(_: Any, refs: list[Value]) -> None:
        adder_of(refs).clear()

    @plgpu.inline_mgpu(arg_types=(refs_type, compat.SCALAR, compat.SCALAR))
    def write(_: Any, refs: list[Value], row_block: Any, column_block: Any) -> None:
        adder, row, column = adder_of(refs), compat.scalar_of(row_block), compat.scalar_of(column_block)
        zeros = [[constant(0)] * 4 for _ in range(4)]
        added = adder.add_entries(zeros, shared_address(refs[0]))
        first = arith.addi(arith.muli(row, constant(TILE)), arith.muli(adder.warp, constant(16)))
        first = arith.addi(first, arith.shrui(adder.lane, constant(2)))
        pair = arith.muli(arith.andi(adder.lane, constant(3)), constant(2))
        pair = arith.addi(pair, arith.muli(column, constant(TILE)))
        text = (
            f"{{ .reg .b64 place; mul.wide.u32 place, $1, {2 * width}; add.s64 place, place, $0; "
            "mad.wide.u32 place, $2, 2, place; st.global.b32 [place], $3; }"
        )
        for step, registers in enumerate(added):
            for i, register in enumerate(registers):
                line = arith.addi(first, constant(8 * (i % 2)))
                place = arith.addi(pair, constant(16 * step + 8 * (i // 2)))
                compat.inline_assembly([], [global_address(refs[3]), line, place, register], text, "l,r,r,r", False)

    def body(slots: Any, overflow: Any, out: Any, scratch: Any, staged: Any, barrier: Any, read: Any) -> None:
        row = jax.lax.axis_index("rows")
        refs = [staged, scratch, overflow, out]
        clear(refs)  # pyright: ignore[reportCallIssue]

        def step(column: jax.Array, _: None) -> None:
            plgpu.copy_gmem_to_smem(slots.at[row, column], staged, barrier)
            plgpu.barrier_wait(barrier)
            write(refs, row, column)  # pyright: ignore[reportCallIssue]
            # every warp has read the slots before the next ones arrive
            plgpu.barrier_arrive(read)
            plgpu.barrier_wait(read)

        jax.lax.fori_loop(0, blocks, step, None)

    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows * TILE, width), jnp.dtype(dtype)),
        scratch_types=[
            plgpu.SMEM((WARPS * SCRATCH_BYTES // 4,), jnp.int32),
            plgpu.SMEM((SLOTS,), jnp.uint32),
            plgpu.Barrier(),
            plgpu.Barrier(),
        ],
        grid=(rows,),
        grid_names=("rows",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=compat.WARPGROUP,
    )
    return run(tiles.slots, tiles.overflow)
