"""Nested codebooks: one set of codes that reads at every width from b0 to B bits, with one table for each width.

    code at b bits = code at B bits >> (B - b),    table[b] [N, 2**b],    b = b0 .. B       (Any-Precision, 2402.10517)

The narrowest table is given, usually from `squeezellm.fit`. Each width splits every cluster of the one before in two:

    maximise  (f_L f_R / f) (m_L - m_R)**2  over cuts of the cluster's sorted members     (= the fall of the objective)

with mass f = sum of weights and mean m of either side: the optimal weighted 2-means. Entry c becomes 2c and 2c + 1, the
means of its sides, so a pair lies on both sides of its cluster's mean; if clusters are intervals, as nearest codes make
them, every table ascends. Members then take the nearer of the two as stored, which also places those of weight 0.

- A cluster that cannot be split (one distinct weighted value) repeats its mean, an empty or weightless one its entry.
- A row is sorted once, by (code, value): children are runs of the same order. Masses and moments are segmented scans
  from both ends, within clusters scaled to mass 1 and centred: no differences of long prefix sums, in which a light
  cluster would drown.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.quantize.codebook import ROWS_ON_ACCELERATOR, ROWS_ON_CPU
from jquant.quantize.grid import round_to_storage


class Nested(NamedTuple):
    """codes [N, K] int32 at the greatest width, and {b: table [N, 2**b] in storage dtype} for every width."""

    codes: jax.Array
    codebooks: Mapping[int, jax.Array]


@partial(jax.jit, static_argnames=("bits", "codebook_dtype"))
def nest(
    W: jax.Array,
    weights: jax.Array,
    codebook: jax.Array,
    codes: jax.Array,
    bits: int,
    codebook_dtype: Any = jnp.float32,
) -> Nested:
    """Splits codebook [N, 2**b0] with codes [N, K] of W [N, K] up to `bits`; weights [N, K] are non-negative.

    The table and codes at b0 bits are those given. Negative or non-finite weights count as zero; a row without any is
    unweighted. For entries kept elsewhere pass weight 0 and the value they were coded as, 0 after `squeezellm.fit`.
    Raises ValueError for bits outside b0..8 or shapes that disagree.
    """
    seed_bits = _check(W, weights, codebook, codes, bits)
    f = weights.astype(jnp.float32)
    f = jnp.where(jnp.isfinite(f), jnp.maximum(f, 0.0), 0.0)
    largest = jnp.max(f, axis=1, keepdims=True)
    usable = largest >= float(jnp.finfo(jnp.float32).tiny)
    f = jnp.where(usable, f / jnp.where(usable, largest, 1.0), 1.0)
    seed = round_to_storage(codebook, codebook_dtype)
    split = partial(_nest_row, seed_bits=seed_bits, bits=bits, dtype=codebook_dtype)
    chunk = min(ROWS_ON_CPU if jax.default_backend() == "cpu" else ROWS_ON_ACCELERATOR, W.shape[0])
    operands = (W.astype(jnp.float32), f, seed, codes.astype(jnp.int32))
    tables, codes = jax.lax.map(lambda row: split(*row), operands, batch_size=chunk)
    # Every width comes spread over 2**bits places: the first place of each run is the entry.
    narrower = {seed_bits: seed} | {
        seed_bits + 1 + i: tables[:, i, :: 2 ** (bits - seed_bits - 1 - i)] for i in range(bits - seed_bits)
    }
    return Nested(codes, {b: table.astype(codebook_dtype) for b, table in narrower.items()})


def at_bits(nested: Nested, bits: int) -> tuple[jax.Array, jax.Array]:
    """(codebook [N, 2**bits], codes [N, K] int32) of one width. Raises ValueError for a width that is not held."""
    if bits not in nested.codebooks:
        raise ValueError(f"no table of {bits} bits; this nest holds {sorted(nested.codebooks)}")
    return nested.codebooks[bits], nested.codes >> (max(nested.codebooks) - bits)


def nested_size_bits(shape: tuple[int, int], seed_bits: int, bits: int, table_bits: int = 16) -> int:
    """Bits that W [N, K] = shape takes: codes of `bits` in 32-bit words, and every table from seed_bits to bits.

    Tables cost table_bits (2**(bits + 1) - 2**seed_bits) a row: 8064 for 3 to 8 bits, 2 bits a weight at K = 4096.
    """
    rows, columns = shape
    if not 1 <= seed_bits <= bits <= 8:
        raise ValueError(f"widths {seed_bits} to {bits} cannot be nested; expected 1 <= seed_bits <= bits <= 8")
    words = -(-columns * bits // 32)
    return rows * (32 * words + table_bits * (2 ** (bits + 1) - 2**seed_bits))


def _check(W: jax.Array, weights: jax.Array, codebook: jax.Array, codes: jax.Array, bits: int) -> int:
    if W.ndim != 2 or weights.shape != W.shape or codes.shape != W.shape:
        raise ValueError(f"W {W.shape}, weights {weights.shape} and codes {codes.shape} must be matrices of one shape")
    if codebook.ndim != 2 or codebook.shape[0] != W.shape[0]:
        raise ValueError(f"codebook {codebook.shape} must be [N, 2**b0] with a row for each of W's {W.shape[0]}")
    entries = codebook.shape[1]
    seed_bits = entries.bit_length() - 1
    if entries != 2**seed_bits or seed_bits < 1:
        raise ValueError(f"codebook has {entries} entries; expected a power of two, at least 2")
    if not seed_bits <= bits <= 8:
        raise ValueError(f"bits={bits} cannot be nested from a table of {seed_bits} bits; expected {seed_bits} to 8")
    return seed_bits


def _nest_row(
    x: jax.Array, f: jax.Array, seed: jax.Array, codes: jax.Array, *, seed_bits: int, bits: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """(tables [bits - seed_bits, 2**bits], each spread; codes [K] at `bits`) of one row."""
    places = jnp.arange(2**bits, dtype=jnp.int32)
    # A cluster is named by the first of the places it spreads over, at every width.
    named = codes << (bits - seed_bits)
    column = jnp.arange(x.shape[0], dtype=jnp.int32)
    named, x, f, column = jax.lax.sort((named, x, f, column), num_keys=2)

    def widen(carry: tuple[jax.Array, jax.Array], half: jax.Array):
        table, named = carry
        lower, upper = _split_clusters(x, f, named, table)
        pair = jnp.take(lower, places // (2 * half) * (2 * half)), jnp.take(upper, places // (2 * half) * (2 * half))
        table = round_to_storage(jnp.where(places // half % 2 == 0, *pair), dtype)
        left, right = table[named], table[named + half]
        return (table, named + half * (x > 0.5 * left + 0.5 * right).astype(jnp.int32)), table

    halves = jnp.asarray([2 ** (bits - b) for b in range(seed_bits + 1, bits + 1)], jnp.int32)
    start = (jnp.repeat(seed, 2 ** (bits - seed_bits), total_repeat_length=2**bits), named)
    (_, named), tables = jax.lax.scan(widen, start, halves)
    return tables, jax.lax.sort((column, named), num_keys=1)[1]


def _split_clusters(x: jax.Array, f: jax.Array, named: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(lower, upper) means [P] of the two sides of every cluster of a row [K] sorted by (cluster, value)."""
    places, columns = table.shape[0], x.shape[0]
    segments: dict[str, Any] = {"segment_ids": named, "num_segments": places, "indices_are_sorted": True}
    unit = jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(table)))
    unit = jnp.where(unit > 0, unit, 1.0)  # keeps the squares of huge and tiny rows inside float32
    z = x / unit
    mass = jax.ops.segment_sum(f, **segments)
    weighed = mass > 0
    f = f / jnp.where(weighed, mass, 1.0)[named]
    # In two steps: the sum of what is left after a first mean has no large terms to cancel.
    mean = jnp.where(weighed, jax.ops.segment_sum(f * z, **segments), table / unit)
    mean = mean + jax.ops.segment_sum(f * (z - mean[named]), **segments)
    away = z - mean[named]

    starts = jnp.concatenate([jnp.ones((1,), bool), named[1:] != named[:-1]])
    ends = jnp.concatenate([starts[1:], jnp.ones((1,), bool)])
    f_left, m_left = _running(f, f * away, starts)
    f_right, m_right = (v[::-1] for v in _running(f[::-1], (f * away)[::-1], ends[::-1]))
    # Position i is the cut after member i: the right side is what runs from i + 1 on.
    f_right, m_right = (jnp.concatenate([v[1:], jnp.zeros((1,))]) for v in (f_right, m_right))
    left = m_left / jnp.where(f_left > 0, f_left, 1.0)
    right = m_right / jnp.where(f_right > 0, f_right, 1.0)
    gain = jnp.where(ends | (x == jnp.roll(x, -1)), 0.0, f_left * f_right * (right - left) ** 2)
    best = jax.ops.segment_max(gain, **segments)
    here = jnp.arange(columns, dtype=jnp.int32)
    cut = jax.ops.segment_min(jnp.where((gain == best[named]) & (gain > 0), here, columns), **segments)
    found = cut < columns  # what is empty has the largest integer here
    cut = jnp.minimum(cut, columns - 1)
    # A mean lies among its members: rounding must not carry it past a neighbour's.
    least, most = jax.ops.segment_min(x, **segments), jax.ops.segment_max(x, **segments)
    lower = jnp.clip(unit * (mean + jnp.where(found, left[cut], 0.0)), least, jnp.where(found, x[cut], most))
    upper = jnp.clip(unit * (mean + jnp.where(found, right[cut], 0.0)), jnp.where(found, x[cut + 1], least), most)
    return jnp.where(weighed, lower, table), jnp.where(weighed, upper, table)


def _running(a: jax.Array, b: jax.Array, starts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of a and of b [K] from the last start up to each place.

    log2 K steps of doubling reach, in a loop: `associative_scan` does less work and takes far longer to compile.
    """

    def double(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, b, closed = carry  # closed: the sum has reached its start
        # The first place is a start, so whatever wraps around meets a sum that is closed.
        before = [jnp.roll(v, jnp.left_shift(1, step)) for v in carry]
        a, b = (jnp.where(closed, v, v + far) for v, far in zip((a, b), before[:2], strict=True))
        return a, b, closed | before[2]

    closed = starts.at[0].set(True)
    a, b, _ = jax.lax.fori_loop(0, max(a.shape[0] - 1, 1).bit_length(), double, (a, b, closed))
    return a, b
