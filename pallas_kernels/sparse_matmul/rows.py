"""The sparse product for few tokens on a GPU: a program owns its rows, so sums have one order and need no atomics.

An entry is one word, column << 16 | float16 bits. A row's entries are padded to a multiple of 4, one 16-byte load, by
entries of value 0 in a column that the row has anyway:

    words       uint32 [E]              rows in order, those of more than `longest` entries behind all others
    starts      int32 [N + 1]           row n is words [4 starts[n], 4 starts[n + 1]); a long row is empty here
    long_rows   int32 [L]               which rows are long, and N for none
    long_starts int32 [L + 1]           where they lie, as starts

E and L are rounded up, so that layers with nearly as many entries share a compiled program.

A program takes block_n rows, or one long row, spread over its lanes: however uneven the rows, no program does much more
than `longest` entries a row. Every lane holds chunk / lanes entries in flight, gathers x through the L1 cache, which
holds all of one token, and sums in float32.

For M = 1, 28672 x 8192 and 0.45 % of entries the words are 4.6 MB, and a multiprocessor gathers 8000 inputs.
It is the Triton backend of Pallas: Mosaic GPU has no gather.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

LARGEST_K = 65536  # a column has 16 bits
_ALIGN = 4


class SparseRows(NamedTuple):
    """Entries by row, as drawn above."""

    words: jax.Array
    starts: jax.Array
    long_rows: jax.Array
    long_starts: jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """block_n rows by `chunk` entries at a time, block_m tokens, a program of num_warps warps; powers of two."""

    block_n: int
    chunk: int
    block_m: int
    num_warps: int


def default_config(tokens: int) -> Config:
    """Chunks as long as registers allow: adding up over the threads of a row costs more than products do."""
    if tokens == 1:
        return Config(32, 64, 1, 4)
    if tokens <= 4:
        return Config(32, 32, pl.next_power_of_2(tokens), 4)
    return Config(32, 16, 8, 4) if tokens <= 8 else Config(32, 16, 16, 8)


def supported(tokens: int, columns: int, dtype: jax.typing.DTypeLike) -> str | None:
    """None if x [tokens, columns] of this type can be multiplied with float16 entries here, else the reason."""
    if jnp.dtype(dtype).name not in ("bfloat16", "float16", "float32"):
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16, float16 or float32"
    if columns > LARGEST_K:
        return f"K={columns} exceeds {LARGEST_K}, the columns an entry can name"
    if tokens < 1:
        return "there are no tokens"
    return None


def prepare_rows(values: np.ndarray, columns: np.ndarray, row_pointer: np.ndarray) -> SparseRows:
    """The entries of a compressed-row matrix in the order above. Once, after loading; NumPy.

    values float16 [nnz], columns [nnz] below 65536, row_pointer [N + 1].
    ValueError if values are not float16 or a column does not fit.
    """
    values, columns, pointer = np.asarray(values), np.asarray(columns), np.asarray(row_pointer, np.int64)
    if values.dtype != np.float16:
        raise ValueError(f"sparse values are {values.dtype}; expected float16, entries are packed in one word")
    if columns.size and int(columns.max()) >= LARGEST_K:
        raise ValueError(f"column {int(columns.max())} has no 16 bits; expected below {LARGEST_K}")
    counts = np.diff(pointer)
    quads = -(-counts // _ALIGN)
    long_rows = np.flatnonzero(counts > _longest(counts))
    short = quads.copy()
    short[long_rows] = 0
    starts = np.concatenate([[0], np.cumsum(short)])
    long_starts = starts[-1] + np.concatenate([[0], np.cumsum(quads[long_rows])])
    first = starts[:-1].copy()
    first[long_rows] = long_starts[:-1]

    entries = columns.astype(np.uint32) << 16 | values.view(np.uint16).astype(np.uint32)
    # every slot of a row repeats its last entry's column; the entries then overwrite all but the padding
    words = np.zeros(_rounded(int(long_starts[-1]) * _ALIGN), np.uint32)
    row = np.repeat(np.arange(counts.size), quads * _ALIGN)
    slot = np.arange(row.size) - np.repeat(np.cumsum(quads) - quads, quads * _ALIGN) * _ALIGN
    if entries.size:
        words[first[row] * _ALIGN + slot] = entries[pointer[row + 1] - 1] & np.uint32(0xFFFF0000)
        row = np.repeat(np.arange(counts.size), counts)
        words[first[row] * _ALIGN + np.arange(row.size) - pointer[row]] = entries
    none = (1 << (long_rows.size - 1).bit_length()) - long_rows.size if long_rows.size else 0
    long_rows = np.pad(long_rows, (0, none), constant_values=counts.size)
    long_starts = np.pad(long_starts, (0, none), mode="edge")
    arrays = (jnp.asarray(a.astype(np.int32)) for a in (starts, long_rows, long_starts))
    return SparseRows(jnp.asarray(words), *arrays)


def _rounded(count: int) -> int:
    """At most a sixteenth more."""
    step = 1 << max(count.bit_length() - 5, 0)
    return -(-count // step) * step


def _longest(counts: np.ndarray) -> int:
    """Beyond twice the mean a row gets a program of its own; there are at most half as many of them as rows."""
    mean = counts.mean() if counts.size else 0
    return max(64, -(-int(2 * mean) // 32) * 32)


def add_rows(
    y: jax.Array,
    x: jax.Array,
    sparse: SparseRows,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y [M, N] float32 plus x [M, K] times the entries transposed; in y's memory if nothing else reads it.

    ValueError with the reason where `supported` has one, or if shapes disagree.
    """
    (tokens, width), rows = x.shape, sparse.starts.shape[0] - 1
    if (reason := supported(tokens, width, x.dtype)) is not None:
        raise ValueError(f"the sparse kernel cannot serve this: {reason}")
    if y.shape != (tokens, rows) or y.dtype != jnp.float32:
        raise ValueError(f"y is {y.dtype}{list(y.shape)}; expected float32{[tokens, rows]}")
    if sparse.words.shape[0] == 0:
        return y
    config = default_config(tokens) if config is None else config
    blocks = pl.cdiv(tokens, config.block_m)
    # an entry's tokens side by side: one load of up to 16 bytes
    x = jnp.pad(x, ((0, blocks * config.block_m - tokens), (0, 0))).T
    long = sparse.long_rows.shape[0]
    operands = [x, sparse.words, sparse.starts, *([sparse.long_rows, sparse.long_starts] if long else []), y]
    return pl.pallas_call(
        functools.partial(_kernel, config, pl.cdiv(rows, config.block_n)),
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        grid=(pl.cdiv(rows, config.block_n) + long, blocks),
        input_output_aliases={len(operands) - 1: 0},
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="sparse_rows",
    )(*operands)


def _kernel(config: Config, row_programs: int, x_ref, words_ref, starts_ref, *refs):
    long_refs, (y_in, y_ref) = refs[:-2], refs[-2:]
    program, first_token = pl.program_id(0), pl.program_id(1) * config.block_m
    rows = starts_ref.shape[0] - 1
    lanes = jnp.arange(config.block_n, dtype=jnp.int32)
    row = program * config.block_n + lanes
    inside = row < rows
    begin = pltriton.load(starts_ref.at[row], mask=inside, other=0)
    end = pltriton.load(starts_ref.at[row + 1], mask=inside, other=0)
    step = config.chunk // _ALIGN
    if not long_refs:
        sums = _sum_rows(config, x_ref, words_ref, begin, end, step, first_token)
        _add(config, y_in, y_ref, row, inside & (end > begin), sums, first_token)
        return
    rows_ref, bounds_ref = long_refs
    # a long row is cut into chunks that the lanes take in turn, and their sums are added at the end
    whole = program >= row_programs
    which = jnp.maximum(program - row_programs, 0)
    low, high = pltriton.load(bounds_ref.at[which]), pltriton.load(bounds_ref.at[which + 1])
    begin = jnp.where(whole, low + lanes * step, begin)
    end = jnp.where(whole, high, end)
    stride = step + whole.astype(jnp.int32) * (step * (config.block_n - 1))
    sums = _sum_rows(config, x_ref, words_ref, begin, end, stride, first_token)
    together = jnp.broadcast_to(jnp.sum(sums, axis=0)[None], sums.shape)
    sums = jnp.where(whole, together, sums)
    alone = jnp.where(lanes == 0, pltriton.load(rows_ref.at[which]), rows)
    keep = (whole & (alone < rows)) | (~whole & inside & (end > begin))
    _add(config, y_in, y_ref, jnp.where(whole, alone, row), keep, sums, first_token)


def _sum_rows(config: Config, x_ref, words_ref, begin, end, stride, first_token):
    """Sums float32 [block_n, block_m] of entries [4 begin, 4 end), a chunk every `stride` quads."""
    entry = jnp.arange(config.chunk, dtype=jnp.int32)
    token = first_token + jnp.arange(config.block_m, dtype=jnp.int32)
    flat, shape = (config.block_n, config.chunk), (config.block_n, config.chunk, config.block_m)

    def add(i, sums):
        place = ((begin + i * stride) * _ALIGN)[:, None] + entry[None]
        there = jnp.broadcast_to(place < (end * _ALIGN)[:, None], flat)
        word = pltriton.load(words_ref.at[place], mask=there, other=jnp.uint32(0))
        value = jax.lax.bitcast_convert_type(word.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
        column = jax.lax.shift_right_logical(word, jnp.full(flat, 16, jnp.uint32)).astype(jnp.int32)
        if config.block_m == 1:
            values = pltriton.load(x_ref.at[column, jnp.broadcast_to(first_token, flat)], mask=there, other=0.0)
            return sums + (values.astype(jnp.float32) * value)[:, :, None]
        values = pltriton.load(
            x_ref.at[jnp.broadcast_to(column[:, :, None], shape), jnp.broadcast_to(token[None, None], shape)],
            mask=jnp.broadcast_to(there[:, :, None], shape),
            other=0.0,
        )
        return sums + values.astype(jnp.float32) * value[:, :, None]

    # not pl.cdiv: the backend cannot lower its rounding towards minus infinity
    chunks = jax.lax.div(jnp.max(end - begin) + stride - 1, jnp.int32(stride))
    sums = jax.lax.fori_loop(0, chunks, add, jnp.zeros(shape, jnp.float32))
    return jnp.sum(sums, axis=1)


def _add(config: Config, y_in, y_ref, row, keep, sums, first_token):
    token = first_token + jnp.arange(config.block_m, dtype=jnp.int32)
    tokens, shape = y_ref.shape[0], (config.block_n, config.block_m)
    place = jnp.broadcast_to(token[None], shape), jnp.broadcast_to(row[:, None], shape)
    mask = keep[:, None] & (token < tokens)[None]
    before = pltriton.load(y_in.at[place], mask=mask, other=0.0)
    pltriton.store(y_ref.at[place], before + sums, mask=mask)
