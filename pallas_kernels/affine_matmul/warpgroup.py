"""What one warpgroup of the affine kernel does with a stage in shared memory.

`warpgroup_step` returns a `plgpu.inline_mgpu`, which sees registers. A warpgroup is the pair (row_part, k_part):
64 outputs 64 * row_part.. of the CTA, and block_k / k_warpgroups inputs of every stage.

With scales a group ("sum"), the tiles of a group are summed in registers of their own, and while the tensor core works
on the next group of the stage

    total += scale[n] * sum

With 8-bit operands, sums run on over groups: `running_sums`.
Otherwise the sums of the whole row stay in place. While the last products of a stage run, the first words and scales of
the next one are read. Then they are waited for: a product in flight reads operand registers that nothing protects
across a turn of the loop. Until then they are named by the instruction that waits.

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
from pallas_kernels.affine_matmul import instructions as ops, register_decode as decode, running_sums
from pallas_kernels.affine_matmul.config import (
    Config,
    Problem,
    registers_of_sums,
    runs_on,
    sums_groups,
    sums_in_flight,
)
from pallas_kernels.affine_matmul.epilogue import row_of
from pallas_kernels.affine_matmul.running_sums import AHEAD, IN_FLIGHT
from pallas_kernels.compat import Value, arith, constant
from pallas_kernels.sparse_matmul.adder import EntryAdder

_OPERANDS: dict[str, ops.Operand] = {"bfloat16": "bf16", "float16": "f16", "int8": "s8"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


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
    ahead = _ahead(problem, config), jnp.int32
    parts = [compat.SCALAR] * 2

    def layouts(arrays: Sequence[tuple[int, Any]]) -> tuple[Any, ...]:
        return tuple(compat.registers_layout(count) for count, _ in arrays)

    def types(arrays: Sequence[tuple[int, Any]]) -> tuple[Any, ...]:
        return tuple(compat.registers_type(count, dtype) for count, dtype in arrays)

    def reader_of(stage: list[Value], parts: list[Any]) -> _Reader:
        return _Reader(problem, config, stage, *(compat.scalar_of(part) for part in parts))

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


def _tiles(config: Config) -> int:
    """Tiles of a stage that a warpgroup multiplies."""
    return config.block_k // config.k_warpgroups // 64


def _run(problem: Problem, config: Config) -> int:
    """Tiles of a stage that share a scale."""
    return min(problem.group_size or config.block_k, config.block_k // config.k_warpgroups) // 64


def _flying(problem: Problem, config: Config) -> int:
    """Operand registers of the products of a stage that may be unfinished at its end."""
    return min(IN_FLIGHT, _run(problem, config)) * 8 * problem.x_bytes * problem.planes


def _ahead(problem: Problem, config: Config) -> int:
    """Registers that hold what is read ahead of a stage."""
    grids = 0 if problem.group_size is None else 2 * (1 + problem.has_zeros)
    return min(AHEAD, _tiles(config)) * problem.bits + grids


def _begin_stage(problem: Problem, config: Config, reader: "_Reader", total: list[Value]) -> list[list[Value]]:
    tiles, run = _tiles(config), _run(problem, config)
    grouped = sums_groups(problem, config)
    pipelined = sums_in_flight(config) == 2
    waiting: tuple[list[Value], list[Value]] | None = None  # sums of the previous group, and its scales
    sums: list[Value] | None = None if grouped else total
    apart: list[Value] | None = None  # entries times inputs, of rows r0 and r1
    flying: list[list[Value]] = []  # operands, the latest last
    for tile in range(min(AHEAD, tiles)):
        reader.read(tile)
    grid: _Grid | None = None
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
        ends = (tile + 1) % run == 0 if grouped else tile + 1 == tiles
        if tile % run > 0 and not ends:
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
    return [*pending, [register for operands in flying[-min(IN_FLIGHT, run) :] for register in operands]]


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


def _halves(grid: list[Value]) -> tuple[list[Value], list[Value]]:
    return grid[:2], grid[2:]


class _Grid:
    """Scales and zeros of rows r0, r1 in one group, in the form that their use needs."""

    def __init__(self, scales: list[Value], half_scales: list[Value] | None, zeros: list[Value] | None) -> None:
        self.scales, self.half_scales, self.zeros = scales, half_scales, zeros


class _Reader:
    """Reads a stage on behalf of one thread."""

    def __init__(self, problem: Problem, config: Config, stage: list[Value], row_part: Value, k_part: Value) -> None:
        self.problem, self.config = problem, config
        self.operand: ops.Operand = _OPERANDS[problem.x_dtype]
        self.thread = compat.thread_in_warpgroup()
        self.k_part = k_part
        own_inputs = config.block_k // config.k_warpgroups
        tile_bytes = 512 * problem.bits
        first_tile = arith.addi(
            arith.muli(row_part, constant(config.block_k // 64)), arith.muli(k_part, constant(own_inputs // 64))
        )
        self.adder: EntryAdder | None = None
        if problem.entry_words:
            *stage, slots, overflow = stage
            first_block = arith.muli(first_tile, constant(2 * problem.entry_words))  # bytes: a block is two tiles
            own_slots = arith.addi(ops.shared_address(slots), first_block)
            self.adder = EntryAdder(own_slots, ops.global_address(overflow), self.operand, problem.entry_words)
        words, x, *grids = [ops.shared_address(ref) for ref in stage]
        self.base = arith.addi(words, arith.muli(first_tile, constant(tile_bytes)))
        if problem.token_dtype:
            self.x = arith.addi(x, arith.muli(k_part, constant(own_inputs * problem.token_rows)))
            self.columns = ops.rows_descriptor(self.x, problem.token_rows)
        else:
            # Inputs of k_part begin at a swizzle atom: 1 KiB holds eight tokens and 128 bytes of inputs.
            self.x = arith.addi(x, arith.muli(k_part, constant(own_inputs // problem.x_columns * 1024)))
            self.columns = ops.columns_descriptor(self.x, config.block_k // problem.x_columns * 1024)
        row = arith.addi(arith.muli(row_part, constant(64)), row_of(self.thread))
        self.grids = [(address, row) for address in grids]
        self.decode: Callable[[list[Value]], list[list[Value]]] | None = None
        self.words: dict[int, list[Value]] = {}
        self.fetched: dict[int, list[Value]] = {}
        self.first_grid: list[Value] | None = None  # scales and zeros of the first group, as they are read

    def read_ahead(self) -> list[Value]:
        """The words of the first tiles, and the scales and zeros of the first group, as integer registers."""
        words = [self._read_words(tile) for tile in range(min(AHEAD, _tiles(self.config)))]
        grid = [] if self.problem.group_size is None else self._read_grid(0)
        integers = [arith.bitcast(compat.i32(), v) if v.type == compat.f32() else v for v in grid]
        return [register for tile in words for register in tile] + integers

    def take(self, ahead: list[Value]) -> None:
        """Accepts what `read_ahead` gave."""
        bits = self.problem.bits
        tiles = min(AHEAD, _tiles(self.config))
        self.words = {tile: ahead[bits * tile : bits * (tile + 1)] for tile in range(tiles)}
        if self.problem.group_size is not None:
            scales = ahead[bits * tiles : bits * tiles + 2]
            self.first_grid = [arith.bitcast(compat.f32(), v) for v in scales] + ahead[bits * tiles + 2 :]

    def _read_words(self, tile: int) -> list[Value]:
        return decode.read_tile(self.base, self.thread, tile, self.problem.bits)

    def read(self, tile: int) -> None:
        """Reads the words of a tile, unless they are there, and what the adder fetches of its entries."""
        if tile not in self.words:
            self.words[tile] = self._read_words(tile)
        if self.adder is not None:
            self.fetched[tile] = self.adder.fetch(tile)

    def offset(self, tile: int) -> int:
        """Bytes from the descriptor's address to the columns of a tile."""
        if self.problem.token_dtype:
            return tile * 64 * self.problem.token_rows
        atom, within = divmod(tile * 64, self.problem.x_columns)
        return atom * 1024 + within * self.problem.x_bytes

    def multiply(self, sums: list[Value] | None, fragments: list[list[Value]], tile: int) -> list[Value]:
        """Issues the products of a tile, those of each plane with its own sums."""
        width, planes = self.config.block_m, self.problem.planes
        step_bytes = 32 * self.problem.token_rows if self.problem.token_dtype else 32
        found = []
        for plane in range(planes):
            own = None if sums is None else sums[plane * width // 2 : (plane + 1) * width // 2]
            steps = fragments[plane * len(fragments) // planes : (plane + 1) * len(fragments) // planes]
            place = self.columns, self.offset(tile)
            found += ops.multiply_tile(own, steps, *place, width, self.operand, step_bytes)
        return found

    def grid(self, run: int) -> _Grid:
        """The scales and zeros of the run-th group of this warpgroup."""
        problem = self.problem
        if problem.group_size is None:  # multiplied at the end; zeros, if any, are of a group
            return _Grid([], None, self._zeros(None))
        given = self.first_grid if run == 0 else None
        scales, zeros = _halves(self._read_grid(run) if given is None else given)
        half_scales = None
        if self.config.scale == "operand":
            half_scales = [ops.pack_twice(scale, self.operand) for scale in scales]
        return _Grid(scales, half_scales, self._zeros(zeros if problem.has_zeros else None))

    def _read_grid(self, run: int) -> list[Value]:
        """Two scales of the run-th group of this warpgroup, float32 and as sums want them, and two zeros if there are
        any, integers."""
        problem = self.problem
        assert problem.group_size is not None
        own_inputs = self.config.block_k // self.config.k_warpgroups
        if problem.group_size <= own_inputs:
            group = arith.addi(arith.muli(self.k_part, constant(own_inputs // problem.group_size)), constant(run))
        elif problem.group_size < self.config.block_k:
            group = arith.divui(self.k_part, constant(problem.group_size // own_inputs))
        else:
            group = constant(0)
        scales = self._row_pair(0, group, problem.scale_dtype)
        if runs_on(problem):
            factor = ops.float_constant(running_sums.scale_factor(problem.bits, problem.has_zeros))
            scales = [ops.multiply(scale, factor) for scale in scales]
        return scales + (self._row_pair(1, group, "uint8") if problem.has_zeros else [])

    def _zeros(self, zeros: list[Value] | None) -> list[Value] | None:
        if self.operand == "s8":
            return None if zeros is None else [decode.byte_zeros(zero) for zero in zeros]
        return [decode.half_zeros(zero, self.problem.bits, self.operand) for zero in zeros or [None, None]]

    def _row_pair(self, which: int, group: Value, dtype: str) -> list[Value]:
        """Entries [group, r0] and [group, r1] of an array [groups, rows of the CTA] of the stage."""
        base, row = self.grids[which]
        index = arith.addi(arith.muli(group, constant(self.config.rows)), row)
        first = arith.addi(base, arith.muli(index, constant(_BYTES[dtype])))
        addresses = [first, arith.addi(first, constant(8 * _BYTES[dtype]))]
        return [ops.load_narrow("shared", address, dtype) for address in addresses]

    def fragments(self, tile: int, grid: _Grid) -> list[list[Value]]:
        """The operands of a tile that was read."""
        decoded = self._decoded(self.words[tile], grid)
        if self.adder is not None and not self.problem.multiplies_entries:
            decoded = self.adder.add(decoded, tile, self.fetched[tile])
        return decoded if grid.half_scales is None else decode.scaled(decoded, grid.half_scales, self.operand)

    def multiply_entries(self, tile: int, grid: _Grid, apart: list[Value] | None) -> list[Value]:
        """apart plus the entries of the tile times inputs, with the scale of their group, for rows r0 and r1."""
        assert self.adder is not None
        before = apart or [ops.float_constant(0.0)] * 2
        start = [ops.float_constant(0.0)] * 2 if grid.scales else before
        start = [arith.bitcast(compat.i32(), value) for value in start]
        sums = self.adder.multiply(start, tile, self.fetched[tile], self.x, self.offset(tile))
        sums = [arith.bitcast(compat.f32(), value) for value in sums]
        if not grid.scales:
            return sums
        scaled = zip(sums, grid.scales, before, strict=True)
        return [ops.multiply_add(value, scale, old) for value, scale, old in scaled]

    def _decoded(self, words: list[Value], grid: _Grid) -> list[list[Value]]:
        if self.decode is not None:
            return self.decode(words)
        if self.operand == "s8":
            return decode.byte_fragments(words, self.problem.bits, grid.zeros)
        assert grid.zeros is not None
        bits, has_zeros = self.problem.bits, self.problem.has_zeros
        return decode.half_fragments(words, bits, self.operand, grid.zeros, has_zeros)
