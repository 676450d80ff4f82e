"""Round to nearest."""

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.quantize.grid import dequantize_grid, fit_grid, spread_grid
from jquant.quantize.passes.rtn import rtn
from jquant.quantize.two_level import fit_two_level


@pytest.mark.parametrize(
    ("axis", "symmetric", "two_level"),
    [("in", True, False), ("in", False, False), ("out", True, False), ("out", False, False), ("in", True, True)],
)
def test_no_other_code_is_nearer(axis, symmetric, two_level):
    W = jnp.asarray(np.random.default_rng(0).normal(size=(12, 20)), jnp.float32)
    codes, grid = rtn(W, 3, 8, symmetric, axis, two_level=two_level)
    scale, zero = (np.broadcast_to(np.asarray(a, np.float64), W.shape) for a in spread_grid(grid, W.shape))
    levels = scale[..., None] * (np.arange(8) - zero[..., None])
    best = np.abs(levels - np.asarray(W, np.float64)[..., None]).min(axis=-1)
    ours = np.abs(np.asarray(dequantize_grid(codes, grid), np.float64) - np.asarray(W, np.float64))
    np.testing.assert_allclose(ours, best, rtol=1e-6, atol=1e-7)  # products of float32


def test_the_grid_is_that_of_fit_grid():
    W = jnp.asarray(np.random.default_rng(1).normal(size=(5, 32)), jnp.float32)
    np.testing.assert_array_equal(rtn(W, 4, 16)[1].scales, fit_grid(W, 4, 16).scales)
    np.testing.assert_array_equal(rtn(W, 4, 16, two_level=True)[1].scales, fit_two_level(W, 4, 16).scales)
