"""Activation quantization in jax.numpy: the oracle of the kernel, and the path of every other device."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Mode = Literal["kernel", "simulation"]
MODES: tuple[Mode, ...] = ("kernel", "simulation")
SMALLEST_SCALE = 1e-6  # of the "kernel" mode
TINY = float(jnp.finfo(jnp.float32).tiny)
SLOTS = 64  # columns of a tile of the matrix kernels


class Quantized(NamedTuple):
    """codes int8 [M, P] in slots, scales and offsets float32 [M, 1] (no offsets: symmetric), kept [M, k] or None."""

    codes: jax.Array
    scales: jax.Array
    offsets: jax.Array | None
    kept: jax.Array | None


def num_slots(columns: int, kept: int) -> int:
    """P: the base columns rounded up to whole tiles."""
    return -(-(columns - kept) // SLOTS) * SLOTS


def slot_columns(columns: int, index: np.ndarray | jax.Array | None) -> jax.Array:
    """Which column of x [M, K] every slot holds: int32 [P]; the padding repeats the first base column.

    index [k] int, ascending, holds the kept columns, or is None. Not for use under jit; once, after loading.
    ValueError if nothing is left to quantize.
    """
    base = np.arange(columns) if index is None else np.delete(np.arange(columns), np.asarray(index))
    if base.size == 0:
        raise ValueError(f"all {columns} columns are kept; expected at least one to quantize")
    place = slot_places(np.arange(num_slots(base.size, 0)))
    return jnp.asarray(np.where(place < base.size, base[np.minimum(place, base.size - 1)], base[0]), jnp.int32)


def slot_places(slots):
    """The place among the base columns that a slot holds; integers of any kind of array."""
    return (slots & ~15) + ((slots >> 1) & 6) + ((slots & 1) << 3) + ((slots >> 1) & 1)


def quantize(
    x: jax.Array,
    columns: jax.Array | None = None,
    index: jax.Array | None = None,
    *,
    bits: int,
    symmetric: bool,
    mode: Mode = "kernel",
) -> Quantized:
    """Equations and shapes in `pallas_kernels.activation_quantize`.

    x [M, K] float; index int32 [k] the kept columns and columns = slot_columns(K, index) beside it, or both None.
    """
    width, kept = x.shape[1], 0 if index is None else index.shape[0]
    places = slot_places(jnp.arange(num_slots(width, kept), dtype=jnp.int32))
    real = places < width - kept
    base = x[:, jnp.where(real, places, 0) if columns is None else columns].astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(base), axis=1, keepdims=True)
    low, high = jnp.min(base, axis=1, keepdims=True), jnp.max(base, axis=1, keepdims=True)
    low, high = jnp.where(finite, low, 0.0), jnp.where(finite, high, 0.0)
    half, steps = 2 ** (bits - 1), 2**bits - 1
    # By a divisor that it knows XLA would multiply with the rounded reciprocal.
    divisor = jnp.where(finite, jnp.float32(half - 1 if symmetric else steps), 1.0)
    offsets = None
    if symmetric:
        scales = _positive(jnp.maximum(-low, high) / divisor)
        codes = jnp.clip(jnp.round(base / scales), -half, half - 1)
    elif mode == "kernel":
        scales = jnp.maximum(_spacing(low, high, divisor), SMALLEST_SCALE)
        codes = jnp.clip(jnp.round((base - low) / scales), 0, steps) - half
        offsets = low + half * scales
    else:
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        scales = _positive(_spacing(low, high, divisor))
        zeros = jnp.clip(jnp.round(-low / scales), 0, steps)
        codes = jnp.clip(jnp.round(base / scales) + zeros, 0, steps) - half
        offsets = scales * (half - zeros)
    codes = jnp.where(finite & real, codes, 0.0).astype(jnp.int8)
    scales = jnp.where(finite, scales, jnp.nan)
    offsets = None if offsets is None else jnp.where(finite, offsets, jnp.nan)
    return Quantized(codes, scales, offsets, None if index is None else x[:, index])


def _spacing(low: jax.Array, high: jax.Array, steps: jax.Array) -> jax.Array:
    """(high - low) / steps, also where the difference leaves float32."""
    whole = high - low
    return jnp.where(jnp.isfinite(whole), whole / steps, high / steps - low / steps)


def _positive(scales: jax.Array) -> jax.Array:
    return jnp.where(scales == 0, 1.0, jnp.maximum(scales, TINY))
