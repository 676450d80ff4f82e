"""Stream-K: all CTAs share the stages of the last blocks evenly, and none idles (Osama et al., arXiv 2301.03598).

With many tokens a block takes as long as some small products, and a last round that is half empty costs half a round.
So a CTA has whole blocks of its own only while more than a round is left after them. Of what is left the stages, block
after block, are cut into as many equal ranges as there are CTAs:

    stages     |  block 0  |  block 1  |  block 2  |  block 3  |  block 4  |
    ranges     |      CTA 0     |     CTA 1      |     CTA 2      |  CTA 3 ...

Who has the first stage of a block finishes it. The others write their sums to `partials` [CTAs, row warpgroups, 128 *
registers] in global memory and raise a semaphore each. That is the first that they do in their range, and to finish a
block the last, so hardly anything is waited for. A CTA waits only for those of higher number, which the hardware starts
first: numbers are given in reverse.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.affine_matmul import instructions as ops
from pallas_kernels.compat import arith

_AT_ONCE = 64  # registers that are loaded before the first is waited for: one by one they take half a microsecond each


@dataclasses.dataclass(frozen=True)
class StreamK:
    """Which stages of which of `items` blocks, of `steps` stages each, a CTA computes, in which order."""

    items: int
    steps: int
    ctas: int

    @property
    def own(self) -> int:
        """How many blocks each CTA has for itself, before those that are shared."""
        rounds, rest = divmod(self.items, self.ctas)
        return rounds if rest == 0 else max(rounds - 1, 0)

    @property
    def units(self) -> int:
        """The stages that are shared."""
        return (self.items - self.own * self.ctas) * self.steps

    @property
    def turns(self) -> float:
        """The time of all blocks, in blocks of one CTA."""
        return self.own + -(-self.units // self.ctas) / self.steps

    @property
    def parts(self) -> int:
        """How many parts a CTA adds to its own at most."""
        return -(-self.steps * self.ctas // self.units) if self.units else 0

    def begin(self, cta: Any) -> Any:
        """The first of the shared stages of a CTA."""
        return lax.div(cta * jnp.int32(self.units), jnp.int32(self.ctas))

    def count(self, cta: Any) -> Any:
        """How many pieces of blocks a CTA computes."""
        begin, end = self.begin(cta), self.begin(cta + 1)
        steps = jnp.int32(self.steps)
        return self.own + jnp.where(end > begin, lax.div(end - 1, steps) - lax.div(begin, steps) + 1, 0)

    def piece(self, index: Any, cta: Any) -> tuple[Any, Any, Any]:
        """The block of the piece number `index` of a CTA, its first stage, and how many there are."""
        begin, end = self.begin(cta), self.begin(cta + 1)
        block = lax.div(begin, jnp.int32(self.steps)) + index - self.own
        first = jnp.maximum(begin, block * self.steps)
        stages = jnp.minimum(end, (block + 1) * self.steps) - first
        alone = index < self.own
        return (
            jnp.where(alone, cta + index * self.ctas, self.own * self.ctas + block),
            jnp.where(alone, 0, first - block * self.steps),
            jnp.where(alone, self.steps, stages),
        )

    def others(self, item: Any, first: Any, count: Any, cta: Any) -> Any:
        """How many CTAs of the next numbers have the rest of a block whose beginning this one has."""
        end = (item - self.own * self.ctas + 1) * self.steps
        last = lax.div(end * jnp.int32(self.ctas) - 1, jnp.int32(max(self.units, 1)))
        return jnp.where((first == 0) & (count < self.steps), last - cta, 0)


def partials_shape(ctas: int, row_warpgroups: int, registers: int) -> tuple[int, int, int]:
    return ctas, row_warpgroups, compat.THREADS * registers


def add_rest(
    ranges: StreamK,
    partials: Any,
    semaphores: Any,
    piece: tuple[Any, Any, Any],
    cta: Any,
    row_part: Any,
    sums: jax.Array,
    write: Callable[[jax.Array], None],
) -> None:
    """write(sums of the whole block) in the CTA that has its beginning; the others hand theirs over.

    semaphores: [CTAs * row warpgroups], zero at first.
    """
    item, first, count = piece
    rows = partials.shape[1]

    @pl.when(first > 0)
    def _hand_over() -> None:
        _store(partials.at[cta, row_part], semaphores.at[cta * rows + row_part], sums)

    @pl.when(first == 0)
    def _finish() -> None:
        def add(other: Any, total: jax.Array) -> jax.Array:
            giver = cta + 1 + other
            return _add(partials.at[giver, row_part], semaphores.at[giver * rows + row_part], total)

        write(lax.fori_loop(0, ranges.others(item, first, count, cta), add, sums))


def _store(place: Any, semaphore: Any, sums: jax.Array) -> None:
    """Writes the registers of a warpgroup, four at a time, and tells that they are there."""
    layout = compat.registers_layout(sums.shape[0] // compat.THREADS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), layout))
    def store(_: Any, place: Any, semaphore: Any, sums: Any) -> None:
        own = ops.thread_address(compat.address(place), 16)
        registers = compat.registers_of(sums)
        for i in range(0, len(registers), 4):
            ops.store_four(own, 4 * compat.THREADS * i, registers[i : i + 4])
        ops.fence_device()
        compat.warpgroup_barrier()  # one thread tells for all
        ops.raise_semaphore(compat.address(semaphore), compat.thread_in_warpgroup())

    store(place, semaphore, sums)  # pyright: ignore[reportCallIssue]


def _add(place: Any, semaphore: Any, sums: jax.Array) -> jax.Array:
    """sums plus those that another CTA wrote, once they are there."""
    count = sums.shape[0] // compat.THREADS
    layout, kind = compat.registers_layout(count), compat.registers_type(count, sums.dtype)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), layout), return_type=kind)
    def run(_: Any, place: Any, semaphore: Any, sums: Any) -> Any:
        ops.wait_for_semaphore(compat.address(semaphore))
        own = ops.thread_address(compat.address(place), 16)
        registers = compat.registers_of(sums)
        add = arith.addi if registers[0].type == compat.i32() else arith.addf
        total = []
        for i in range(0, count, _AT_ONCE):
            mine = registers[i : i + _AT_ONCE]
            others = ops.load_fours(own, 4 * compat.THREADS * i, len(mine), registers[0].type)
            total += [add(a, b) for a, b in zip(mine, others, strict=True)]
        return compat.array_of(total)

    return run(place, semaphore, sums)  # pyright: ignore[reportCallIssue, reportReturnType]
