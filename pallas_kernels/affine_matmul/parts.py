"""Sums of warpgroups that share outputs, in a CTA or a cluster, added by the first of them.

In a CTA `k_warpgroups` warpgroups share the inputs of a stage. All but the first hand over their sums in shared memory,
[row warpgroups, k_warpgroups - 1, 128 * registers], and wait until those are read before they hand over the next.

The CTAs of a cluster that share a block of outputs (`pallas_kernels.affine_matmul.rounds`) send their sums to the
shared memory of the first, [row warpgroups, cluster - 1, 128 * registers].

A barrier of a cluster counts an arrival in each of its CTAs, so each side of a hand-over arrives in full: the one that
adds says that its part is there, too, and the others that they do not read.
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
from pallas_kernels.affine_matmul.config import Config
from pallas_kernels.compat import arith, constant


def parts_scratch(config: Config, sums: int, kind: Any) -> dict[str, Any]:
    """The shared memory and barriers of the hand-overs that there are. sums: registers of a thread."""
    found: dict[str, Any] = {}
    rows = config.row_warpgroups
    if (others := config.k_warpgroups - 1) > 0:
        found["parts"] = plgpu.SMEM((rows, others, compat.THREADS * sums), kind)
        found["parts_full"] = plgpu.Barrier(num_arrivals=others, num_barriers=rows)
        found["parts_empty"] = plgpu.Barrier(num_arrivals=1, num_barriers=rows)
    if config.cluster > 1:
        found["shares"] = plgpu.SMEM((rows, config.cluster - 1, compat.THREADS * sums), kind)
        for name in ("shares_full", "shares_empty"):
            found[name] = plgpu.ClusterBarrier(collective_axes=("rank",), num_barriers=rows)
    return found


def add_parts(
    config: Config, shared: dict[str, Any], index: Any, row_part: Any, k_part: Any, sums: jax.Array, finish: Any
) -> None:
    """finish(sums of all k_parts), in the first of these warpgroups. index: how many blocks this CTA has done."""
    if config.k_warpgroups == 1:
        finish(sums)
        return

    @pl.when(k_part > 0)
    def _hand_over() -> None:
        @pl.when(index > 0)
        def _wait() -> None:
            plgpu.barrier_wait(shared["parts_empty"].at[row_part])

        shared["parts"][row_part, k_part - 1] = sums
        plgpu.barrier_arrive(shared["parts_full"].at[row_part])

    @pl.when(k_part == 0)
    def _add() -> None:
        plgpu.barrier_wait(shared["parts_full"].at[row_part])
        total = sums
        for other in range(config.k_warpgroups - 1):
            total = total + shared["parts"][row_part, other]
        plgpu.barrier_arrive(shared["parts_empty"].at[row_part])
        finish(total)


def add_shares(
    config: Config,
    shared: dict[str, Any],
    place: tuple[Any, Any, Any, Any],
    sums: jax.Array,
    write: Callable[[jax.Array], None],
) -> None:
    """write(sums of all CTAs that share the block), in the first of these.

    place: the CTA's rank, row_part, whether the block is shared, and how many shared ones were before.
    """
    rank, row_part, is_shared, before = place
    if config.cluster == 1:
        write(sums)
        return
    full, empty = shared["shares_full"].at[row_part], shared["shares_empty"].at[row_part]
    gives = is_shared & (rank > 0)

    @pl.when(gives)
    def _hand_over() -> None:
        @pl.when(before > 0)
        def _wait() -> None:
            plgpu.barrier_wait(empty)

        _store_in_first(shared["shares"].at[row_part, rank - 1], sums)
        plgpu.barrier_arrive(full)
        plgpu.barrier_arrive(empty)

    @pl.when(~gives)
    def _add() -> None:
        @pl.when(is_shared)
        def _wait() -> None:
            plgpu.barrier_arrive(full)
            plgpu.barrier_wait(full)
            _see_cluster()

        others = jnp.where(is_shared, jnp.int32(config.cluster - 1), jnp.int32(0))
        total = lax.fori_loop(0, others, lambda i, total: total + shared["shares"][row_part, i], sums)

        @pl.when(is_shared)
        def _release() -> None:
            plgpu.barrier_arrive(empty)

        write(total)


def _store_in_first(where: Any, sums: jax.Array) -> None:
    """Writes registers to the place in the first CTA that `where` is in this one."""
    layout = compat.registers_layout(sums.shape[0] // compat.THREADS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def store(_: Any, where: Any, sums: Any) -> None:
        own = arith.addi(compat.address(where), arith.muli(compat.thread_in_warpgroup(), constant(4)))
        first = ops.address_in_cluster(own, 0)
        for i, register in enumerate(compat.registers_of(sums)):
            ops.store_in_cluster(first, 4 * compat.THREADS * i, register)
        ops.fence_cluster()
        compat.warpgroup_barrier()  # one thread arrives for all

    store(where, sums)  # pyright: ignore[reportCallIssue]


def _see_cluster() -> None:
    @plgpu.inline_mgpu()
    def fence(_: Any) -> None:
        ops.fence_cluster()

    fence()  # pyright: ignore[reportCallIssue]


def leave_together() -> None:
    """Waits for the CTAs of the cluster: the others may still arrive on a barrier of this one."""

    @plgpu.inline_mgpu()
    def wait(_: Any) -> None:
        ops.wait_for_cluster()

    wait()  # pyright: ignore[reportCallIssue]
