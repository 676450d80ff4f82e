"""Blocks of y written through shared memory: whole lines of 128 bytes instead of single entries.

A thread has entries of two rows of y^T, 2 bytes each, that lie far apart in y [M, N]. Written one by one, a block of
256 x 128 took 5 us, of 26 that it is computed in with 4096 inputs of 8 bits. Here a warpgroup turns TOKENS tokens at a
time of its 64 outputs, [TOKENS, 64], by `stmatrix`, transposed, into one of two places in shared memory, and the copy
engine writes them while the next are made; tokens past the end it leaves out.

    matrix of stmatrix      8 outputs (16w + 8h..) of 8 tokens: register (j, h), the tokens 2t and 2t + 1 as halves
    shared memory           line token, 128 bytes, its eight pieces of 16 bytes permuted by token % 8 (128-byte swizzle)

PTX ISA, "stmatrix": with .trans the entry that thread 4g + t would put in line g goes to line 2t or 2t + 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.affine_matmul import instructions as ops
from pallas_kernels.affine_matmul.config import STORED_TOKENS as TOKENS, Config, Problem, writes_tiles
from pallas_kernels.compat import Value, arith, constant

# lines follow each other whatever the height of a tile, and one line divides every number of tokens
_SWIZZLE = (plgpu.TilingTransform((1, 64)), plgpu.SwizzleTransform(128))
_LINE = 128  # bytes


def tiles_scratch(problem: Problem, config: Config, dtype: Any) -> dict[str, Any]:
    """The shared memory of the tiles, two a warpgroup; none where blocks are not written so."""
    if not writes_tiles(problem, config) or jnp.dtype(dtype).itemsize != 2:
        return {}
    return {"tiles": plgpu.SMEM((config.row_warpgroups, 2, TOKENS, 64), dtype, transforms=_SWIZZLE)}


def store_tiles(config: Config, dtype: Any) -> Callable[..., None]:
    """The function (tiles, y, split, first token, first row, block) -> None of one warpgroup: tiles are its two places,
    y is [M, N] and whole (split is 0), block [64, block_m] float32 in block_m / 2 registers of every thread."""
    layout = compat.registers_layout(config.block_m // 2)
    operand: ops.Operand = "bf16" if jnp.dtype(dtype) == jnp.bfloat16 else "f16"

    def put(chunk: int, tile: Any, block: jax.Array) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_SWIZZLE), layout))
        def run(_: Any, tile: Value, block: Any) -> None:
            line = line_address(compat.address(tile), compat.thread_in_warpgroup())
            registers = compat.registers_of(block)[TOKENS // 2 * chunk : TOKENS // 2 * (chunk + 1)]
            pairs = zip(registers[::2], registers[1::2], strict=True)
            matrices = [ops.pack_pair(low, high, operand) for low, high in pairs]
            ops.store_matrices(line, matrices)

        run(tile, block)  # pyright: ignore[reportCallIssue]

    def store(tiles: Any, y: Any, _: Any, first_token: Any, first_row: Any, block: jax.Array) -> None:
        for chunk in range(config.block_m // TOKENS):
            tile = tiles.at[chunk % 2]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            put(chunk, tile, block)
            plgpu.commit_smem()
            tokens = pl.ds(first_token + TOKENS * chunk, TOKENS)
            plgpu.copy_smem_to_gmem(tile, y.at[tokens, pl.ds(first_row, 64)])

    return store


def line_address(tile: Value, thread: Value) -> Value:
    """The address of the line that a thread gives to `stmatrix`: lane 8i + l that of line l of matrix i = 2j + h."""
    lane, warp = arith.andi(thread, constant(31)), arith.shrui(thread, constant(5))
    line, matrix = arith.andi(lane, constant(7)), arith.shrui(lane, constant(3))
    token = arith.addi(arith.muli(arith.shrui(matrix, constant(1)), constant(8)), line)
    piece = arith.addi(arith.muli(warp, constant(2)), arith.andi(matrix, constant(1)))
    place = arith.muli(arith.xori(piece, line), constant(16))
    return arith.addi(arith.addi(tile, arith.muli(token, constant(_LINE))), place)
