"""The XLA path of the dequantizing product: a scan over chunks of inputs, one output row a lane.

Codes come transposed (`stream_t`, [W, N]). Step i reads the words of a chunk of inputs, decodes them in registers and
adds x[m, k] * W[n, k] to y [M, N]:

    y[m, :] += x[m, k] * decode(code[k, :])        k in chunk i

Every operation is elementwise along N, so it vectorises without reordering a sum; a word is read once; nothing of the
weight's size is ever written. It is bound by a dozen vector operations a weight (3-bit table), and on a CPU it beats a
dense float32 matrix-vector product, which must read eight to ten times the bytes.

A narrow matrix (few rows N) has its inputs cut into S segments that are run side by side, lanes [S, N], and summed at
the end: fewer steps, each wide enough to be shared among cores.

For many tokens the same loop writes the decoded [K, N] matrix once (`decode`) and a dense product follows.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.packing import stream_window

LANES = 16384  # wanted in a step: a loop iteration costs a microsecond, this many lanes several
_WORD_ALIGNED = 32  # codes after which any width is at a word boundary


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "scales", "zeros"],
    meta_fields=["bits", "group_size", "group_axis", "shape"],
)
@dataclasses.dataclass(frozen=True)
class Affine:
    """Transposed affine weight. words uint32 [W, N].

    group_axis "in": scales, zeros [G, N]; "out": scales, zeros [K, G]. zeros None is the constant 2**(bits - 1).
    """

    words: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    bits: int
    group_size: int
    group_axis: Literal["in", "out"]
    shape: tuple[int, int]

    def chunk(self) -> int:
        """Codes a step: as many as fit one 32-bit window."""
        return 8 if self.bits <= 4 else 4

    def can_split(self, length: int) -> bool:
        """Whether groups allow segments of `length` inputs: every one must begin where a group does."""
        whole_rows = self.group_size >= self.shape[1]
        return self.group_axis == "in" and (whole_rows or length % self.group_size == 0)

    def values(self, window: jax.Array, first: jax.Array, count: int) -> list[jax.Array]:
        """float32 [S, N] for each of the `count` codes of a window [S, N]: inputs first, first + 1, ... of segments."""
        mask = jnp.uint32(2**self.bits - 1)
        codes = [_float((window >> jnp.uint32(j * self.bits)) & mask) for j in range(count)]
        shared = self.group_axis == "in" and self.group_size % count == 0
        segments = window.shape[0]
        grid = [self._grid(first if shared else first + j, segments) for j in range(1 if shared else count)]
        grid = grid * count if shared else grid
        return [scale * (code - zero) for code, (scale, zero) in zip(codes, grid, strict=True)]

    def _grid(self, column: jax.Array, segments: int) -> tuple[jax.Array, jax.Array]:
        """Scale and zero [S or 1, N] of one input column of each segment."""
        size = jnp.int32(self.group_size)
        index = jax.lax.div(column, size) if self.group_axis == "in" else column

        def row(values: jax.Array) -> jax.Array:
            if self.group_axis == "in":
                split = values.reshape(segments, -1, values.shape[1]) if values.shape[0] > 1 else values[None]
                found = jax.lax.dynamic_index_in_dim(split, index, axis=1, keepdims=False)
            else:
                found = jnp.repeat(jax.lax.dynamic_index_in_dim(values, index), self.group_size, axis=1)
            return found[:, : self.shape[0]].astype(jnp.float32)

        zero = jnp.float32(2 ** (self.bits - 1)) if self.zeros is None else row(self.zeros)
        return row(self.scales), zero


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "codebook", "scales"], meta_fields=["bits", "shape"]
)
@dataclasses.dataclass(frozen=True)
class Codebook:
    """Transposed codebook weight. words uint32 [W, N], codebook [2**bits, N or 1], scales [N] or None."""

    words: jax.Array
    codebook: jax.Array
    scales: jax.Array | None
    bits: int
    shape: tuple[int, int]

    def chunk(self) -> int:
        """Codes a step. Every code is a select tree in the program, so fewer of them than fit: compiling counts too."""
        return 4

    def can_split(self, length: int) -> bool:
        """Tables do not depend on the input: any segment will do."""
        return True

    def values(self, window: jax.Array, first: jax.Array, count: int) -> list[jax.Array]:
        """float32 [S, N] for each code. A select tree up to 4 bits (vector units have no gather), else a gather."""
        table = self.codebook.astype(jnp.float32)
        look_up = _select if self.bits <= 4 else _gather
        found = [look_up(table, window, j * self.bits, self.bits) for j in range(count)]
        return found if self.scales is None else [value * self.scales.astype(jnp.float32) for value in found]


Weight = Affine | Codebook


@jax.jit
def matvec(x: jax.Array, weight: Weight) -> jax.Array:
    """x [M, K] float32 times the transposed weight, [M, N] float32, for few rows M: nothing decoded is stored."""
    rows, (outputs, columns) = x.shape[0], weight.shape
    if columns == 0:  # every input column is kept elsewhere
        return jnp.zeros((rows, outputs), jnp.float32)
    segments, steps, chunk = _schedule(weight)
    padded = jnp.pad(x, ((0, 0), (0, segments * steps * chunk - columns)))  # codes past the end meet a zero
    inputs = padded.reshape(rows, segments, steps, chunk).transpose(2, 3, 0, 1)
    words = weight.words.reshape(segments, -1, outputs)

    def step(index: jax.Array, total: jax.Array) -> jax.Array:
        window = stream_window(words, index, weight.bits, chunk)
        here = jax.lax.dynamic_index_in_dim(inputs, index, keepdims=False)
        for value, inputs_k in zip(weight.values(window, index * chunk, chunk), here, strict=True):
            total = total + inputs_k[:, :, None] * value[None]
        return total

    start = jnp.zeros((rows, segments, outputs), jnp.float32)
    return jnp.sum(jax.lax.fori_loop(0, steps, step, start), axis=1)


@functools.partial(jax.jit, static_argnames=("dtype",))
def decode(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """The decoded matrix, transposed: [K, N]."""
    outputs, columns = weight.shape
    if columns == 0:
        return jnp.zeros((0, outputs), dtype)
    segments, steps, chunk = _schedule(weight)
    words = weight.words.reshape(segments, -1, outputs)

    def step(index: jax.Array, dense: jax.Array) -> jax.Array:
        window = stream_window(words, index, weight.bits, chunk)
        # Row by row in place: one stacked write a step makes XLA's CPU compiler decode every value again for each row.
        for j, value in enumerate(weight.values(window, index * chunk, chunk)):
            dense = jax.lax.dynamic_update_slice(dense, value.astype(dtype)[:, None], (0, index * chunk + j, 0))
        return dense

    start = jnp.zeros((segments, steps * chunk, outputs), dtype)
    return jax.lax.fori_loop(0, steps, step, start).reshape(-1, outputs)[:columns]


def _schedule(weight: Weight) -> tuple[int, int, int]:
    """(segments, steps, codes a step): a step takes as many codes as fit one 32-bit window, from every segment."""
    outputs, columns = weight.shape
    chunk = weight.chunk()
    segments = 1
    blocks, ragged = divmod(columns, _WORD_ALIGNED)
    if not ragged:
        for count in range(2, blocks + 1):
            if segments * outputs >= LANES:
                break
            if blocks % count == 0 and weight.can_split(columns // count):
                segments = count
    return segments, -(-columns // (segments * chunk)), chunk


def _float(codes: jax.Array) -> jax.Array:
    # through int32: unsigned to float has no vector instruction before AVX-512
    return codes.astype(jnp.int32).astype(jnp.float32)


def _select(table: jax.Array, window: jax.Array, place: int, bits: int) -> jax.Array:
    """table [2**bits, N or 1] at the codes in bits [place, place + bits) of window [S, N], by halving on each bit."""
    entries = list(table)
    for bit in range(place, place + bits):
        # The bit as the sign: blending instructions look at nothing else, so no mask has to be made.
        odd = jax.lax.bitcast_convert_type(window << jnp.uint32(31 - bit), jnp.int32) < 0
        entries = [jnp.where(odd, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]


def _gather(table: jax.Array, window: jax.Array, place: int, bits: int) -> jax.Array:
    """table [2**bits, N or 1] at the codes in bits [place, place + bits) of window [S, N]."""
    code = ((window >> jnp.uint32(place)) & jnp.uint32(2**bits - 1)).astype(jnp.int32)
    table = jnp.broadcast_to(table, (table.shape[0], code.shape[1]))
    return jnp.take_along_axis(table, code, axis=0)
