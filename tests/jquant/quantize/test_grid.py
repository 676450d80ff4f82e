"""Affine grids: layouts, ranges, rounding and the corner values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.quantize.grid import (
    choose_scale_dtype,
    dequantize_grid,
    fit_grid,
    quantize_to_grid,
    round_to_storage,
    storage_dtype,
)


def gaussian(n, k, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, k)), jnp.float32)


def decoded(W, *args, **options):
    grid = fit_grid(W, *args, **options)
    codes = quantize_to_grid(W, grid)
    assert codes.dtype == jnp.int32 and int(codes.min()) >= 0 and int(codes.max()) < 2**grid.bits
    return dequantize_grid(codes, grid)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("size", "axis", "shape"),
    [(None, "in", (6, 1)), (-1, "in", (6, 1)), (8, "in", (6, 3)), (None, "out", (1, 20)), (4, "out", (2, 20))],
)
def test_groups_have_the_layout_of_their_axis(symmetric, size, axis, shape):
    grid = fit_grid(gaussian(6, 20), 4, size, symmetric, axis)
    assert grid.scales.shape == shape and grid.scales.dtype == jnp.float16
    assert (grid.zeros is None) == symmetric
    if not symmetric:
        assert grid.zeros.shape == shape and grid.zeros.dtype == jnp.int32
        assert int(grid.zeros.min()) >= 0 and int(grid.zeros.max()) <= 15


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_out_groups_are_in_groups_of_the_transpose(symmetric, clip):
    W = gaussian(20, 12)
    across = decoded(W, 3, 8, symmetric, "out", clip)
    along = decoded(W.T, 3, 8, symmetric, "in", clip).T
    np.testing.assert_array_equal(across, along)


@pytest.mark.parametrize("symmetric", [True, False])
def test_ragged_tail_is_a_group_of_its_own(symmetric):
    W = gaussian(5, 20)
    whole = decoded(W, 4, 8, symmetric)
    np.testing.assert_array_equal(whole[:, 16:], decoded(W[:, 16:], 4, None, symmetric))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_asymmetric_error_is_at_most_half_a_step(bits):
    W = gaussian(8, 64)
    grid = fit_grid(W, bits, 16, False)
    error = jnp.abs(decoded(W, bits, 16, False) - W)
    # Rounding the zero shifts the levels by up to half a step, so an end may be clipped. float16 adds 2**-11.
    limit = 1.01 * jnp.repeat(grid.scales.astype(jnp.float32), 16, axis=1)
    assert bool(jnp.all(error <= limit))
    inside = (quantize_to_grid(W, grid) > 0) & (quantize_to_grid(W, grid) < 2**bits - 1)
    assert bool(jnp.all(jnp.where(inside, error <= 0.51 * limit, True)))


def test_zero_is_on_every_grid():
    W = jnp.abs(gaussian(4, 16)) + 1.0
    W = W.at[:, 3].set(0.0)
    for symmetric in (True, False):
        assert bool(jnp.all(decoded(W, 4, None, symmetric)[:, 3] == 0))


def test_error_falls_with_bits():
    W = gaussian(16, 128)
    for symmetric in (True, False):
        errors = [float(jnp.sum((decoded(W, b, 32, symmetric) - W) ** 2)) for b in (2, 3, 4, 5, 6, 8)]
        assert all(b < a for a, b in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_choice_is_never_worse_than_absmax(bits):
    W = gaussian(32, 128)
    half = 2 ** (bits - 1)
    for divisor in (half - 1, half - 0.5, half):
        scale = round_to_storage(jnp.max(jnp.abs(W), axis=1, keepdims=True) / divisor, jnp.float16)
        plain = jnp.clip(jnp.round(W / scale), -half, half - 1) * scale
        ours = jnp.sum((decoded(W, bits, None, True) - W) ** 2, axis=1)
        # float32 sums of the same terms in another order
        assert bool(jnp.all(ours <= jnp.sum((plain - W) ** 2, axis=1) * (1 + 1e-5)))


def test_symmetric_constant_groups_are_exact():
    W = jnp.asarray([[0.875] * 8, [-3.5] * 8, [7.0] * 8], jnp.float32)
    np.testing.assert_array_equal(decoded(W, 4), W)


def test_asymmetric_constant_groups_are_exact_where_the_scale_is_storable():
    W = jnp.asarray([[0.9375] * 8, [-15.0] * 8], jnp.float32)  # 15 steps of 1/16 and of 1
    np.testing.assert_array_equal(decoded(W, 4, None, False), W)


def test_clip_search_matches_a_plain_loop():
    W = np.asarray(gaussian(7, 96, 3), np.float64)
    W[:, 0] *= 4
    s0 = np.abs(W).max(axis=1) / 7
    best, scale = np.full(7, np.inf), np.zeros(7)
    for step in range(80):
        s = (s0 * (1 - step / 100)).astype(np.float16).astype(np.float64)
        error = (np.abs(np.clip(np.round(W / s[:, None]), -8, 7) * s[:, None] - W) ** 2.4).sum(axis=1)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, s, scale)
    grid = fit_grid(jnp.asarray(W, jnp.float32), 4, None, True, "in", True)
    Q = np.asarray(dequantize_grid(quantize_to_grid(jnp.asarray(W, jnp.float32), grid), grid), np.float64)
    ours = (np.abs(Q - W) ** 2.4).sum(axis=1)
    np.testing.assert_allclose(ours, best, rtol=1e-4)  # float32 may prefer a neighbour of equal error
    assert (grid.scales[:, 0] < s0.astype(np.float16)).any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-30, 1e-7, 3e4, -7e4, 3e38])
@pytest.mark.parametrize("clip", [True, False])
def test_extreme_values_stay_finite(symmetric, value, clip):
    W = jnp.full((2, 8), value, jnp.float32).at[1, 1].set(-value)
    for dtype in (jnp.float16, jnp.float32, jnp.bfloat16):
        grid = fit_grid(W, 4, 4, symmetric, "in", clip, dtype)
        Q = dequantize_grid(quantize_to_grid(W, grid), grid)
        assert bool(jnp.all(jnp.isfinite(grid.scales))) and bool(jnp.all(grid.scales > 0))
        assert bool(jnp.all(jnp.isfinite(Q)))
        if value == 0.0:
            assert bool(jnp.all(Q == 0))
        if dtype == jnp.float32 and abs(value) > 1e-35:
            # An asymmetric range [-v, v] has no level on v itself: half a step of 2 v / 15 is lost, more if clipped.
            assert bool(jnp.all(jnp.abs(Q / value - W / value) <= (0.15 if clip else 0.07)))


def test_one_tiny_group_does_not_disturb_its_neighbours():
    W = gaussian(2, 16).at[:, :8].multiply(1e-30)
    np.testing.assert_array_equal(decoded(W, 4, 8)[:, 8:], decoded(W[:, 8:], 4, 8))


def test_scales_hold_exactly_what_is_stored():
    grid = fit_grid(gaussian(4, 32), 4, 8, scale_dtype=jnp.float32)
    half = fit_grid(gaussian(4, 32), 4, 8)
    assert half.scales.dtype == jnp.float16 and grid.scales.dtype == jnp.float32
    np.testing.assert_allclose(half.scales.astype(jnp.float32), grid.scales, rtol=2**-11)


def test_storage_dtype_follows_the_range():
    assert storage_dtype(jnp.asarray([0.0, 1.0, -65504.0, 6.2e-5])) == np.float16
    assert storage_dtype(jnp.asarray([1.0, 7e4])) == np.float32
    assert storage_dtype(jnp.asarray([1.0]), jnp.asarray([1e-6])) == np.float32
    assert choose_scale_dtype(gaussian(4, 32), 4, 8) == np.float16
    assert choose_scale_dtype(gaussian(4, 32) * 1e-6, 4, 8) == np.float32
    assert choose_scale_dtype(jnp.zeros((4, 32)), 4, 8) == np.float16


def test_vmap_equals_a_loop():
    W = jnp.stack([gaussian(6, 20, s) for s in range(3)])
    batch = jax.vmap(lambda w: fit_grid(w, 3, 8, False))(W)
    for i in range(3):
        one = fit_grid(W[i], 3, 8, False)
        np.testing.assert_array_equal(batch.scales[i], one.scales)
        np.testing.assert_array_equal(batch.zeros[i], one.zeros)


@pytest.mark.parametrize(
    ("arguments", "word"), [((9,), "bits=9"), ((4, 0), "group_size=0"), ((4, 8, True, "up"), "group_axis")]
)
def test_bad_arguments_say_what_was_expected(arguments, word):
    with pytest.raises(ValueError, match=word):
        fit_grid(gaussian(2, 8), *arguments)
