"""The sparse product for few tokens on a GPU: a program owns its rows, so sums have one order and need no atomics.

A program takes block_n rows, or one long row, spread over its lanes: however uneven the rows, no program does much more
than `longest` entries a row. What takes time is waiting: where a row starts, then its words, then the inputs, each a
trip to memory. So the first depth * chunk entries of a row are read at once, before it is known how long the longest
row is, y is read at the very beginning, and all programs fit on the GPU together. Few lanes share a row: adding up over
lanes takes a shuffle for each token and level, of which a multiprocessor does one a cycle.

For M = 1, 28672 x 8192 and 0.45 % of entries the words are 4.6 MB, and a multiprocessor gathers 8000 inputs.
It is the Triton backend of Pallas: Mosaic GPU has no gather.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.sparse_matmul.rows import LONG, QUAD, SparseRows

_Marker = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Config:
    """block_n rows by `chunk` entries, `depth` times before any is used, for block_m tokens, by num_warps warps.

    Powers of two. A thread should hold one entry and eight tokens, block_n * chunk * max(block_m / 8, 1) being the
    number of threads, or four entries of one token: then words are loaded by the thread that gathers for them.
    """

    block_n: int
    chunk: int
    depth: int
    block_m: int
    num_warps: int


def default_config(tokens: int) -> Config:
    """At most 64 entries of a row at once, and at most eight gathers of 16 bytes by a thread."""
    if tokens <= 2:  # each for itself: two gathers of 2 bytes cost less than transposing x first
        return Config(32, 16, 4, 1, 4)
    if tokens <= 8:
        return Config(32, 4, 8, pl.next_power_of_2(tokens), 4)
    return Config(16, 4, 8, 16, 4)


def add_by_programs(
    y: jax.Array,
    x: jax.Array,
    sparse: SparseRows,
    out_dtype: jax.typing.DTypeLike,
    config: Config,
    interpret: bool = False,
) -> jax.Array:
    """y [M, N] float32 plus x [M, K] times the entries transposed, rounded once to out_dtype.

    If that is float32, in y's memory if nothing else reads it. x is bfloat16, float16 or float32.
    """
    tokens, rows = y.shape
    blocks = pl.cdiv(tokens, config.block_m)
    if config.block_m > 1:  # an entry's tokens side by side: one load of up to 16 bytes
        x = jnp.pad(x, ((0, blocks * config.block_m - tokens), (0, 0))).T
    long = sparse.long_rows.shape[0]
    operands = [x, sparse.words, sparse.starts, *(sparse[-3:] if long else []), y]
    return pl.pallas_call(
        functools.partial(_kernel, config, pl.cdiv(rows, config.block_n), _nothing if interpret else _loads_before),
        out_shape=jax.ShapeDtypeStruct(y.shape, out_dtype),
        grid=(pl.cdiv(rows, config.block_n) + long, blocks),
        input_output_aliases={len(operands) - 1: 0} if y.dtype == out_dtype else {},
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="sparse_rows",
    )(*operands)


def _loads_before() -> None:
    """Keeps the assembler from moving loads past this point: to save registers it would issue half of them late."""
    pltriton.debug_barrier()


def _nothing() -> None:
    """In its place where nothing is assembled."""


def _kernel(config: Config, row_programs: int, issued: _Marker, x_ref, words_ref, starts_ref, *refs):
    long_refs, y_refs = refs[:-2], refs[-2:]
    program, first_token = pl.program_id(0), pl.program_id(1) * config.block_m

    def short():
        _short_rows(config, issued, program, first_token, x_ref, words_ref, starts_ref, y_refs)

    def long():
        _long_row(config, issued, program - row_programs, first_token, x_ref, long_refs, y_refs)

    if long_refs:
        jax.lax.cond(program < row_programs, short, long)
    else:
        short()


def _short_rows(config: Config, issued: _Marker, block, first_token, x_ref, words_ref, starts_ref, y_refs):
    rows = starts_ref.shape[0] - 1
    row = block * config.block_n + jnp.arange(config.block_n, dtype=jnp.int32)
    inside = row < rows
    start = pltriton.load(starts_ref.at[row], mask=inside, other=0)
    stop = pltriton.load(starts_ref.at[row + 1], mask=inside, other=0)
    place, mask = _outputs(config, row, inside, first_token, y_refs)
    before = pltriton.load(y_refs[0].at[place], mask=mask, other=0.0)
    begin, end = ((bound & ~LONG) * QUAD for bound in (start, stop))
    sums = _sum_entries(config, issued, x_ref, words_ref, begin, end, jnp.max(end - begin), config.chunk, first_token)
    # empty rows are written too: they may have to change their type
    place, mask = _outputs(config, row, inside & (start >= 0), first_token, y_refs)
    pltriton.store(y_refs[1].at[place], (before + jnp.sum(sums, axis=1)).astype(y_refs[1].dtype), mask=mask)


def _long_row(config: Config, issued: _Marker, which, first_token, x_ref, long_refs, y_refs):
    """All lanes take the entries in turn."""
    words_ref, rows_ref, starts_ref = long_refs
    row = pltriton.load(rows_ref.at[which])
    low, high = (pltriton.load(starts_ref.at[which + i]) * QUAD for i in range(2))
    lanes = jnp.arange(config.block_n, dtype=jnp.int32)
    begin, together = low + lanes * config.chunk, config.block_n * config.chunk
    end = jnp.broadcast_to(high, (config.block_n,))
    sums = _sum_entries(config, issued, x_ref, words_ref, begin, end, high - low, together, first_token)
    place, mask = _outputs(config, row + lanes, (lanes == 0) & (row < y_refs[0].shape[1]), first_token, y_refs)
    before = pltriton.load(y_refs[0].at[place], mask=mask, other=0.0)
    total = before + jnp.sum(jnp.sum(sums, axis=1), axis=0, keepdims=True)
    pltriton.store(y_refs[1].at[place], total.astype(y_refs[1].dtype), mask=mask)


def _outputs(config: Config, row, keep, first_token, y_refs) -> tuple[Any, Any]:
    """Index and mask of y at so many rows, [block_n] for one token and else [block_n, block_m]."""
    if config.block_m == 1:
        return (first_token, row), keep
    token, shape = first_token + jnp.arange(config.block_m, dtype=jnp.int32), (config.block_n, config.block_m)
    place = jnp.broadcast_to(token[None], shape), jnp.broadcast_to(row[:, None], shape)
    return place, keep[:, None] & (token < y_refs[0].shape[0])[None]


def _sum_entries(config: Config, issued: _Marker, x_ref, words_ref, begin, end, longest, stride, first_token):
    """Products of entries begin + 0..chunk - 1, + stride, + 2 stride .. below end [block_n], summed over the strides.

    float32 [block_n, chunk], and a last axis block_m if that is more than 1. longest: the largest of all end - begin.
    """
    shape: tuple[int, ...] = (config.block_n, config.chunk)
    entry = begin[:, None] + jnp.arange(config.chunk, dtype=jnp.int32)[None]
    last = jnp.broadcast_to(end[:, None], shape)

    def spread(a):
        return a if config.block_m == 1 else jnp.broadcast_to(a[:, :, None], (*shape, config.block_m))

    token = first_token
    if config.block_m > 1:
        token += jnp.arange(config.block_m, dtype=jnp.int32)
        token = jnp.broadcast_to(token[None, None], (*shape, config.block_m))
    else:
        token = jnp.broadcast_to(token, shape)

    def add(i, sums):
        # all words, then all inputs: as many loads on their way as registers allow
        places = [entry + (i * config.depth + j) * stride for j in range(config.depth)]
        there = [place < last for place in places]
        words = [
            pltriton.load(words_ref.at[place], mask=mask, other=jnp.uint32(0))
            for place, mask in zip(places, there, strict=True)
        ]
        issued()
        inputs = []
        for word, mask in zip(words, there, strict=True):
            column = spread(jax.lax.shift_right_logical(word, jnp.full(shape, 16, jnp.uint32)).astype(jnp.int32))
            place = (token, column) if config.block_m == 1 else (column, token)
            inputs.append(pltriton.load(x_ref.at[place], mask=spread(mask), other=0.0))
        for word, values in zip(words, inputs, strict=True):
            value = jax.lax.bitcast_convert_type(word.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
            sums += values.astype(jnp.float32) * spread(value)
        return sums

    sums = add(0, jnp.zeros(shape if config.block_m == 1 else (*shape, config.block_m), jnp.float32))
    step = stride * config.depth
    # not pl.cdiv: the backend cannot lower its rounding towards minus infinity
    return jax.lax.fori_loop(1, jax.lax.div(longest + step - 1, jnp.int32(step)), add, sums)
