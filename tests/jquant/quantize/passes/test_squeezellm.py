"""Dense-and-sparse split, the global outlier range, and the sensitivity-weighted fit."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.quantize.codebook import codebook_lookup, fit_codebook
from jquant.quantize.passes.squeezellm import (
    fit,
    outlier_range,
    outlier_threshold,
    quartiles,
    report,
    residual_values,
    split,
)


def fit_report(W, f, fitted_with, bits, mask):
    """The report, against f, of a fit that was weighted with `fitted_with`."""
    codebook, codes = fit(W, fitted_with, bits, mask)
    return report(W, f, codebook, codes, mask)


def layer(n=32, k=96, seed=0):
    rng = np.random.default_rng(seed)
    W = (0.02 * rng.standard_t(4, size=(n, k))).astype(np.float32)
    return jnp.asarray(W), jnp.asarray((10 ** rng.uniform(-6, 0, size=(n, k))).astype(np.float32))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (16, 33), (64, 64)])
def test_quartiles_are_those_of_numpy(shape):
    rng = np.random.default_rng(shape[1])
    for W in (rng.normal(size=shape), rng.integers(-2, 3, size=shape), np.zeros(shape), rng.normal(size=shape) - 5):
        W = W.astype(np.float32)
        np.testing.assert_allclose(quartiles(jnp.asarray(W)), np.percentile(W, [25, 75]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fraction", [0.0005, 0.004, 0.05])
def test_one_range_meets_the_model_wide_fraction(fraction):
    matrices = [layer(64, 96, s)[0] * scale for s, scale in enumerate((1.0, 30.0, 1e-3))]
    R = outlier_range(matrices, fraction)
    kept = [split(W, jnp.ones_like(W), 0.0, R).outliers for W in matrices]
    total = sum(W.size for W in matrices)
    assert abs(sum(int(k.sum()) for k in kept) / total - fraction) <= 1 / total + 1e-6
    assert 0 < R < 32


def test_range_comes_from_streams_too():
    matrices = [layer(seed=s)[0] for s in range(3)]
    assert outlier_range(lambda: iter(matrices), 0.01) == outlier_range(matrices, 0.01)


def test_range_beyond_the_first_bracket_is_found():
    W = jnp.concatenate([layer()[0], jnp.asarray([[1e4, -1e4, 1e5, 1e6] * 24], jnp.float32)])
    R = outlier_range([W], 24 / W.size)  # the 24 entries of 1e6
    assert R > 32
    assert int(split(W, jnp.ones_like(W), 0.0, R).outliers.sum()) == 24


def test_no_outliers_asked_none_found():
    W, f = layer()
    assert outlier_range([W], 0.0) == math.inf
    assert not bool(split(W, f, 0.0, math.inf).mask.any())


def test_matrix_without_spread_has_no_outliers():
    W = jnp.zeros((8, 8)).at[0, 0].set(1.0)
    assert not bool(split(W, jnp.zeros((8, 8)), 0.0, 1.8).mask.any())
    assert math.isfinite(outlier_range([W, layer()[0]], 0.01))


def test_threshold_is_the_larger_side():
    assert float(outlier_threshold(jnp.float32(-1.0), jnp.float32(3.0), 2.0)) == 11.0
    assert float(outlier_threshold(jnp.float32(-3.0), jnp.float32(1.0), 2.0)) == 11.0


@pytest.mark.parametrize("fraction", [0.0, 1e-5, 0.0005, 0.01])
def test_sensitive_count_is_exact_and_sets_are_disjoint(fraction):
    W, f = layer()
    parts = split(W, f, fraction, 1.8)
    count = round(fraction * W.size)
    assert int(parts.sensitive.sum()) == count
    assert not bool((parts.sensitive & parts.outliers).any())
    if count:
        assert float(jnp.min(jnp.where(parts.sensitive, f, jnp.inf))) >= float(
            jnp.max(jnp.where(parts.sensitive, 0, f))
        )
    q1, q3 = quartiles(W)
    T = outlier_threshold(q1, q3, 1.8)
    np.testing.assert_array_equal(parts.mask, parts.sensitive | (jnp.abs(W) >= T))


def test_equal_sensitivities_go_to_the_lower_index():
    W, _ = layer()
    flat = split(W, jnp.ones_like(W), 0.01).sensitive.reshape(-1)
    np.testing.assert_array_equal(flat, jnp.arange(W.size) < round(0.01 * W.size))


def test_zero_fisher_is_never_sensitive():
    W, f = layer()
    assert not bool(split(W, jnp.zeros_like(W), 0.01).mask.any())
    few = jnp.zeros_like(W).at[3, 4].set(1.0)
    assert int(split(W, few, 0.01).sensitive.sum()) == 1
    assert not bool(split(W, f.at[0, 0].set(jnp.nan), 0.01).sensitive.any())


@pytest.mark.parametrize("bits", [3, 4])
def test_codebook_plus_residual_restores_what_was_kept(bits):
    W, f = layer()
    mask = split(W, f, 0.0005, 1.8).mask
    for dtype in (jnp.float32, jnp.float16):
        codebook, codes = fit(W, f, bits, mask, dtype)
        assert codebook.dtype == dtype
        residual = residual_values(W, codebook, codes, mask)
        whole = codebook_lookup(codebook, codes) + residual
        # one float32 subtraction and one addition
        np.testing.assert_allclose(whole[mask], W[mask], rtol=3e-7)
        assert bool(jnp.all(jnp.where(mask, True, residual == 0)))


def test_kept_entries_have_the_code_nearest_to_zero():
    W, f = layer()
    mask = split(W, f, 0.0005, 1.8).mask
    codebook, codes = fit(W, f, 3, mask)
    nearest = jnp.min(jnp.abs(codebook), axis=1, keepdims=True)
    got = jnp.abs(codebook_lookup(codebook, codes))
    np.testing.assert_array_equal(jnp.where(mask, got, 0), jnp.where(mask, nearest, 0))


def test_nothing_kept_is_the_plain_codebook():
    W, f = layer()
    for one, two in zip(fit(W, f, 3), fit_codebook(W, f, 3), strict=True):
        np.testing.assert_array_equal(one, two)


def test_sparse_part_lowers_the_error_and_so_do_bits():
    W, f = layer(seed=3)
    nothing = jnp.zeros(W.shape, bool)
    errors = [fit_report(W, f, f, bits, nothing).weighted_error for bits in (2, 3, 4)]
    assert errors[0] > errors[1] > errors[2] > 0
    mask = split(W, f, 0.0005, 1.8).mask
    sparse = fit_report(W, f, f, 3, mask)
    assert sparse.weighted_error < errors[1]
    assert sparse.kept == int(mask.sum()) and sparse.reason is None


def test_sensitivity_weighting_trades_plain_error_for_weighted_error():
    W, f = layer(seed=4)
    nothing = jnp.zeros(W.shape, bool)
    weighted = fit_report(W, f, f, 3, nothing)
    plain = fit_report(W, f, jnp.ones_like(f), 3, nothing)
    assert weighted.weighted_error < plain.weighted_error
    assert weighted.relative_error > plain.relative_error


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_useless_fisher_means_unweighted_and_is_reported(bad):
    W, f = layer()
    given = jnp.zeros_like(f) if bad == 0.0 else f.at[1, 1].set(bad)
    codebook, codes = fit(W, given, 3)
    np.testing.assert_array_equal(codebook, fit(W, jnp.ones_like(f), 3)[0])
    found = report(W, given, codebook, codes, jnp.zeros(W.shape, bool))
    assert found.reason is not None and "Fisher" in found.reason
    assert math.isfinite(found.weighted_error) and found.weighted_error == found.relative_error


def test_row_kept_whole_stays_finite():
    W, f = layer(4, 8)
    mask = jnp.zeros(W.shape, bool).at[1].set(True)
    codebook, codes = fit(W, f, 3, mask)
    assert bool(jnp.all(jnp.isfinite(codebook)))
    np.testing.assert_allclose(residual_values(W, codebook, codes, mask)[1], W[1], rtol=3e-7)


def test_bad_arguments_say_what_was_expected():
    W, f = layer(4, 8)
    with pytest.raises(ValueError, match="0 <= fraction < 0.5"):
        outlier_range([W], 0.7)
    with pytest.raises(ValueError, match="no matrices"):
        outlier_range([], 0.01)
    with pytest.raises(ValueError, match="sensitive fraction"):
        split(W, f, 1.5)
