"""What one warpgroup of the affine kernel does with its sums at the end: it scales them and writes them.

    y[m, n] = sum * row_scales[n] * x_scales[m] + x_offsets[m] * row_sums[n]        the factors that there are

A thread holds block_m / 2 sums of each plane of operands: register 4j + 2h + e is row r0 or r1 (h), token 8j + 2t + e.
Two sets, of a low and of a high operand, meet first, high * 256 + low; what was summed for the only token, by pieces or
by sparse entries apart, is added over the four threads that share rows.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.affine_matmul import instructions as ops
from pallas_kernels.affine_matmul.config import Config, Problem, registers_of_sums
from pallas_kernels.compat import Value, arith, constant


def row_of(thread: Value) -> Value:
    """r0 of a thread: 16 * warp + lane // 4."""
    warp = arith.shrui(thread, constant(5))
    group = arith.andi(arith.shrui(thread, constant(2)), constant(7))
    return arith.addi(arith.muli(warp, constant(16)), group)


def store_block(
    problem: Problem, config: Config, dtype: Any, dtypes: dict[str, str], factor: int
) -> Callable[..., None]:
    """The function (refs, first token, first row, split, sums) -> None that scales a block [64, block_m] and writes it.

    dtypes: of the arrays there are; factor: how many times the weight an 8-bit operand is.

    y[m, n] = sum * row_scales[n] * x_scales[m] + x_offsets[m] * row_sums[n], the factors that there are;
    of a token in pieces, y[0, n] = sum over j of sums[j] * row_scales[n] * x_scales[j].
    """
    epilogue = {name: dtypes[name] for name in ("row_scales", "x_scales", "x_offsets", "row_sums") if name in dtypes}
    count = registers_of_sums(problem, config)

    @plgpu.inline_mgpu(
        arg_types=(
            [plgpu.RefType()] * (1 + len(epilogue)),
            [compat.SCALAR] * 3,
            compat.registers_layout(count),
        )
    )
    def store(_: Any, arrays: list[Value], places: list[Any], sums: Any) -> None:
        bases = dict(zip(("out", *epilogue), (ops.global_address(ref) for ref in arrays), strict=True))
        corner = [compat.scalar_of(place) for place in places]
        out = jnp.dtype(dtype).name
        _store(problem, config, bases, epilogue, corner, compat.registers_of(sums), out, factor)

    def run(refs: dict[str, Any], first_token: Any, first_row: Any, split: Any, sums: Any) -> None:
        arrays = [refs[name] for name in ("out", *epilogue)]
        store(arrays, [first_token, first_row, split], sums)  # pyright: ignore[reportCallIssue]

    return run


def _store(
    problem: Problem,
    config: Config,
    bases: dict[str, Value],
    dtypes: dict[str, str],
    corner: list[Value],
    sums: list[Value],
    dtype: str,
    factor: int,
) -> None:
    first_token, first_row, split = corner
    thread = compat.thread_in_warpgroup()
    row0 = arith.addi(first_row, row_of(thread))
    rows = [row0, arith.addi(row0, constant(8))]
    token0 = arith.addi(first_token, arith.muli(arith.andi(thread, constant(3)), constant(2)))
    values = [ops.to_float(v) if v.type == compat.i32() else v for v in sums]
    if problem.planes == 2:
        low, high = values[: len(values) // 2], values[len(values) // 2 :]
        values = [ops.multiply_add(h, ops.float_constant(256.0), v) for v, h in zip(low, high, strict=True)]
    if problem.multiplies_entries:
        values[0], values[2] = ops.sum_of_four(values[0]), ops.sum_of_four(values[2])
    last_row, last_token = constant(problem.outputs - 1), constant(problem.tokens * problem.pieces - 1)

    def entry(name: str, index: Value, last: Value) -> Value:
        return ops.load_float(bases[name], arith.minui(index, last), dtypes[name])

    row_scales = None
    if "row_scales" in bases:
        row_scales = [entry("row_scales", row, last_row) for row in rows]
        if problem.x_dtype == "int8" and factor != 1:
            inverse = ops.float_constant(1.0 / factor)
            row_scales = [ops.multiply(scale, inverse) for scale in row_scales]
    row_sums = [entry("row_sums", row, last_row) for row in rows] if "row_sums" in bases else None
    sizes = (problem.tokens, problem.outputs)
    pieces: list[list[Value]] = [[], []]  # of rows r0 and r1
    for j in range(1 if problem.pieces > 1 else config.block_m // 8):
        for e in range(2):
            token = arith.addi(token0, constant(8 * j + e))
            scale = entry("x_scales", token, last_token) if "x_scales" in bases else None
            offset = entry("x_offsets", token, last_token) if "x_offsets" in bases else None
            for h, row in enumerate(rows):
                value = values[4 * j + 2 * h + e]
                if row_scales is not None:
                    value = ops.multiply(value, row_scales[h])
                if scale is not None:
                    value = ops.multiply(value, scale)
                if offset is not None and row_sums is not None:
                    value = ops.multiply_add(offset, row_sums[h], value)
                if problem.pieces > 1:
                    pieces[h].append(value)
                else:
                    ops.store_output(bases["out"], value, (split, token, row), sizes, dtype)
    for row, parts in zip(rows, pieces, strict=True):
        if parts:  # columns beyond the pieces are zero
            total = ops.sum_of_four(arith.addf(*parts))
            ops.store_output(bases["out"], total, (split, token0, row), sizes, dtype)
