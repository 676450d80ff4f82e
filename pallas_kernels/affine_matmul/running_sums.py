"""Scales of groups for 8-bit operands: int32 sums that run on over groups, and one multiply-add a register and group.

C_g is the sum of integer products up to the end of group g, the tensor core never starting anew; s_g the scale of group
g. Summation by parts (Abel), with s_{-1} = s_G = 0:

    sum_g s_g (C_g - C_{g-1}) = sum_{g=0..G} (s_{g-1} - s_g) C_{g-1}

So before the products of group g are issued, total += (s_{g-1} - s_g) * C, and at the end total += s_{G-1} * C. It is
the same sum from any start C_{-1}. With one that keeps C in [0, 2**24], no register is converted: the bits of such an
integer, read as float32, are the number C * 2**-149 (denormal below 2**23, of the same spacing up to 2**24), and a
multiply-add takes denormals at full speed. Differences of scales are multiplied by 2**100, `total` counts in 2**-49,
and the last step multiplies it back. Scales from 2**-75 to 2**27 keep every bit: |s - s'| * 2**100 < 2**128 above, and
below, a total that is rounded is not denormal.

C stays in its range for SEGMENT inputs. Then, between two stages, total += s * C, C is set to its start again and s to
0: `restart`, two more instructions a register, which the start of the next group makes three. C * s is far larger than
what is summed, since the start is: the rounding of `total` is about 2**-24 * start * s a group, 1e-5 of a typical
result, and that is why segments are not longer where they could be.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.affine_matmul import instructions as ops
from pallas_kernels.affine_matmul.config import AHEAD, IN_FLIGHT, SEGMENT, Config, Problem, tiles_of, tiles_of_scale
from pallas_kernels.affine_matmul.register_decode import byte_factor
from pallas_kernels.compat import Value, arith

_LARGEST_TOKEN = 128  # -128 is an int8
_DENORMAL = 2.0**-149  # float32 whose bits are 1
_UNIT = 2.0**100

State = tuple[Any, Any, Any]  # float32 totals, int32 running sums, the scales of rows r0 and r1 that they wait for


class Reader(Protocol):
    """A stage as one thread reads it; see `warpgroup`."""

    def read(self, tile: int) -> None: ...
    def grid(self, run: int) -> Any: ...
    def fragments(self, tile: int, grid: Any) -> list[list[Value]]: ...
    def multiply(self, sums: list[Value] | None, fragments: list[list[Value]], tile: int) -> list[Value]: ...


def largest_operand(bits: int, has_zeros: bool) -> int:
    """The largest magnitude of an 8-bit operand: codes less a zero point up to 2**bits, else a signed byte."""
    return 2**bits if has_zeros else 128


def first_sum(bits: int, has_zeros: bool) -> int:
    """The start of running sums: C stays in [0, 2 * start] for SEGMENT inputs, and 2 * start is at most 2**24."""
    return SEGMENT * largest_operand(bits, has_zeros) * _LARGEST_TOKEN


def scale_factor(bits: int, has_zeros: bool) -> float:
    """What scales are multiplied by where they are read: the power of two of operands is taken out in passing."""
    return _UNIT / byte_factor(bits, has_zeros)


def stages_of_a_segment(config: Config) -> int:
    """Stages between two restarts."""
    return SEGMENT * config.k_warpgroups // config.block_k


def segments(config: Config, stages: Any) -> Any:
    """How often sums start."""
    most = stages_of_a_segment(config)
    return lax.div(stages + most - 1, most) if isinstance(stages, jax.Array) else -(-stages // most)


def state_sizes(config: Config) -> tuple[tuple[int, Any], ...]:
    """Registers of a thread, and their type, of each array of a state."""
    count = config.block_m // 2
    return (count, jnp.float32), (count, jnp.int32), (2, jnp.float32)


def _layouts(config: Config) -> State:
    """The argument types of a state, for `inline_mgpu`."""
    sums, _, scales = (compat.registers_layout(count) for count, _ in state_sizes(config))
    return sums, sums, scales


def _types(config: Config) -> State:
    """The return types of a state."""
    total, sums, scales = (compat.registers_type(count, dtype) for count, dtype in state_sizes(config))
    return total, sums, scales


def sum_stages(
    problem: Problem, config: Config, turns: Any, stages: Any, step: Callable[..., Any], place: Any
) -> tuple[Any, Any]:
    """(place, sum_k W[n, k] x[m, k] in float32) after `stages` stages in `turns` segments, each stage by
    step(number of the stage, (place, state)). place: where `step` is."""
    most = stages_of_a_segment(config)

    def segment(index: Any, carry: tuple[Any, State]) -> tuple[Any, State]:
        place, state = carry
        first = index * most
        last = jnp.minimum(first + most, stages)
        return lax.fori_loop(first, last, step, (place, restart(problem, config, state)))

    sums = jnp.zeros((compat.THREADS * (config.block_m // 2),), jnp.int32)
    empty = sums.astype(jnp.float32), sums, jnp.zeros((compat.THREADS * 2,), jnp.float32)
    place, state = lax.fori_loop(0, turns, segment, (place, empty))
    return place, finish(config, state)


def begin_stage(
    problem: Problem,
    config: Config,
    reader: Reader,
    total: list[Value],
    sums: list[Value],
    before: list[Value],
) -> tuple[list[Value], list[Value], list[Value], list[Value]]:
    """A state in registers after the products of a stage, the last of which are unfinished, and their operands."""
    tiles, run = tiles_of(config), tiles_of_scale(problem, config)
    for tile in range(min(AHEAD, tiles)):
        reader.read(tile)

    def decoded(tile: int, grid: Any) -> list[list[Value]]:
        if tile + AHEAD < tiles:
            reader.read(tile + AHEAD)
        return reader.fragments(tile, grid)

    fragments: list[list[list[Value]]] = []
    for first in range(0, tiles, run):
        grid = reader.grid(first // run)
        fragments = [decoded(tile, grid) for tile in range(first, first + min(IN_FLIGHT, run))]
        if first > 0:
            sums = ops.wait_for_products(sums, 0)
        changes = [arith.subf(old, new) for old, new in zip(before, grid.scales, strict=True)]
        total, before = _add(total, sums, changes), grid.scales
        for place in range(run):
            if place >= IN_FLIGHT:
                ops.wait_for_earlier(1)  # the registers of the operand before are free
                fragments.append(decoded(first + place, grid))
            sums = reader.multiply(sums, fragments[place], first + place)
    operands = [register for tile in fragments[-IN_FLIGHT:] for fragment in tile for register in fragment]
    return total, sums, before, operands


def finish_stage(
    total: list[Value], sums: list[Value], before: list[Value], operands: list[Value]
) -> tuple[list[Value], list[Value], list[Value]]:
    """The state once the products of the stage are finished."""
    return total, ops.wait_for_products(sums, 0, operands), before


def restart(problem: Problem, config: Config, state: State) -> State:
    """Adds what running sums stand for to the totals, and sets them to their start."""
    start = first_sum(problem.bits, problem.has_zeros)

    @plgpu.inline_mgpu(arg_types=_layouts(config), return_type=_types(config))
    def run(_: Any, *state: Any) -> State:
        total, sums, scales = (compat.registers_of(array) for array in state)
        total = _add(total, sums, scales)
        floats = [ops.replaced(arith.bitcast(compat.f32(), value), start * _DENORMAL) for value in sums]
        starts, zeros = [arith.bitcast(compat.i32(), value) for value in floats], [ops.float_constant(0.0)] * 2
        return compat.array_of(total), compat.array_of(starts), compat.array_of(zeros)

    return run(*state)


def finish(config: Config, state: State) -> jax.Array:
    """sum_k W[n, k] x[m, k] in float32."""

    @plgpu.inline_mgpu(arg_types=_layouts(config), return_type=_types(config)[0])
    def run(_: Any, *state: Any) -> Any:
        total = _add(*(compat.registers_of(array) for array in state))
        back = ops.float_constant(1.0 / (_UNIT * _DENORMAL))
        return compat.array_of([ops.multiply(value, back) for value in total])

    return run(*state)  # pyright: ignore[reportReturnType]


def _add(total: list[Value], sums: list[Value], factors: list[Value]) -> list[Value]:
    """total + factor of the row * sums, the bits of these read as float32."""
    floats = [arith.bitcast(compat.f32(), value) for value in sums]
    return [
        ops.multiply_add(value, factors[i // 2 % 2], old)
        for i, (value, old) in enumerate(zip(floats, total, strict=True))
    ]
