"""The affine product on the tensor core of a Hopper GPU: weights decoded into its register operand.

    y^T [N, M] = W [N, K] x^T [K, M],   W[n, k] = scales[g(k), n] * (codes[n, k] - zeros[g(k), n])

One warpgroup copies, the others compute. The copying one streams, for every stage of block_k inputs, the packed words
of the CTA's outputs, the same inputs of block_m tokens and the scales, all by TMA, into a ring of `stages` places in
shared memory, and runs ahead across the blocks of outputs. A computing warpgroup owns 64 outputs: it reads its words
("fragments" order: each thread its own), makes them the register operand A, and multiplies with x as operand B; while
the tensor core works on a tile of 64 inputs, the next tile is decoded.

Shared memory of a stage: words [row warpgroups, block_k / 64, bits, 128] uint32; x [block_m, block_k] in tiles of 8 x
128 bytes with the 128-byte swizzle; scales, zeros [groups, 64 * row warpgroups]. Sums of warpgroups that share outputs,
in one CTA or in the CTAs of a cluster, meet in shared memory (`pallas_kernels.affine_matmul.parts`), those of stream-K
in global memory (`pallas_kernels.affine_matmul.stream_k`); those of `splits` leave the kernel as [splits, M, N]. Many
tokens leave through shared memory, too (`pallas_kernels.affine_matmul.output_tiles`). One token may come as it is, and
its codes are made here, in shared memory of their own for all stages (`pallas_kernels.affine_matmul.own_token`).

Sparse entries, if there are any, come as [row warpgroups, block_k / 128, words] uint32 a stage and are added to the
decoded weights (`pallas_kernels.sparse_matmul.tiles`); what overflowed stays in global memory. Kept columns, which have
weights and inputs of 16 bits, are multiplied when the sums of a block are there
(`pallas_kernels.affine_matmul.kept_product`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.affine_matmul import running_sums
from pallas_kernels.affine_matmul.config import Config, Problem, registers_of_sums, runs_on
from pallas_kernels.affine_matmul.epilogue import scale_block, store_block
from pallas_kernels.affine_matmul.kept_product import copy_kept, kept_product, kept_scratch, offer_places
from pallas_kernels.affine_matmul.output_tiles import store_tiles, tiles_scratch
from pallas_kernels.affine_matmul.own_token import (
    STAGES_BEFORE_TOKEN,
    ask_for_token,
    goes_first,
    make_token,
    token_scales,
    token_scratch,
    wait_for_token,
)
from pallas_kernels.affine_matmul.parts import add_parts, add_shares, leave_together, parts_scratch
from pallas_kernels.affine_matmul.pieces import Pieces
from pallas_kernels.affine_matmul.register_decode import byte_factor
from pallas_kernels.affine_matmul.stream_k import add_rest, partials_shape
from pallas_kernels.affine_matmul.warpgroup import Decoder, stage_steps

Refs = dict[str, Any]


def affine_kernel(
    problem: Problem, config: Config, arrays: dict[str, jax.Array], out_dtype: Any, decoder: Decoder | None = None
) -> jax.Array:
    """Runs the kernel: [splits, M, N]. `arrays` as in `pallas_kernels.affine_matmul.affine_matmul`, padded:

    words [N/64, K/64, bits, 128]; x [M, K] with K a multiple of 64 (8 bits: 128) and M < 8 or a multiple of 8;
    x and x_scales of a token in pieces have a row each of them; x of problem.token_dtype is [1, K], without x_scales;
    scales, zeros [G, N] with N a multiple of 64; row_scales [N] of 16 or 32 bits; row_sums [N], x_scales and
    x_offsets [M] float32; slots, overflow of sparse entries; kept_words [N/64, k/64, 16, 128], kept_x [M, k] with k a
    multiple of 64.
    """
    names = tuple(arrays)
    stage = _stage_types(problem, config)
    scratch: dict[str, Any] = {
        name: plgpu.SMEM((config.stages, *shape), dtype, transforms=t) for name, (shape, dtype, t) in stage.items()
    }
    scratch["full"] = plgpu.Barrier(num_arrivals=len(stage), num_barriers=config.stages)
    scratch["empty"] = plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages)
    sums = registers_of_sums(problem, config)
    kind = jnp.int32 if problem.x_dtype == "int8" and not runs_on(problem) else jnp.float32
    scratch |= parts_scratch(config, sums, kind) | kept_scratch(problem, config)
    scratch |= tiles_scratch(problem, config, out_dtype) | token_scratch(problem, config)

    out = [jax.ShapeDtypeStruct((config.splits, problem.tokens, problem.outputs), out_dtype)]
    if config.stream_k:
        out.append(jax.ShapeDtypeStruct(partials_shape(config.blocks, config.row_warpgroups, sums), kind))

    def body(*refs: Any, **shared: Any) -> None:
        own = dict(zip((*names, "out", "partials"), refs, strict=False))
        _body(problem, config, kind, out_dtype, decoder, own, shared)

    def run(*arrays: jax.Array) -> jax.Array:
        return plgpu.kernel(
            body,
            out_type=out,
            scratch_types=scratch,
            grid=(config.blocks // config.cluster,),
            grid_names=("block",),
            **({"cluster": (config.cluster,), "cluster_names": ("rank",)} if config.cluster > 1 else {}),
            num_threads=config.warpgroups + 1,
            thread_name="warpgroup",
            compiler_params=compat.WARPGROUP,
        )(*arrays)[0]

    if not config.stream_k:
        return run(*arrays.values())
    # products of one batch would share their semaphores
    alone = dataclasses.replace(config, stream_k=False)

    def batched(_: int, in_batched: list[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        def each(*arrays: jax.Array) -> jax.Array:
            return affine_kernel(problem, alone, dict(zip(names, arrays, strict=True)), out_dtype, decoder)

        return jax.vmap(each, in_axes=[0 if axis else None for axis in in_batched])(*arrays), True

    product = jax.custom_batching.custom_vmap(run)
    product.def_vmap(batched)
    return product(*arrays.values())


def _stage_types(problem: Problem, config: Config) -> dict[str, tuple[tuple[int, ...], Any, tuple[Any, ...]]]:
    """Shape, type and layout of what a stage holds."""
    swizzle = (plgpu.TilingTransform((8, problem.x_columns)), plgpu.SwizzleTransform(128))
    types: dict[str, tuple[tuple[int, ...], Any, tuple[Any, ...]]] = {
        "words": ((config.row_warpgroups, config.block_k // 64, problem.bits, 128), jnp.uint32, ()),
    }
    if not problem.token_dtype:
        types["x"] = ((config.block_m, config.block_k), jnp.dtype(problem.x_dtype), swizzle)
    if problem.group_size is not None:
        groups = max(1, config.block_k // problem.group_size)
        types["scales"] = ((groups, config.rows), jnp.dtype(problem.scale_dtype), ())
        if problem.has_zeros:
            types["zeros"] = ((groups, config.rows), jnp.uint8, ())
    if problem.entry_words:
        types["slots"] = ((config.row_warpgroups, config.block_k // 128, problem.entry_words), jnp.uint32, ())
    return types


def _body(
    problem: Problem, config: Config, kind: Any, out_dtype: Any, decoder: Decoder | None, refs: Refs, shared: Refs
) -> None:
    warpgroup = lax.axis_index("warpgroup")
    cluster = lax.axis_index("block")
    rank: Any = lax.axis_index("rank") if config.cluster > 1 else 0
    pieces = Pieces(problem, config, cluster, rank)
    mine = pieces.count()
    copying, computing = config.registers()
    token_first = goes_first(problem, decoder is not None)
    semaphores: Any = None
    if config.stream_k:
        semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((config.blocks * config.row_warpgroups,)))

    def kept_tiles(first: Any) -> Any:
        """Tiles of kept columns that a CTA adds to a block: who has its first stage all of them."""
        return jnp.where(first == 0, jnp.int32(problem.kept_tiles), 0)

    @pl.when(warpgroup == config.warpgroups)
    def _copy() -> None:
        if config.warpgroups > 1:
            plgpu.set_max_registers(copying, action="decrease")

        def item(index: jax.Array, done: jax.Array) -> jax.Array:
            piece = pieces.piece(index)

            def step(k: jax.Array, done: jax.Array) -> jax.Array:
                slot = lax.rem(done, jnp.int32(config.stages))
                if token_first:
                    wait_for_token(config, done == STAGES_BEFORE_TOKEN)

                @pl.when(done >= config.stages)
                def _wait() -> None:
                    plgpu.barrier_wait(shared["empty"].at[slot])

                _copy_stage(problem, config, refs, shared, slot, piece.row, piece.column, piece.first + k)
                return done + 1

            done = lax.fori_loop(0, piece.stages, step, done)
            if problem.kept_columns:
                copy_kept(problem, config, refs, shared, piece.row, piece.column, kept_tiles(piece.first))
            return done

        done = lax.fori_loop(0, mine, item, jnp.int32(0))
        if token_first:
            wait_for_token(config, done <= STAGES_BEFORE_TOKEN)

    @pl.when(warpgroup < config.warpgroups)
    def _compute() -> None:
        if config.warpgroups > 1:  # one alone has as many as a thread can have
            plgpu.set_max_registers(computing, action="increase")
        row_part = lax.div(warpgroup, jnp.int32(config.k_warpgroups))
        k_part = lax.rem(warpgroup, jnp.int32(config.k_warpgroups))
        factor = byte_factor(problem.bits, problem.has_zeros, problem.two_level) if decoder is None else 1
        steps = stage_steps(problem, config, kind, decoder)
        dtypes = {name: jnp.dtype(ref.dtype).name for name, ref in refs.items()}
        scale = scale_block(problem, config, dtypes, factor)
        add_kept = kept_product(problem, config) if problem.kept_columns else None
        if problem.kept_columns:
            pl.when(k_part == 0)(lambda: offer_places(problem, config, shared))
        names = [name for name in ("words", "x", "token", "scales", "zeros", "slots") if name in shared]
        of_tokens = {"x_scales": token_scales(shared["token"])} if problem.token_dtype else {}
        if "tiles" in shared:
            store = functools.partial(store_tiles(config, out_dtype), shared["tiles"].at[row_part], refs["out"].at[0])
        else:
            store = functools.partial(store_block(problem, config, out_dtype), refs["out"])
        overflow = [refs["overflow"]] if problem.entry_words else []

        def load_state(index: jax.Array) -> tuple[jax.Array, ...]:
            if decoder is None:
                return ()
            first_row = (pieces.piece(index).row * config.row_warpgroups + row_part) * 64
            return (decoder.load(refs["tables"], first_row),)

        parts = [row_part, k_part]

        def stage_at(slot: Any, number: Any = 0) -> list[Any]:
            """What is in a slot, and of a token for all stages the codes of that number."""
            size = config.block_k * problem.pieces
            places = {name: pl.ds(number * size, size) if name == "token" else slot for name in names}
            return [shared[name].at[place] for name, place in places.items()] + overflow

        def arrived(slot: Any, is_there: Any = True) -> Any:
            """Waits for a stage, and reads the beginning of it."""
            pl.when(is_there)(lambda: plgpu.barrier_wait(shared["full"].at[slot]))
            return steps.read_ahead(stage_at(slot), parts)

        def item(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            place, *state = carry
            piece = pieces.piece(index)
            # early if registers are plenty, since they are kept for as long
            following = load_state(index + 1) if config.block_m <= 64 else ()

            def step(number: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                (slot, *ahead), sums = carry
                after = jnp.where(slot == config.stages - 1, 0, slot + 1)
                first = ahead[0] if ahead else arrived(slot)
                pending = steps.begin(stage_at(slot, piece.first + number), first, sums, parts, *state)
                if ahead:  # of the next stage of this piece or of the next; there is none behind the last
                    ahead = [arrived(after, (number + 1 < piece.stages) | (index + 1 < mine))]
                sums = steps.finish(pending)
                plgpu.barrier_arrive(shared["empty"].at[slot])
                return (after, *ahead), sums

            if runs_on(problem):
                place, sums = running_sums.sum_stages(problem, config, piece.segments, piece.stages, step, place)
            else:
                zero = jnp.zeros((compat.THREADS * registers_of_sums(problem, config),), kind)
                place, (sums,) = lax.fori_loop(0, piece.stages, step, (place, (zero,)))
            if config.block_m > 64:
                following = load_state(index + 1)
            first_row = (piece.row * config.row_warpgroups + row_part) * 64
            first_token = piece.column * config.block_m

            def write(sums: jax.Array) -> None:
                y = scale(refs | of_tokens, first_token, first_row, sums)
                if add_kept is not None:
                    y = add_kept(shared, row_part, kept_tiles(piece.first), y)
                store(piece.split, first_token, first_row, y)

            if config.stream_k:
                stages = piece.item, piece.first, piece.stages
                finish = functools.partial(
                    add_rest, pieces.ranges, refs["partials"], semaphores, stages, pieces.cta, row_part
                )
            else:
                whose = (rank, row_part, piece.is_shared, index - pieces.rounds.own)
                finish = functools.partial(add_shares, config, shared, whose)
            add_parts(config, shared, index, row_part, k_part, sums, lambda total: finish(total, write))
            return place, *following

        chunks = ask_for_token(problem, config)(refs["x"], warpgroup) if problem.token_dtype else None
        first_state = load_state(jnp.int32(0))
        if chunks is not None:
            make_token(problem, config, token_first)(chunks, shared["token"], warpgroup)
        # Running sums are scaled before the next products: what else these need is read while the last ones run. Others
        # gain nothing by it with few tokens, and with many they lose: CTAs then ask less often for the same at a time.
        ahead = [arrived(0, mine > 0)] if runs_on(problem) else []
        lax.fori_loop(0, mine, item, ((jnp.int32(0), *ahead), *first_state))
        if "tiles" in shared:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if config.cluster > 1:
        leave_together()


def _copy_stage(
    problem: Problem,
    config: Config,
    refs: Refs,
    shared: Refs,
    slot: jax.Array,
    row: jax.Array,
    column: jax.Array,
    step: jax.Array,
) -> None:
    """Starts the copies of one stage. What lies past the end of an array arrives as zero."""
    full = shared["full"].at[slot]
    tiles = config.block_k // 64
    source = refs["words"].at[pl.ds(row * config.row_warpgroups, config.row_warpgroups), pl.ds(step * tiles, tiles)]
    plgpu.copy_gmem_to_smem(source, shared["words"].at[slot], full)
    if "x" in shared:
        tokens, columns = pl.ds(column * config.block_m, config.block_m), pl.ds(step * config.block_k, config.block_k)
        plgpu.copy_gmem_to_smem(refs["x"].at[tokens, columns], shared["x"].at[slot], full)
    if problem.entry_words:
        rows, blocks = pl.ds(row * config.row_warpgroups, config.row_warpgroups), config.block_k // 128
        source = refs["slots"].at[rows, pl.ds(step * blocks, blocks)]
        plgpu.copy_gmem_to_smem(source, shared["slots"].at[slot], full)
    if problem.group_size is not None:
        groups = max(1, config.block_k // problem.group_size)
        first = lax.div(step * config.block_k, jnp.int32(problem.group_size))
        rows = pl.ds(row * config.rows, config.rows)
        plgpu.copy_gmem_to_smem(refs["scales"].at[pl.ds(first, groups), rows], shared["scales"].at[slot], full)
        if problem.has_zeros:
            plgpu.copy_gmem_to_smem(refs["zeros"].at[pl.ds(first, groups), rows], shared["zeros"].at[slot], full)
