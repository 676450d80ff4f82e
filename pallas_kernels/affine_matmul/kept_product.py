"""Kept input columns inside the affine kernel: a product of 16 bits on top of the scaled sums.

    y^T [N, M] += W [N, k] x^T [k, M]       W, x the kept columns; words of W: `pallas_kernels.kept_columns`

Written apart and added by another kernel, float32 sums would pass through memory twice. Here the warpgroup that has all
sums of a block turns them into float32 values of y, and these registers are the accumulator of the tensor core for
64 kept columns at a time, before they are rounded to the type of the output.

The copying warpgroup brings the tiles of a block, behind its last stage, into a ring of their own of `kept_places`:
[row warpgroups, 1, 16, 128] uint32 words, and inputs [block_m, 64] of 16 bits with the 128-byte swizzle. Every block
begins at the first place, so nobody counts blocks: a place is given back once before it is first filled
(`offer_places`), and then after every tile.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.affine_matmul import instructions as ops
from pallas_kernels.affine_matmul.config import Config, Problem, kept_places
from pallas_kernels.compat import Value, arith, constant
from pallas_kernels.kept_columns import PLANES

_SWIZZLE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_OPERANDS: dict[str, ops.Operand] = {"bfloat16": "bf16", "float16": "f16"}
_STEP_BYTES = 16 * compat.THREADS  # four registers a thread
_TILE_BYTES = 4 * _STEP_BYTES


def kept_scratch(problem: Problem, config: Config) -> dict[str, Any]:
    """The shared memory and barriers of the ring; none without kept columns."""
    places = kept_places(problem, config)
    if not places:
        return {}
    return {
        "kept_words": plgpu.SMEM((places, config.row_warpgroups, 1, PLANES, compat.THREADS), jnp.uint32),
        "kept_x": plgpu.SMEM((places, config.block_m, 64), jnp.dtype(problem.kept_dtype), transforms=_SWIZZLE),
        "kept_full": plgpu.Barrier(num_arrivals=2, num_barriers=places),
        "kept_empty": plgpu.Barrier(num_arrivals=config.row_warpgroups, num_barriers=places),
    }


def offer_places(problem: Problem, config: Config, shared: dict[str, Any]) -> None:
    """Gives all places to the copying warpgroup: once, by each of the warpgroups that multiply."""
    for place in range(kept_places(problem, config)):
        plgpu.barrier_arrive(shared["kept_empty"].at[place])


def copy_kept(
    problem: Problem,
    config: Config,
    refs: dict[str, Any],
    shared: dict[str, Any],
    row: jax.Array,
    column: jax.Array,
    tiles: Any,
) -> None:
    """Starts the copies of `tiles` tiles for a block of outputs and one of tokens, as places become free."""
    places = kept_places(problem, config)
    rows = pl.ds(row * config.row_warpgroups, config.row_warpgroups)
    tokens = pl.ds(column * config.block_m, config.block_m)

    def copy(tile: jax.Array, _: None) -> None:
        place = lax.rem(tile, jnp.int32(places))
        full = shared["kept_full"].at[place]
        plgpu.barrier_wait(shared["kept_empty"].at[place])
        words, x = refs["kept_words"].at[rows, pl.ds(tile, 1)], refs["kept_x"].at[tokens, pl.ds(tile * 64, 64)]
        plgpu.copy_gmem_to_smem(words, shared["kept_words"].at[place], full)
        plgpu.copy_gmem_to_smem(x, shared["kept_x"].at[place], full)

    lax.fori_loop(0, tiles, copy, None)


def read_kept(base: Value, thread: Value) -> list[list[Value]]:
    """A of the four m64k16 of a tile, for thread 0..127; its words are at the byte address `base` of shared memory."""
    first = arith.muli(thread, constant(16))
    return [ops.load_shared(base, arith.addi(first, constant(_STEP_BYTES * step)), 4) for step in range(4)]


def kept_product(problem: Problem, config: Config) -> Callable[..., jax.Array]:
    """The function (shared, row_part, tiles, y) -> y plus the product of the first `tiles` tiles, y being a block
    [64, block_m] of float32 in block_m / 2 registers of every thread."""
    places, count = kept_places(problem, config), config.block_m // 2
    operand = _OPERANDS[problem.kept_dtype]

    @plgpu.inline_mgpu(
        arg_types=([plgpu.RefType(), plgpu.RefType(_SWIZZLE)], compat.registers_layout(count), compat.SCALAR),
        return_type=compat.registers_type(count, jnp.float32),
    )
    def multiply(_: Any, tile: list[Value], y: Any, row_part: Any) -> Any:
        words, x = (compat.address(ref) for ref in tile)
        own = arith.addi(words, arith.muli(compat.scalar_of(row_part), constant(_TILE_BYTES)))
        fragments = read_kept(own, compat.thread_in_warpgroup())
        columns = ops.columns_descriptor(x, 1024)  # groups of eight tokens follow each other
        sums = ops.multiply_tile(compat.registers_of(y), fragments, columns, 0, config.block_m, operand)
        # at once: the next tile is read into the registers of this operand
        return compat.array_of(ops.wait_for_products(sums, 0))

    def run(shared: dict[str, Any], row_part: Any, tiles: Any, y: jax.Array) -> jax.Array:
        def add(index: jax.Array, y: jax.Array) -> jax.Array:
            place = lax.rem(index, jnp.int32(places))
            plgpu.barrier_wait(shared["kept_full"].at[place])
            tile = [shared[name].at[place] for name in ("kept_words", "kept_x")]
            y = multiply(tile, y, row_part)  # pyright: ignore[reportCallIssue, reportAssignmentType]
            plgpu.barrier_arrive(shared["kept_empty"].at[place])
            return y

        return lax.fori_loop(0, tiles, add, y)

    return run
