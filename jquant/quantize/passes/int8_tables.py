"""Tables snapped to int8, so that look-ups give the 8-bit operand of an integer product.

    codebook[n, c] ~ scale[n] * table[n, c],   table int8 in [-127, 127]

for a table a row, n = 0 ... N - 1, or one for the matrix, n = 0. The scale minimises

    sum_c importance[n, c] * (codebook[n, c] - scale[n] * table[n, c])**2

by a search: candidates of the scale give the table by rounding, every table its best scale by regression, rounded to
the type that will be stored, and the best pair stays. With entries that are weighted means of their members, and the
members' weights added up as importance, this is just what snapping adds to the error while the codes stand. A table
has so few entries that the search matters: it saves a tenth to two thirds of what the scale max |codebook| / 127 adds.
Candidates beyond 127 clip the largest entries, which pays where few and unimportant weights are far out.

Afterwards codes are chosen anew, against what will be stored: the nearest entries, ties to the lower, as everywhere.
More rounds of means, snapping and codes save less than a tenth of what is added, mostly a hundredth.

    added to the squared error                          3 bits    4 bits    5 bits
    three layers of SmolLM2-135M                        0.03 %    0.4 %
    the same, one table for the matrix                            0.15 %
    64 x 2048 normal numbers                            0.02 %    0.2 %     1.5 %
    the same of Student's t, 4 degrees of freedom       0.15 %    1.4 %     7 %

so it is for tables of up to 4 bits, and for rows without tails, which a sparse part takes off.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jquant.quantize.codebook import assign_codes
from jquant.quantize.grid import round_to_storage, storage_dtype

LARGEST = 127
# What the largest entry becomes: below half of the grid another candidate is twice as fine; above it is clipped.
SMALLEST_PEAK, LARGEST_PEAK = 64.0, 508.0
CANDIDATES, CLIPPED = 192, 48


def scale_dtype(codebook: jax.Array) -> Any:
    """The type that stores the scales of a concrete codebook [R, C]: float16 in its normal range, else float32.

    Scales of clipped tables may be subnormal then: two of their bits are lost, which the search takes into account.
    """
    peak = jnp.max(jnp.abs(codebook.astype(jnp.float32)), axis=1)
    return storage_dtype(peak / LARGEST, peak / SMALLEST_PEAK)


@functools.partial(jax.jit, static_argnames=("dtype",))
def snap_tables(codebook: jax.Array, importance: jax.Array, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """(table int8 [R, C], scales float32 [R] that `dtype` holds exactly) for codebook [R, C].

    importance [R, C]: how much an entry's error counts, for instance the sum of its members' weights. What is negative
    or not finite counts as zero; a row without any counts all its entries alike. A row of zeros has scale 1. Entries
    keep their order. ValueError if the shapes differ.
    """
    if codebook.ndim != 2 or importance.shape != codebook.shape:
        raise ValueError(f"codebook {codebook.shape} and importance {importance.shape} must be alike [R, C]")
    entries = codebook.astype(jnp.float32)
    weight = jnp.where(jnp.isfinite(importance), jnp.maximum(importance.astype(jnp.float32), 0.0), 0.0)
    heaviest = jnp.max(weight, axis=1, keepdims=True)
    usable = heaviest >= float(jnp.finfo(jnp.float32).tiny)
    weight = jnp.where(usable, weight / jnp.where(usable, heaviest, 1.0), 1.0)
    peak = jnp.max(jnp.abs(entries), axis=1, keepdims=True)
    peak = jnp.where(peak > 0, peak, jnp.float32(LARGEST))
    entries = entries / peak  # in units of the peak nothing overflows or vanishes when squared

    def attempt(largest: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        rounded = _on_grid(entries * largest)
        norm = jnp.sum(weight * rounded * rounded, axis=1, keepdims=True)
        fitted = jnp.sum(weight * rounded * entries, axis=1, keepdims=True) / jnp.where(norm > 0, norm, 1.0)
        scale = round_to_storage(jnp.where(norm > 0, fitted, 1.0 / largest) * peak, dtype) / peak
        table = _on_grid(entries / jnp.where(scale > 0, scale, 1.0))
        error = jnp.sum(weight * jnp.square(entries - scale * table), axis=1, keepdims=True)
        return error, table, scale

    def improve(best: tuple[jax.Array, ...], largest: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        found = attempt(largest)
        better = found[0] < best[0]
        return tuple(jnp.where(better, new, old) for new, old in zip(found, best, strict=True)), None

    fine = jnp.linspace(float(LARGEST), SMALLEST_PEAK, CANDIDATES, dtype=jnp.float32)
    clipped = jnp.geomspace(float(LARGEST), LARGEST_PEAK, CLIPPED + 1, dtype=jnp.float32)
    (_, table, scale), _ = jax.lax.scan(improve, attempt(fine[0]), jnp.concatenate([fine[1:], clipped[1:]]))
    return table.astype(jnp.int8), round_to_storage(scale * peak, dtype)[:, 0]


def _on_grid(values: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(values), -LARGEST, LARGEST)


@functools.partial(jax.jit, static_argnames=("entries",))
def entry_importance(codes: jax.Array, weights: jax.Array, entries: int) -> jax.Array:
    """The sum of the weights [N, K] of the members of every entry: float32 [N, entries], for codes [N, K]."""
    total = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=entries))
    return total(weights.astype(jnp.float32), codes)


@jax.jit
def dense_tables(table: jax.Array, scales: jax.Array) -> jax.Array:
    """scales [N] * table [N or 1, C], float32 [N, C]: what a snapped codebook decodes to."""
    return table.astype(jnp.float32) * scales.astype(jnp.float32)[:, None]


@functools.partial(jax.jit, static_argnames=("dtype",))
def snap_rows(
    W: jax.Array, weights: jax.Array, codebook: jax.Array, codes: jax.Array, mask: jax.Array | None, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(table int8 [N, C], scales [N] in dtype, codes int32 [N, K]) of a table a row fitted to W [N, K] with weights.

    Entries of mask [N, K] bool are kept elsewhere: they count for nothing, and get the code nearest to 0.
    """
    W = W.astype(jnp.float32) if mask is None else jnp.where(mask, 0.0, W.astype(jnp.float32))
    weights = weights if mask is None else jnp.where(mask, 0.0, weights)
    importance = entry_importance(codes, weights, codebook.shape[1])
    table, scales = snap_tables(codebook, importance, dtype)
    return table, scales.astype(dtype), assign_codes(W, dense_tables(table, scales))


def snap_matrix(
    W: jax.Array, weights: jax.Array, codebook: jax.Array, codes: jax.Array, scales: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(table int8 [1, C], scales [N], codes int32 [N, K]) of one table for the matrix, [1, C], with a scale a row.

    The table's own scale becomes part of the rows'. Needs concrete arrays: they say which type the scales fit.
    """
    own = scales.astype(jnp.float32)
    felt = jnp.where(jnp.isfinite(weights), weights, 0.0) * jnp.square(own / _largest(own))[:, None]
    importance = jnp.sum(entry_importance(codes, felt, codebook.shape[1]), axis=0, keepdims=True)
    table, unit = snap_tables(codebook, importance)
    joined = own * unit
    dtype = storage_dtype(joined)
    joined = round_to_storage(joined, dtype)
    divisor = jnp.where(joined > 0, joined, 1.0)
    codes = assign_codes(W.astype(jnp.float32) / divisor[:, None], table.astype(jnp.float32))
    return table, joined.astype(dtype), codes


def _largest(scales: jax.Array) -> jax.Array:
    largest = jnp.max(scales)
    return jnp.where(largest > 0, largest, 1.0)
