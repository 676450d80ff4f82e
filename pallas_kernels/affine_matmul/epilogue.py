"""What one warpgroup of the affine kernel does with its sums at the end: it scales them and writes them.

    y[m, n] = sum * row_scales[n] * x_scales[m] + x_offsets[m] * row_sums[n]        the factors that there are

A thread holds block_m / 2 sums of each plane of operands: register 4j + 2h + e is row r0 or r1 (h), token 8j + 2t + e.
Two sets, of a low and of a high operand, meet first, high * 256 + low; what was summed for the only token, by pieces or
by sparse entries apart, is added over the four threads that share rows. Between scaling and writing y is float32, in
the registers of the sums, where kept columns are added (`pallas_kernels.affine_matmul.kept_product`).
"""

from collections.abc import Callable
from typing import Any

import jax
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


def scale_block(problem: Problem, config: Config, dtypes: dict[str, str], factor: int) -> Callable[..., jax.Array]:
    """The function (refs, first token, first row, sums) -> y, a block [64, block_m] in float32.

    dtypes: of the arrays there are, refs those of the same names; factor: how many times the weight an 8-bit operand
    is. Of a token in pieces the columns are the products of these, and only the first four registers are left.
    """
    if problem.token_dtype:
        dtypes = dtypes | {"x_scales": "float32"}
    epilogue = {name: dtypes[name] for name in ("row_scales", "x_scales", "x_offsets", "row_sums") if name in dtypes}
    count, values = registers_of_sums(problem, config), _values(problem, config)

    @plgpu.inline_mgpu(
        arg_types=([plgpu.RefType()] * len(epilogue), [compat.SCALAR] * 2, compat.registers_layout(count)),
        return_type=compat.registers_type(values, jnp.float32),
    )
    def scale(_: Any, arrays: list[Value], places: list[Any], sums: Any) -> Any:
        bases = {name: compat.address(ref) for name, ref in zip(epilogue, arrays, strict=True)}
        row0, token0 = _first(*(compat.scalar_of(place) for place in places))
        floats = _added(problem, compat.registers_of(sums))[:values]
        return compat.array_of(_scaled(problem, bases, epilogue, row0, token0, floats, factor))

    def run(refs: dict[str, Any], first_token: Any, first_row: Any, sums: jax.Array) -> jax.Array:
        arrays = [refs[name] for name in epilogue]
        return scale(arrays, [first_token, first_row], sums)  # pyright: ignore[reportCallIssue, reportReturnType]

    return run


def store_block(problem: Problem, config: Config, dtype: Any) -> Callable[..., None]:
    """The function (out, split, first token, first row, y) -> None that writes a block, entry by entry."""
    layout = compat.registers_layout(_values(problem, config))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), [compat.SCALAR] * 3, layout))
    def store(_: Any, out: Value, places: list[Any], block: Any) -> None:
        first_token, first_row, split = (compat.scalar_of(place) for place in places)
        base, name = compat.address(out), jnp.dtype(dtype).name
        _store(problem, base, name, split, *_first(first_token, first_row), compat.registers_of(block))

    def run(out: Any, split: Any, first_token: Any, first_row: Any, block: jax.Array) -> None:
        store(out, [first_token, first_row, split], block)  # pyright: ignore[reportCallIssue]

    return run


def _values(problem: Problem, config: Config) -> int:
    """Registers of a thread that hold y; columns beyond the pieces of a token are zero."""
    return 4 if problem.pieces > 1 else config.block_m // 2


def _first(first_token: Value, first_row: Value) -> tuple[Value, Value]:
    """Row r0 and the first token of a thread, of a block from first_row and first_token."""
    thread = compat.thread_in_warpgroup()
    column = arith.muli(arith.andi(thread, constant(3)), constant(2))
    return arith.addi(first_row, row_of(thread)), arith.addi(first_token, column)


def _added(problem: Problem, sums: list[Value]) -> list[Value]:
    """Sums as float32, those of both operands and those of the threads that share rows as one."""
    values = [ops.to_float(v) if v.type == compat.i32() else v for v in sums]
    if problem.planes == 2:
        low, high = values[: len(values) // 2], values[len(values) // 2 :]
        values = [ops.multiply_add(h, ops.float_constant(256.0), v) for v, h in zip(low, high, strict=True)]
    if problem.multiplies_entries:
        values[0], values[2] = ops.sum_of_four(values[0]), ops.sum_of_four(values[2])
    return values


def _scaled(
    problem: Problem,
    bases: dict[str, Value],
    dtypes: dict[str, str],
    row0: Value,
    token0: Value,
    values: list[Value],
    factor: int,
) -> list[Value]:
    rows = [row0, arith.addi(row0, constant(8))]
    last_row = constant(problem.outputs - 1)

    def of_rows(name: str) -> list[Value] | None:
        if name not in bases:
            return None
        return [ops.load_float(bases[name], arith.minui(row, last_row), dtypes[name]) for row in rows]

    names = () if problem.token_dtype else ("x_scales", "x_offsets")
    of_tokens = {name: ops.address_of_float(bases[name], token0) for name in names if name in bases}

    def of_token(name: str, ahead: int) -> Value | None:
        if name not in bases:
            return None
        if problem.token_dtype:  # scales that the kernel made lie in shared memory, one a column
            address = arith.addi(bases[name], arith.muli(arith.addi(token0, constant(ahead)), constant(4)))
            return ops.load_narrow("shared", address, "float32")
        return ops.load_ahead(of_tokens[name], token0, ahead, problem.tokens * problem.pieces)

    row_scales, row_sums = of_rows("row_scales"), of_rows("row_sums")
    if row_scales is not None:
        if problem.x_dtype == "int8" and factor != 1:
            inverse = ops.float_constant(1.0 / factor)
            row_scales = [ops.multiply(scale, inverse) for scale in row_scales]
    values = list(values)
    for j in range(len(values) // 4):
        for e in range(2):
            scale, offset = of_token("x_scales", 8 * j + e), of_token("x_offsets", 8 * j + e)
            for h in range(2):
                value = values[4 * j + 2 * h + e]
                if row_scales is not None:
                    value = ops.multiply(value, row_scales[h])
                if scale is not None:
                    value = ops.multiply(value, scale)
                if offset is not None and row_sums is not None:
                    value = ops.multiply_add(offset, row_sums[h], value)
                values[4 * j + 2 * h + e] = value
    return values


def _store(
    problem: Problem, base: Value, dtype: str, split: Value, row0: Value, token0: Value, values: list[Value]
) -> None:
    rows, sizes = [row0, arith.addi(row0, constant(8))], (problem.tokens, problem.outputs)
    if problem.pieces > 1:
        for h, row in enumerate(rows):
            total = ops.sum_of_four(arith.addf(values[2 * h], values[2 * h + 1]))
            ops.store_output(base, total, (split, token0, row), sizes, dtype)
        return
    for j in range(len(values) // 4):
        for e in range(2):
            token = arith.addi(token0, constant(8 * j + e))
            for h, row in enumerate(rows):
                ops.store_output(base, values[4 * j + 2 * h + e], (split, token, row), sizes, dtype)
