"""The order of what a computing warpgroup does in a stage: reading words, decoding, multiplying, scaling.

With scales a group ("sum"), the tiles of a group are summed in registers of their own, and then

    total += scale[n] * sum        (8-bit operands: sum is an exact integer, scale has its power of two taken out)

while the tensor core works on what follows: the other half of the tokens (`halves`), or the next group. Otherwise the
sums of the whole row stay in place. An integer sum is converted by the instruction for it: starting the sum at the bits
of 1.5 * 2**23 instead, which makes it a float less that number, takes one more issue slot a register.
"""

from typing import Any, Protocol

from pallas_kernels import compat
from pallas_kernels.affine_matmul import instructions as ops
from pallas_kernels.affine_matmul.config import Config, Problem, sums_groups, sums_in_flight
from pallas_kernels.compat import Value

_AHEAD = 2  # tiles whose words are read before they are decoded


class Reader(Protocol):
    """A stage in shared memory, as one thread reads it."""

    operand: ops.Operand
    columns: Value  # descriptor of x
    group_stride: int  # bytes from eight tokens to the next eight

    def words(self, tile: int) -> list[Value]:
        """The thread's words of a tile."""
        ...

    def grid(self, run: int) -> Any:
        """`scales`, of two rows, of the run-th group, and what `fragments` needs to know of it."""
        ...

    def fragments(self, words: list[Value], grid: Any) -> list[list[Value]]:
        """Four registers for every instruction of a tile."""
        ...

    def places(self, tile: int) -> list[int]:
        """Bytes from `columns` to those of every instruction of a tile."""
        ...


def multiply_stage(
    problem: Problem, config: Config, reader: Reader, carry: list[list[Value]], forget: Value
) -> list[list[Value]]:
    """One stage. A product is a chunk of tiles times half of the tokens, or all of them. When one has been issued, the
    one before is waited for, and scaled if a group ended with it: so the tensor core always has work.

    forget: zero. Sums that begin take the registers of sums that were scaled, which puts the scaling before them;
    otherwise the assembler postpones it and needs twice the registers.
    """
    tiles, halves = config.block_k // config.k_warpgroups // 64, config.halves
    grouped = sums_groups(problem, config)
    run = min(problem.group_size or 64 * tiles, 64 * tiles) // 64  # tiles that share a scale
    chunk = 2 if reader.operand == "s8" and run % 2 == 0 else 1
    alone = grouped and halves == 1 and sums_in_flight(config) == 1  # one group is scaled before the next is begun
    total, *in_flight = carry
    part, width = config.block_m // 2 // halves, config.block_m // halves
    sums: list[Any] = [None if grouped else total[half * part : (half + 1) * part] for half in range(halves)]
    scaled: list[list[Value] | None] = [None] * halves  # registers that are free
    # a half, its sums of a whole group, and their scales
    waiting: tuple[int, list[Value], list[Value]] | None = None
    if in_flight:
        waiting = halves - 1, in_flight[0], in_flight[1]
    words = {tile: reader.words(tile) for tile in range(min(_AHEAD, tiles))}
    grid = following_grid = reader.grid(0)

    def decode(first: int) -> list[list[Value]]:
        fragments: list[list[Value]] = []
        for tile in range(first, first + chunk):
            if tile + _AHEAD < tiles:
                words[tile + _AHEAD] = reader.words(tile + _AHEAD)
            fragments += reader.fragments(words.pop(tile), following_grid)
        return fragments

    def scale(in_flight: int | None) -> None:
        nonlocal waiting
        assert waiting is not None
        half, ready, scales = waiting
        if in_flight is not None:
            ready = ops.wait_for_products(ready, in_flight)
        add_scaled(total, half, ready, scales)
        scaled[half], waiting = ready, None

    fragments = following = decode(0)
    # What is in flight from the stage before ends here, when words of this one have been read: from one turn of a loop
    # to the next, ptxas follows a wait for all products, but not a wait for some of them.
    if waiting is not None:
        waiting = waiting[0], ops.wait_for_products(waiting[1], 0), waiting[2]
    elif config.continuous:
        sums = [ops.wait_for_products(half, 0) for half in sums]
    for first in range(0, tiles, chunk):
        after = first + chunk
        places = [place for tile in range(first, after) for place in reader.places(tile)]
        for half in range(halves):
            own = [place + half * width // 8 * reader.group_stride for place in places]
            begun, keep = (sums[half], None) if sums[half] else (scaled[half], forget if scaled[half] else None)
            sums[half] = ops.multiply_tiles(begun, fragments, reader.columns, own, width, reader.operand, keep)
            if half == halves - 1 and after < tiles:  # in the shadow of the product
                following_grid = reader.grid(after // run) if after % run == 0 else grid
                following = decode(after)
            if waiting is not None:
                scale(1 if first or half else None)
            elif (first or half) and not (alone and first % run == 0):
                ops.wait_for_earlier(1)  # the operand of the product before is free
            if grouped and after % run == 0:
                waiting = (half, sums[half], grid.scales)
                sums[half] = None
            if waiting is not None and (alone or (after == tiles and half == halves - 1 and not config.continuous)):
                scale(0)
        fragments, grid = following, following_grid
    if waiting is not None:
        return [total, *waiting[1:]]
    if grouped:
        return [total]
    whole = [register for half in sums for register in half]
    return [whole if config.continuous else ops.wait_for_products(whole, 0)]


def add_scaled(total: list[Value], half: int, sums: list[Value], scales: list[Value]) -> None:
    """Adds scale of the row * sums to a half of the total, in place."""
    first = half * len(sums)
    for i, value in enumerate(sums):
        value = ops.to_float(value) if value.type == compat.i32() else value
        total[first + i] = ops.multiply_add(value, scales[i // 2 % 2], total[first + i])
