"""The selection in jax.numpy: every step one comparison and one sum, which XLA fuses; the oracle of the kernel."""

import jax
import jax.numpy as jnp

# low bits of a float32 that are the same in all values of a type, so the order needs none of them
SHIFTS = {"bfloat16": 16, "float16": 13, "float32": 0}


def mask_xla(x: jax.Array, count: int) -> jax.Array:
    """bool [M, K]: the count largest and count smallest of each token of x [M, K]; equations in the package.

    Nothing is kept in a token with a value that is not finite. count 0 keeps nothing, 2 count >= K everything.
    """
    finite = jnp.all(jnp.isfinite(x), axis=1, keepdims=True)
    width = x.shape[1]
    if count == 0:
        return jnp.zeros(x.shape, bool)
    if 2 * count >= width:
        return jnp.broadcast_to(finite, x.shape)
    keys, bits = ordered_keys(x.astype(jnp.float32), x.dtype.name)
    index = jnp.arange(width, dtype=jnp.int32)[None]

    def totals(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _count(high), _count(low)

    start = jnp.zeros((x.shape[0], 1), jnp.int32)
    return finite & select(keys, index, count, bits, width.bit_length(), start, totals)


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, axis=1, keepdims=True, dtype=jnp.int32)


def ordered_keys(x: jax.Array, dtype: str) -> tuple[jax.Array, int]:
    """(int32 keys ordered as x, signed numbers of so many bits) for float32 x that were of another type before."""
    shift = SHIFTS[dtype]
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    keys = bits ^ (jax.lax.shift_right_arithmetic(bits, jnp.full_like(bits, 31)) & 0x7FFFFFFF)
    return jax.lax.shift_right_arithmetic(keys, jnp.full_like(keys, shift)), 32 - shift


def select(keys, index, count, bits, index_bits, start, totals):
    """The selection. keys [..., K], index their places; start: zeros like a total; totals(a, b) counts two masks."""
    mirrored = ~keys

    def value_bit(i, thresholds):
        step = jax.lax.shift_left(jnp.int32(1), jnp.int32(bits - 1) - i)
        tried = [threshold + step for threshold in thresholds]
        counts = totals(keys >= tried[0], mirrored >= tried[1])
        return tuple(
            jnp.where(total >= count, new, old) for total, new, old in zip(counts, tried, thresholds, strict=True)
        )

    least = start + jnp.int32(-(2 ** (bits - 1)))
    high, low = jax.lax.fori_loop(0, bits, value_bit, (least, least))
    equal = keys == high, mirrored == low
    above = totals(keys > high, mirrored > low)
    needed = [count - total for total in above]

    def index_bit(i, lasts):
        step = jax.lax.shift_left(jnp.int32(1), jnp.int32(index_bits - 1) - i)
        tried = [last + step for last in lasts]
        counts = totals(equal[0] & (index < tried[0]), equal[1] & (index < tried[1]))
        return tuple(
            jnp.where(total < need, new, old)
            for total, need, new, old in zip(counts, needed, tried, lasts, strict=True)
        )

    last_high, last_low = jax.lax.fori_loop(0, index_bits, index_bit, (start, start))
    largest = (keys > high) | (equal[0] & (index <= last_high))
    smallest = (mirrored > low) | (equal[1] & (index <= last_low))
    return largest | smallest
