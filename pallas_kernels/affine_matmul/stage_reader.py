"""A stage in shared memory as one thread reads it: words, scales and zeros, decoded into operands, and the products.

A warpgroup is the pair (row_part, k_part): 64 outputs 64 * row_part.. of the CTA, and block_k / k_warpgroups inputs of
every stage, in tiles of 64. A thread has rows r0 and r0 + 8 of them (`epilogue.row_of`).
"""

from collections.abc import Callable, Sequence

from pallas_kernels import compat
from pallas_kernels.affine_matmul import instructions as ops, register_decode as decode, running_sums
from pallas_kernels.affine_matmul.config import AHEAD, SCALE_BYTES, Config, Problem, runs_on, tiles_of
from pallas_kernels.affine_matmul.epilogue import row_of
from pallas_kernels.compat import Value, arith, constant
from pallas_kernels.sparse_matmul.adder import EntryAdder

_OPERANDS: dict[str, ops.Operand] = {"bfloat16": "bf16", "float16": "f16", "int8": "s8"}


def registers_ahead(problem: Problem, config: Config) -> int:
    """Registers that hold what is read ahead of a stage."""
    grids = 0 if problem.group_size is None else 2 * (1 + problem.has_zeros)
    return min(AHEAD, tiles_of(config)) * problem.bits + grids


class Grid:
    """Scales and zeros of rows r0, r1 in one group, in the form that their use needs: scales of sums, half_scales of
    16-bit weights, multiples of codes."""

    def __init__(
        self,
        scales: Sequence[Value] = (),
        half_scales: list[Value] | None = None,
        zeros: list[Value] | None = None,
        multiples: list[tuple[Value, Value]] | None = None,
    ) -> None:
        self.scales, self.half_scales, self.zeros, self.multiples = list(scales), half_scales, zeros, multiples


class StageReader:
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
            own_slots = arith.addi(compat.address(slots), first_block)
            self.adder = EntryAdder(own_slots, compat.address(overflow), self.operand, problem.entry_words)
        words, x, *grids = [compat.address(ref) for ref in stage]
        self.base = arith.addi(words, arith.muli(first_tile, constant(tile_bytes)))
        if problem.token_dtype:
            self.x = arith.addi(x, arith.muli(k_part, constant(own_inputs * problem.pieces)))
            self.columns = ops.rows_descriptor(self.x, problem.pieces)
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
        words = [self._read_words(tile) for tile in range(min(AHEAD, tiles_of(self.config)))]
        grid = [] if self.problem.group_size is None else self._read_grid(0)
        integers = [arith.bitcast(compat.i32(), v) if v.type == compat.f32() else v for v in grid]
        return [register for tile in words for register in tile] + integers

    def take(self, ahead: list[Value]) -> None:
        """Accepts what `read_ahead` gave."""
        bits = self.problem.bits
        tiles = min(AHEAD, tiles_of(self.config))
        self.words = {tile: ahead[bits * tile : bits * (tile + 1)] for tile in range(tiles)}
        if self.problem.group_size is not None:
            scales = ahead[bits * tiles : bits * tiles + 2]
            if not self.problem.two_level:
                scales = [arith.bitcast(compat.f32(), v) for v in scales]
            self.first_grid = scales + ahead[bits * tiles + 2 :]

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
            return tile * 64 * self.problem.pieces
        atom, within = divmod(tile * 64, self.problem.x_columns)
        return atom * 1024 + within * self.problem.x_bytes

    def multiply(self, sums: list[Value] | None, fragments: list[list[Value]], tile: int) -> list[Value]:
        """Issues the products of a tile, those of each plane with its own sums."""
        width, planes = self.config.block_m, self.problem.planes
        step_bytes = 32 * self.problem.pieces if self.problem.token_dtype else 32
        found = []
        for plane in range(planes):
            own = None if sums is None else sums[plane * width // 2 : (plane + 1) * width // 2]
            steps = fragments[plane * len(fragments) // planes : (plane + 1) * len(fragments) // planes]
            place = self.columns, self.offset(tile)
            found += ops.multiply_tile(own, steps, *place, width, self.operand, step_bytes)
        return found

    def grid(self, run: int) -> Grid:
        """The scales and zeros of the run-th group of this warpgroup."""
        problem = self.problem
        if problem.group_size is None:  # multiplied at the end; zeros, if any, are of a group
            return Grid(zeros=self._zeros(None))
        given = self.first_grid if run == 0 else None
        found = self._read_grid(run) if given is None else given
        scales, zeros = found[:2], found[2:]
        if problem.two_level and self.operand == "s8":
            return Grid(multiples=[decode.byte_multiples(scale, problem.bits) for scale in scales])
        in_operand = self.config.scale == "operand"
        if problem.two_level and problem.bits == 4 and in_operand:
            return Grid(multiples=[decode.half_multiples(scale, self.operand) for scale in scales])
        if problem.two_level:
            scales = [ops.to_float(scale) for scale in scales]
        half_scales = None
        if in_operand:  # of two levels exact: codes times multiples have eight bits at most
            half_scales = [ops.pack_twice(scale, self.operand) for scale in scales]
        return Grid(scales, half_scales, self._zeros(zeros if problem.has_zeros else None))

    def _read_grid(self, run: int) -> list[Value]:
        """Two scales of the run-th group of this warpgroup, float32 and as sums want them, or integers in two levels,
        and two zeros if there are any, integers."""
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
        first = arith.addi(base, arith.muli(index, constant(SCALE_BYTES[dtype])))
        addresses = [first, arith.addi(first, constant(8 * SCALE_BYTES[dtype]))]
        return [ops.load_narrow("shared", address, dtype) for address in addresses]

    def fragments(self, tile: int, grid: Grid) -> list[list[Value]]:
        """The operands of a tile that was read."""
        decoded = self._decoded(self.words[tile], grid)
        if self.adder is not None and not self.problem.multiplies_entries:
            decoded = self.adder.add(decoded, tile, self.fetched[tile])
        return decoded if grid.half_scales is None else decode.scaled(decoded, grid.half_scales, self.operand)

    def multiply_entries(self, tile: int, grid: Grid, apart: list[Value] | None) -> list[Value]:
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

    def _decoded(self, words: list[Value], grid: Grid) -> list[list[Value]]:
        if self.decode is not None:
            return self.decode(words)
        if self.operand == "s8":
            return decode.byte_fragments(words, self.problem.bits, grid.zeros, grid.multiples)
        bits, has_zeros = self.problem.bits, self.problem.has_zeros
        return decode.half_fragments(words, bits, self.operand, grid.zeros or [], has_zeros, grid.multiples)
