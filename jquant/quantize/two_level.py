"""Two-level scales: the scales of a row's groups are whole multiples of one step.

    scales[n, g] = step[n] * m[n, g],     m whole, 1 to 16     (symmetric grids of up to 4 bits, groups of inputs)

(code - 2**(bits - 1)) * m is then an int8, and exact in bfloat16. So a kernel sums the whole row, in int32 beside 8-bit
inputs x, and applies one scale, as if there were no groups:

    sum_g scales[n, g] sum_{k in g} (code - 2**(bits - 1)) x   =   step[n] sum_k (code - 2**(bits - 1)) m x

The idea is QServe's progressive group quantization (Lin et al., arXiv 2405.04532, section 4.2). There the row is
rounded to int8 and then again, in groups, to 4 bits; here W is rounded once, on a grid that was searched.

Search. From the free scales s [N, G] of `fit_grid`, a row tries the steps max_g s * f / 16, f = 0.70, 0.75, ... 1.40.
At each step a group tries the multiple nearest to s / step, the one above and the two below, and keeps the one with
the least error of its own; the row keeps the step with the least sum. Errors are measured as in `fit_grid`. The search
pays for the coarser choice: a free scale is one of three, none of them below absmax / 2**(bits - 1), and often a
smaller one is better. Multiples lose where one entry of a row is so large that the other groups are left with 1 or 2,
and against clip search, which tries 80 scales. Squared error in units of what free scales leave, both with the same
options (512 x 4096 numbers, and the mean of the 210 layers of SmolLM2-135M):

                                      groups of 128               groups of 64
                                  4 bits  3 bits  2 bits      4 bits  3 bits  2 bits
    SmolLM2-135M                  0.909   0.844   0.798       0.938   0.899   0.853
    normal                        0.938   0.865   0.815       0.972   0.916   0.867
    Student's t of 4 degrees      0.939   0.813   0.742       0.998   0.909   0.822
    normal, an entry of 20 a row  1.012   0.946   0.837       1.087   1.017   0.906
    normal, an entry of 30 a row  1.018   0.945   1.006       1.091   1.018   1.106
    normal, clip search           1.016   1.005   1.001       1.029   1.009   1.002
    Student's t, clip search      1.023   1.012   1.015       1.050   1.025   1.027

Storage. The format does not change: the products are stored, in float16 or float32. They are exact, so step and m can
be found again: steps have 7 significant bits and multiples 4, float16 has 11. Steps are normal numbers of that type.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.format.spec import TWO_LEVEL_BITS
from jquant.quantize.grid import (
    CLIP_EXPONENT,
    Grid,
    GroupAxis,
    check_grid,
    fit_grid,
    grouped,
    rounding_error,
    storage_dtype,
)

LARGEST_MULTIPLE = 16
STEP_BITS = 7  # significant ones: with the 4 of a multiple, the 11 of float16
STEPS, SMALLEST_STEP, STEP_SPACING = 15, 0.7, 0.05  # candidates, in units of max_g s / 16
ABOVE, MULTIPLES = 1, 4  # candidates of a multiple: so many, from so far above the nearest


def choose_two_level_dtype(W: jax.Array, bits: int, group_size: int) -> np.dtype:
    """float16 if it holds, as normal numbers, all that `fit_two_level` may find for a concrete W [N, K], else float32.

    That is from the smallest step to 16 of the largest, by the ranges without clip search; where clipping leads to
    steps below float16's normal numbers, its smallest one is taken.
    """
    largest = jnp.max(_free_scales(W, bits, group_size, False), axis=1)
    smallest, last = (_candidate(largest, i, jnp.float32) for i in (0, STEPS - 1))
    return storage_dtype(smallest, LARGEST_MULTIPLE * last)


@partial(jax.jit, static_argnames=("bits", "group_size", "symmetric", "group_axis", "clip_search", "scale_dtype"))
def fit_two_level(
    W: jax.Array,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    group_axis: GroupAxis = "in",
    clip_search: bool = False,
    scale_dtype: Any = jnp.float16,
) -> Grid:
    """`fit_grid` of W [N, K] with scales [N, G] that are step * m; the arguments are those of `fit_grid`.

    Every scale is positive and finite. A row of zeros gets step 1; a group of zeros m = 1, as does a group whose free
    scale is far below the step: it then loses more than with free scales, which reports show. Raises ValueError for
    grids and types that have no two-level scales.
    """
    group_size = _check(bits, group_size, symmetric, group_axis, scale_dtype)
    free = _free_scales(W, bits, group_size, clip_search)
    x, valid = grouped(W.astype(jnp.float32), group_size, "in")
    exponent = CLIP_EXPONENT if clip_search else 2.0
    error = rounding_error(x, valid, bits, exponent)
    zero = jnp.full(free.shape, 2 ** (bits - 1), jnp.int32)
    size = jnp.max(jnp.abs(x), axis=-1)
    row = jnp.max(size, axis=1, keepdims=True)
    weight = (size / jnp.where(row == 0, 1.0, row)) ** exponent  # of a group's relative error in the row's
    largest = jnp.max(free, axis=1, keepdims=True)

    def try_step(i: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step = _candidate(largest, i, scale_dtype)
        nearest = jnp.round(free / step)

        def try_multiple(j: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            multiple = jnp.clip(nearest + (ABOVE - j).astype(jnp.float32), 1, LARGEST_MULTIPLE)
            return _better(best, (error(step * multiple, zero), multiple))

        start = jnp.full_like(free, jnp.inf), jnp.ones_like(free)
        each, multiple = jax.lax.fori_loop(0, MULTIPLES, try_multiple, start)
        total = jnp.sum(weight * each, axis=1, keepdims=True)
        return _better(best, (total, step * multiple))

    start = jnp.full_like(largest, jnp.inf), jnp.ones_like(free)
    _, scales = jax.lax.fori_loop(0, STEPS, try_step, start)
    return Grid(scales.astype(scale_dtype), None, bits, group_size, "in")


def _free_scales(W: jax.Array, bits: int, group_size: int, clip_search: bool) -> jax.Array:
    """The scales [N, G] of `fit_grid` in float32, 0 for groups of zeros: they must not decide a row's step."""
    scales = fit_grid(W, bits, group_size, clip_search=clip_search, scale_dtype=jnp.float32).scales
    x, _ = grouped(W.astype(jnp.float32), group_size, "in")
    return jnp.where(jnp.all(x == 0, axis=-1), 0.0, scales)


def _candidate(largest: jax.Array, i: jax.Array | int, dtype: Any) -> jax.Array:
    """Step i of 0 ... STEPS - 1 for rows whose largest free scale is given: of 7 bits, normal, 16 of them finite.

    A row of zeros has step 1.
    """
    limits = jnp.finfo(dtype)
    factor = SMALLEST_STEP + STEP_SPACING * jnp.asarray(i).astype(jnp.float32)
    most = (2.0 - 2.0 ** (1 - STEP_BITS)) * 2.0 ** (limits.maxexp - 1) / LARGEST_MULTIPLE
    step = largest * (factor / LARGEST_MULTIPLE)
    step = jax.lax.reduce_precision(step, exponent_bits=8, mantissa_bits=STEP_BITS - 1)
    return jnp.where(largest == 0, 1.0, jnp.clip(step, float(limits.tiny), most))


def _better(best: tuple[jax.Array, ...], new: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Entry by entry the tuple whose first member, the error, is less; the earlier where equal."""
    less = new[0] < best[0]
    return tuple(jnp.where(less, a, b) for a, b in zip(new, best, strict=True))


def _check(bits: int, group_size: int | None, symmetric: bool, group_axis: str, scale_dtype: Any) -> int:
    group_size = check_grid(bits, group_size, group_axis)
    if group_size is None or group_axis != "in" or not symmetric or bits > TWO_LEVEL_BITS:
        raise ValueError(
            f"two-level scales belong to symmetric grids of up to {TWO_LEVEL_BITS} bits in groups of inputs; got "
            f"bits={bits}, group_size={group_size}, symmetric={symmetric}, group_axis={group_axis!r}"
        )
    if jnp.finfo(scale_dtype).nmant < 10:
        raise ValueError(f"a step times a multiple has 11 significant bits; scale_dtype={scale_dtype} has fewer")
    return group_size
