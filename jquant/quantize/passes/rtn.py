"""Round to nearest: every weight takes the closest level of its group's grid. No data, no interaction between columns.

    codes = clip(round(W / scale) + zero, 0, 2**bits - 1)

It is the base every other pass is compared with, and what they fall back to when their statistics are unusable.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.quantize.grid import Grid, GroupAxis, fit_grid, quantize_to_grid
from jquant.quantize.two_level import fit_two_level


@partial(
    jax.jit,
    static_argnames=("bits", "group_size", "symmetric", "group_axis", "clip_search", "scale_dtype", "two_level"),
)
def rtn(
    W: jax.Array,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    group_axis: GroupAxis = "in",
    clip_search: bool = False,
    scale_dtype: Any = jnp.float16,
    two_level: bool = False,
) -> tuple[jax.Array, Grid]:
    """(codes [N, K] int32, grid) of W [N, K]. Arguments and errors are those of `fit_grid`, or of `fit_two_level`."""
    fit = fit_two_level if two_level else fit_grid
    grid = fit(W, bits, group_size, symmetric, group_axis, clip_search, scale_dtype)
    return quantize_to_grid(W, grid), grid
