"""What one warpgroup of the affine kernel does with a stage in shared memory.

`stage_steps` returns its steps, each a `plgpu.inline_mgpu`, which sees registers; `stage_reader` reads and decodes
for them.

With scales a group ("sum"), the tiles of a group are summed in registers of their own, and while the tensor core works
on the next group of the stage

    total += scale[n] * sum

With 8-bit operands, sums run on over groups: `running_sums`.
Otherwise the sums of the whole row stay in place. At the end of a stage every product is waited for: one that is in
flight reads operand registers that nothing protects across a turn of the loop. Until then they are alive, because the
instruction that waits names them; in the meantime the beginning of the next stage may be read.

Sparse entries are added to the decoded weights, in their units: before a scale is multiplied, wherever that is. For one
token they are multiplied by its inputs apart: every thread sums its own, in registers that otherwise belong to tokens
past the end, and those of the four threads that share rows are added before they are stored. So are the products of
the only token's pieces, once each has its scale. Weights of two 8-bit operands, a low and a high one, have two sets of
sums, which meet when they are stored.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.affine_matmul import instructions as ops, running_sums
from pallas_kernels.affine_matmul.config import (
    AHEAD,
    IN_FLIGHT,
    Config,
    Problem,
    registers_of_sums,
    runs_on,
    sums_groups,
    sums_in_flight,
    tiles_of,
    tiles_of_scale,
)
from pallas_kernels.affine_matmul.stage_reader import Grid, StageReader, registers_ahead
from pallas_kernels.compat import Value, arith


class Decoder(Protocol):
    """Another way from words to operands than the affine one: a thread keeps `registers` registers for its rows."""

    registers: int

    def load(self, tables: Any, first_row: Any) -> Any:
        """The registers of the 64 outputs from first_row, in `compat.registers_layout`."""
        ...

    def fragments(self, words: list[Value], state: list[Value]) -> list[list[Value]]:
        """The operand registers of a tile."""
        ...


class StageSteps(NamedTuple):
    """What a warpgroup does with a stage. Arrays in `compat.registers_layout`, `pending` and sums tuples of them.

    read_ahead(stage, (row_part, k_part)) -> ahead          the first words and scales of a stage that is there
    begin(stage, ahead, sums, (row_part, k_part), *state) -> pending    all products, the last of them unfinished
    finish(pending) -> sums                                 once they are finished

    stage: its refs, followed, if it has sparse entries, by that of their overflow. sums: block_m / 2 registers of every
    thread, or a `running_sums.State`. state: what `decoder.load` gave, if there is a decoder.
    """

    read_ahead: Callable[..., Any]
    begin: Callable[..., Any]
    finish: Callable[..., Any]


def stage_steps(problem: Problem, config: Config, kind: Any, decoder: Decoder | None = None) -> StageSteps:
    """The steps of a product whose sums are of type `kind`."""
    state_types = [] if decoder is None else [compat.registers_layout(decoder.registers)]
    swizzle = (plgpu.TilingTransform((8, problem.x_columns)), plgpu.SwizzleTransform(128))
    refs = [plgpu.RefType(), plgpu.RefType() if problem.token_dtype else plgpu.RefType(swizzle)]
    if problem.group_size is not None:
        refs += [plgpu.RefType()] * (1 + problem.has_zeros)
    if problem.entry_words:
        refs += [plgpu.RefType()] * 2
    count = registers_of_sums(problem, config)
    own = running_sums.state_sizes(config) if runs_on(problem) else [(count, kind)]
    # group sums and their scales beside the totals, or entries times inputs
    more = [(count, kind), (2, jnp.float32)] if sums_groups(problem, config) else []
    more += [(2, jnp.float32)] * problem.multiplies_entries
    pending = [*own, *more, (_flying(problem, config), jnp.int32)]
    ahead = registers_ahead(problem, config), jnp.int32
    parts = [compat.SCALAR] * 2

    def layouts(arrays: Sequence[tuple[int, Any]]) -> tuple[Any, ...]:
        return tuple(compat.registers_layout(count) for count, _ in arrays)

    def types(arrays: Sequence[tuple[int, Any]]) -> tuple[Any, ...]:
        return tuple(compat.registers_type(count, dtype) for count, dtype in arrays)

    def reader_of(stage: list[Value], parts: list[Any]) -> StageReader:
        return StageReader(problem, config, stage, *(compat.scalar_of(part) for part in parts))

    @plgpu.inline_mgpu(arg_types=(refs, parts), return_type=types([ahead])[0])
    def read_ahead(_: Any, stage: list[Value], parts: list[Any]) -> Any:
        return compat.array_of(reader_of(stage, parts).read_ahead())

    @plgpu.inline_mgpu(
        arg_types=(refs, layouts([ahead])[0], layouts(own), parts, *state_types), return_type=types(pending)
    )
    def begin(_: Any, stage: list[Value], ahead: Any, sums: Any, parts: list[Any], *state: Any) -> Any:
        reader = reader_of(stage, parts)
        reader.take(compat.registers_of(ahead))
        if decoder is not None:
            reader.decode = functools.partial(decoder.fragments, state=compat.registers_of(state[0]))
        registers = [compat.registers_of(array) for array in sums]
        step = running_sums.begin_stage if runs_on(problem) else _begin_stage
        return tuple(compat.array_of(each) for each in step(problem, config, reader, *registers))

    @plgpu.inline_mgpu(arg_types=(layouts(pending),), return_type=types(own))
    def finish(_: Any, pending: Any) -> Any:
        registers = [compat.registers_of(array) for array in pending]
        step = running_sums.finish_stage if runs_on(problem) else functools.partial(_finish_stage, problem, config)
        return tuple(compat.array_of(each) for each in step(*registers))

    return StageSteps(read_ahead, begin, finish)


def _unfinished(problem: Problem, config: Config) -> int:
    """Tiles of a stage whose products may be unfinished at its end."""
    one_after_another = sums_groups(problem, config) or runs_on(problem)
    return min(IN_FLIGHT, tiles_of_scale(problem, config) if one_after_another else tiles_of(config))


def _flying(problem: Problem, config: Config) -> int:
    """Their operand registers."""
    return _unfinished(problem, config) * 8 * problem.x_bytes * problem.planes


def _begin_stage(problem: Problem, config: Config, reader: StageReader, total: list[Value]) -> list[list[Value]]:
    tiles, run = tiles_of(config), tiles_of_scale(problem, config)
    grouped = sums_groups(problem, config)
    pipelined = sums_in_flight(config) == 2
    waiting: tuple[list[Value], list[Value]] | None = None  # sums of the previous group, and its scales
    sums: list[Value] | None = None if grouped else total
    apart: list[Value] | None = None  # entries times inputs, of rows r0 and r1
    flying: list[list[Value]] = []  # operands, the latest last
    for tile in range(min(AHEAD, tiles)):
        reader.read(tile)
    grid: Grid | None = None
    for tile in range(tiles):
        if tile + AHEAD < tiles:
            reader.read(tile + AHEAD)
        if tile % run == 0:
            grid = reader.grid(tile // run)
        assert grid is not None
        fragments = reader.fragments(tile, grid)
        if problem.multiplies_entries:
            apart = reader.multiply_entries(tile, grid, apart)
        sums = reader.multiply(sums, fragments, tile)
        flying.append([register for fragment in fragments for register in fragment])
        begins, ends = (tile % run == 0, (tile + 1) % run == 0) if grouped else (tile == 0, tile + 1 == tiles)
        if not begins and not ends:
            ops.wait_for_earlier(problem.planes)  # the registers of the operand before are free
        if waiting is not None:
            total = _scaled(total, *waiting, in_flight=1)
            waiting = None
        if grouped and ends and tile + 1 < tiles:
            if pipelined:
                waiting = (sums, grid.scales)
            else:
                total = _scaled(total, sums, grid.scales, in_flight=0)
            sums = None
    assert grid is not None and sums is not None
    pending = [total, sums, grid.scales] if grouped else [sums]
    pending += [] if apart is None else [apart]
    return [*pending, [register for operands in flying[-_unfinished(problem, config) :] for register in operands]]


def _finish_stage(problem: Problem, config: Config, *pending: list[Value]) -> list[list[Value]]:
    *parts, flying = pending
    apart = parts.pop() if problem.multiplies_entries else None
    if sums_groups(problem, config):
        total, sums, scales = parts
        total = _scaled(total, sums, scales, 0, flying)
    else:
        total = ops.wait_for_products(parts[0], 0, flying)
    if apart is not None:
        total = [arith.addf(total[0], apart[0]), total[1], arith.addf(total[2], apart[1]), *total[3:]]
    return [total]


def _scaled(
    total: list[Value], sums: list[Value], scales: list[Value], in_flight: int, operands: Sequence[Value] = ()
) -> list[Value]:
    """total + scale of the row * sums, once these are ready."""
    ready = ops.wait_for_products(sums, in_flight, operands)
    return [
        ops.multiply_add(value, scales[i // 2 % 2], old)
        for i, (value, old) in enumerate(zip(ready, total, strict=True))
    ]
