"""Affine grids: evenly spaced levels shared by a group of weights.

    W ~ scale * (code - zero)        code, zero integers in [0, 2**bits - 1]

Symmetric grids store no zero: it is 2**(bits - 1). Asymmetric ranges are widened to include the value 0, so a zero
weight stays zero on every grid.

Layouts, with W [N, K] (N outputs, K inputs):

    group_axis "in"   group_size consecutive columns of a row share a scale     scales, zeros [N, ceil(K / group_size)]
    group_axis "out"  group_size consecutive rows of a column share a scale     scales, zeros [ceil(N / group_size), K]

`group_size=None` means the whole row (or column). A tail shorter than group_size is a group of its own.

Ranges. Asymmetric: scale = (max - min) / (2**bits - 1) after widening to 0. Symmetric: with h = 2**(bits - 1) the scale
is whichever of absmax / (h - 1), absmax / (h - 1/2), absmax / h has the lowest squared error in its group. The first
never clips (the textbook choice, QUIK's too) but leaves code 0 idle; the others accept half a step or a whole one of
clipping at one end for a finer grid. Mean squared error on Gaussian groups of 128, in units of the variance:

    bits    h - 1     h - 1/2   h         best of three per group
    2       0.591     0.305     0.189     0.189
    3       0.0756    0.0568    0.0455    0.0454
    4       0.0139    0.0123    0.0112    0.0110

Clip search shrinks the min-max range (symmetric: absmax / (h - 1)) by p = 1.00, 0.99, ... 0.21 and keeps the p with
the least sum |W_hat - W|**2.4, the larger p on ties (QUIK, arXiv 2310.09259, and its released weight quantizer).

Scales are rounded to the type they will be stored in before any code is computed, so that what is measured here is what
a checkpoint holds. All inputs must be finite. No function here looks at values in Python except `storage_dtype` and
`choose_scale_dtype`, which run outside `jax.jit`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

GroupAxis = Literal["in", "out"]

CLIP_STEPS = 80
CLIP_EXPONENT = 2.4


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales", "zeros"],
    meta_fields=["bits", "group_size", "group_axis"],
)
@dataclasses.dataclass(frozen=True)
class Grid:
    """Levels of a matrix [N, K]: scales and zeros [N, G] ("in") or [G, K] ("out"); zeros int32, None when symmetric."""

    scales: jax.Array
    zeros: jax.Array | None
    bits: int
    group_size: int | None
    group_axis: GroupAxis


def check_grid(bits: int, group_size: int | None, group_axis: str) -> int | None:
    """The group size with -1 read as None; ValueError for anything that no grid has."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} has no affine grid here; expected 2 to 8")
    if group_axis not in ("in", "out"):
        raise ValueError(f"group_axis={group_axis!r} is unknown; expected 'in' (along a row) or 'out' (along a column)")
    if group_size in (None, -1):
        return None
    if group_size < 1:
        raise ValueError(f"group_size={group_size} is no size; expected a positive number, or None for whole rows")
    return group_size


def storage_dtype(*values: Any) -> np.dtype:
    """float16 if every nonzero entry of `values` lies in its normal range [6.1e-5, 65504], float32 otherwise.

    Needs concrete arrays: the answer is a dtype, which `jax.jit` must know beforehand. float16 keeps 11 significant
    bits, bfloat16 only 8, so the choice is between float16 and no rounding at all.
    """
    limits = jnp.finfo(jnp.float16)
    for value in values:
        magnitude = jnp.abs(jnp.asarray(value))
        inside = (magnitude == 0) | ((magnitude >= float(limits.tiny)) & (magnitude <= float(limits.max)))
        if not bool(jnp.all(inside)):
            return np.dtype(np.float32)
    return np.dtype(np.float16)


def half_if_it_fits(values: jax.Array) -> np.dtype:
    """float16 unless the range leaves its normal range: for tables and kept weights, not for scales.

    Values near 0 may be subnormal: their absolute error, 3e-8, is nothing beside a largest one that is normal by a
    factor of 64. Needs concrete arrays.
    """
    largest = float(jnp.max(jnp.abs(values.astype(jnp.float32)), initial=0.0))
    limits = jnp.finfo(jnp.float16)
    fits = largest == 0 or 64 * float(limits.tiny) < largest <= float(limits.max)
    return np.dtype(np.float16 if fits else np.float32)


def round_to_storage(x: jax.Array, dtype: Any) -> jax.Array:
    """x as float32 values that `dtype` represents exactly; values beyond its range become its largest."""
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32), -largest, largest).astype(dtype).astype(jnp.float32)


def choose_scale_dtype(
    W: jax.Array, bits: int, group_size: int | None = None, symmetric: bool = True, group_axis: GroupAxis = "in"
) -> np.dtype:
    """The `storage_dtype` of the scales that `fit_grid` finds for a concrete W [N, K]."""
    return storage_dtype(fit_grid(W, bits, group_size, symmetric, group_axis, scale_dtype=jnp.float32).scales)


@partial(jax.jit, static_argnames=("bits", "group_size", "symmetric", "group_axis", "clip_search", "scale_dtype"))
def fit_grid(
    W: jax.Array,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    group_axis: GroupAxis = "in",
    clip_search: bool = False,
    scale_dtype: Any = jnp.float16,
) -> Grid:
    """Min-max grid of W [N, K] (any float type), optionally with clip search; scales come back in `scale_dtype`.

    Every scale is positive and finite. A group of zeros gets scale 1 and decodes to zeros. Raises ValueError for bits
    outside 2..8, an unknown axis, or a group size below 1.
    """
    group_size = check_grid(bits, group_size, group_axis)
    x, valid = grouped(W.astype(jnp.float32), group_size, group_axis)
    low, high = jnp.min(x, axis=-1), jnp.max(x, axis=-1)

    def candidate(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        if clip_search:
            keep = (100.0 - step) / 100.0
            return _range_to_scale(low * keep, high * keep, bits, symmetric, 1.0, scale_dtype)
        return _range_to_scale(low, high, bits, symmetric, 1.0 - 0.5 * step, scale_dtype)

    count, exponent = (CLIP_STEPS, CLIP_EXPONENT) if clip_search else (3 if symmetric else 1, 2.0)
    error = rounding_error(x, valid, bits, exponent)

    scale, zero = candidate(jnp.float32(0))
    if count > 1:

        def step(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            new_scale, new_zero = candidate(i.astype(jnp.float32))
            new_error = error(new_scale, new_zero)
            better = new_error < best[2]
            return (
                jnp.where(better, new_scale, best[0]),
                jnp.where(better, new_zero, best[1]),
                jnp.where(better, new_error, best[2]),
            )

        scale, zero, _ = jax.lax.fori_loop(1, count, step, (scale, zero, error(scale, zero)))
    if group_axis == "out":
        scale, zero = scale.T, zero.T
    return Grid(scale.astype(scale_dtype), None if symmetric else zero, bits, group_size, group_axis)


def quantize_to_grid(W: jax.Array, grid: Grid) -> jax.Array:
    """Nearest codes [N, K] int32 of W [N, K] on `grid`; ties go to the even level, values outside to the end levels."""
    scale, zero = spread_grid(grid, W.shape)
    return _round(W.astype(jnp.float32), scale, zero, grid.bits).astype(jnp.int32)


def dequantize_grid(codes: jax.Array, grid: Grid) -> jax.Array:
    """scale * (code - zero) as float32 [N, K]."""
    scale, zero = spread_grid(grid, codes.shape)
    return scale * (codes.astype(jnp.int32) - zero).astype(jnp.float32)


def spread_grid(grid: Grid, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(scale float32, zero int32) for every entry of a matrix of `shape` [N, K]; zero may be a scalar array."""
    axis = 1 if grid.group_axis == "in" else 0
    group = jnp.arange(shape[axis]) // (grid.group_size or shape[axis])
    scale = jnp.take(grid.scales.astype(jnp.float32), group, axis=axis)
    if grid.zeros is None:
        return scale, jnp.int32(2 ** (grid.bits - 1))
    return scale, jnp.take(grid.zeros, group, axis=axis)


def rounding_error(
    x: jax.Array, valid: jax.Array, bits: int, exponent: float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """error(scale, zero) of groups x [lines, G, size], valid as in `grouped`; scale, zero and the result [lines, G].

    It is sum |x_hat - x|**exponent, in units of max |x|**exponent of the group.
    """
    size = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), float(jnp.finfo(jnp.float32).tiny))[..., None]

    def error(scale: jax.Array, zero: jax.Array) -> jax.Array:
        scale, zero = scale[..., None], zero[..., None]
        codes = _round(x, scale, zero, bits)
        # Relative to the group's size: a power of a tiny or huge difference would leave float32's range.
        distance = jnp.abs(scale * (codes - zero.astype(jnp.float32)) - x) / size
        power = distance * distance if exponent == 2.0 else distance**exponent
        return jnp.sum(jnp.where(valid, power, 0.0), axis=-1)

    return error


def grouped(W: jax.Array, group_size: int | None, group_axis: GroupAxis) -> tuple[jax.Array, jax.Array]:
    """W as [lines, G, group_size] with the tail padded by zeros, and the mask [G, group_size] of real entries.

    Zeros are safe padding: every range includes 0 anyway.
    """
    lines = W if group_axis == "in" else W.T
    length = lines.shape[1]
    size = group_size or length
    groups = -(-length // size)
    padded = jnp.pad(lines, ((0, 0), (0, groups * size - length)))
    valid = (jnp.arange(groups * size) < length).reshape(groups, size)
    return padded.reshape(lines.shape[0], groups, size), valid


def _range_to_scale(
    low: jax.Array, high: jax.Array, bits: int, symmetric: bool, idle: jax.Array | float, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """(scale, zero) of ranges [low, high]; `idle` is the 1, 1/2 or 0 of the three symmetric choices."""
    half, steps = 2 ** (bits - 1), 2**bits - 1
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    if symmetric:
        scale = jnp.maximum(-low, high) / (half - idle)
    else:
        # Divided before the difference: high - low may overflow where the scale does not.
        scale = high / steps - low / steps
    # A scale that its type cannot hold would be 0, so it becomes the smallest normal one. Empty groups get 1.
    scale = round_to_storage(jnp.maximum(scale, float(jnp.finfo(dtype).tiny)), dtype)
    scale = jnp.where((low == 0) & (high == 0), 1.0, scale)
    if symmetric:
        return scale, jnp.full(scale.shape, half, jnp.int32)
    return scale, jnp.clip(jnp.round(-low / scale), 0, steps).astype(jnp.int32)


def _round(x: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> jax.Array:
    return jnp.clip(jnp.round(x / scale) + zero.astype(jnp.float32), 0, 2**bits - 1)
