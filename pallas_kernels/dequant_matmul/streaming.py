"""The XLA path of the dequantizing product: a scan over chunks of inputs, one output row a lane.

Codes come transposed (`stream_t`, [W, N]). Step i reads the words of a chunk of inputs, shifts its codes out, decodes
them in registers and adds x[m, k] * W[n, k] to y [M, N]:

    y[m, :] += x[m, k] * decode(code[k, :])        k in chunk i

Every operation is elementwise along N, so it vectorises without reordering a sum; a word is read once; nothing of the
weight's size is ever written. It is bound by about thirteen vector operations a weight (3-bit table), and on a CPU it
beats a dense float32 matrix-vector product, which must read eight to ten times the bytes.

For many tokens the same loop writes the decoded [K, N] matrix once (`decode`) and a dense product follows.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.packing import stream_window


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

    def values(self, codes: list[jax.Array], first: jax.Array) -> list[jax.Array]:
        """float32 [N] for each of the codes of inputs first, first + 1, ..."""
        shared = self.group_axis == "in" and self.group_size % len(codes) == 0
        grid = [self._grid(first)] * len(codes) if shared else [self._grid(first + j) for j in range(len(codes))]
        return [scale * (_float(code) - zero) for code, (scale, zero) in zip(codes, grid, strict=True)]

    def _grid(self, column: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scale and zero [N] of one input column."""
        index = column // self.group_size if self.group_axis == "in" else column

        def row(values: jax.Array) -> jax.Array:
            values = jax.lax.dynamic_index_in_dim(values, index, keepdims=False).astype(jnp.float32)
            if self.group_axis == "in":
                return values
            return jnp.repeat(values, self.group_size)[: self.shape[0]]

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

    def values(self, codes: list[jax.Array], first: jax.Array) -> list[jax.Array]:
        """float32 [N] for each of the codes. A select tree up to 4 bits (no gather in vector units), else a gather."""
        table = self.codebook.astype(jnp.float32)
        found = [_select(list(table), code, self.bits) if self.bits <= 4 else _gather(table, code) for code in codes]
        return found if self.scales is None else [value * self.scales.astype(jnp.float32) for value in found]


Weight = Affine | Codebook


@jax.jit
def matvec(x: jax.Array, weight: Weight) -> jax.Array:
    """x [M, K] float32 times the transposed weight, [M, N] float32, for few rows M: nothing decoded is stored."""
    chunk, steps = _chunks(weight)
    rows = x.shape[0]
    if steps == 0:  # every input column is kept elsewhere
        return jnp.zeros((rows, weight.shape[0]), jnp.float32)
    padded = jnp.pad(x, ((0, 0), (0, steps * chunk - x.shape[1])))  # codes past the end meet a zero
    inputs = padded.reshape(rows, steps, chunk).transpose(1, 2, 0)

    def step(total: jax.Array, item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, part = item
        codes = stream_window(weight.words, index, weight.bits, chunk)
        for value, inputs_k in zip(weight.values(codes, index * chunk), part, strict=True):
            total = total + inputs_k[:, None] * value[None, :]
        return total, None

    start = jnp.zeros((rows, weight.shape[0]), jnp.float32)
    total, _ = jax.lax.scan(step, start, (jnp.arange(steps, dtype=jnp.int32), inputs))
    return total


@functools.partial(jax.jit, static_argnames=("dtype",))
def decode(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """The decoded matrix, transposed: [K, N]."""
    chunk, steps = _chunks(weight)
    if steps == 0:
        return jnp.zeros((0, weight.shape[0]), dtype)

    def step(index: jax.Array, dense: jax.Array) -> jax.Array:
        codes = stream_window(weight.words, index, weight.bits, chunk)
        # Row by row in place: one stacked write a step makes XLA's CPU compiler decode every value again for each row.
        for j, value in enumerate(weight.values(codes, index * chunk)):
            dense = jax.lax.dynamic_update_slice(dense, value.astype(dtype)[None], (index * chunk + j, 0))
        return dense

    start = jnp.zeros((steps * chunk, weight.shape[0]), dtype)
    return jax.lax.fori_loop(0, steps, step, start)[: weight.shape[1]]


def _chunks(weight: Weight) -> tuple[int, int]:
    """Codes a step, as many as fit one 32-bit window, and the number of steps."""
    chunk = 8 if weight.bits <= 4 else 4
    return chunk, -(-weight.shape[1] // chunk)


def _float(codes: jax.Array) -> jax.Array:
    # through int32: unsigned to float has no vector instruction before AVX-512
    return codes.astype(jnp.int32).astype(jnp.float32)


def _select(entries: list[jax.Array], code: jax.Array, bits: int) -> jax.Array:
    """entries[code] by halving the list on each bit of the code."""
    for bit in range(bits):
        odd = (code >> jnp.uint32(bit)) & jnp.uint32(1) != jnp.uint32(0)
        entries = [jnp.where(odd, high, low) for low, high in zip(entries[::2], entries[1::2], strict=True)]
    return jnp.broadcast_to(entries[0], code.shape)


def _gather(table: jax.Array, code: jax.Array) -> jax.Array:
    """table [2**bits, N or 1] at code [N]."""
    table = jnp.broadcast_to(table, (table.shape[0], code.shape[0]))
    return jnp.take_along_axis(table, code.astype(jnp.int32)[None, :], axis=0)[0]
