"""Histograms of activations: sums, the tables fitted to them, thresholds, and what happens to unusable data."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.activations import ActivationQuant, fake_quantize, normalize_tokens, outlier_mask
from jquant.quantize.calibrate.histogram import (
    BINS,
    HistogramStats,
    activation_codebook,
    unusable_histogram,
)
from jquant.quantize.codebook import fit_codebook_exact


@jax.jit
def add(stats, x, gradient=None):
    return stats.update(x, gradient)


def gathered(x, gradient=None, percent=0.0):
    gradient = None if gradient is None else jnp.asarray(gradient)
    return add(HistogramStats.init(percent), jnp.asarray(x), gradient)


def heavy(tokens=64, inputs=512, seed=0):
    """(x, gradient) float32: Student-t entries, a few channels 20 times as large, token scales over two decades."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, size=(tokens, inputs)) * 10 ** rng.uniform(-1, 1, size=(tokens, 1))
    x[:, ::97] *= 20
    return x.astype(np.float32), (rng.standard_t(5, size=x.shape) * 10 ** rng.uniform(-3, -1)).astype(np.float32)


def weighted_sample(x, gradient, percent):
    """z, weights (0 where left out), as the module defines them, float64."""
    z, s = (np.asarray(a, np.float64) for a in normalize_tokens(jnp.asarray(x)))
    left = ~np.asarray(outlier_mask(jnp.asarray(x), percent))
    return z, left * (1.0 if gradient is None else np.square(gradient.astype(np.float64) * s))


def error(z, weights, table):
    edges = 0.5 * (table[1:] + table[:-1])
    return float(np.sum(weights * (z - table[np.searchsorted(edges, z)]) ** 2))


def test_sums_are_those_of_the_sample():
    x, g = heavy()
    stats = gathered(x, g, 0.5)
    z, w = weighted_sample(x, g, 0.5)
    np.testing.assert_allclose(stats.mass.sum(), w.sum(), rtol=1e-5)  # float32 sums of 32768 entries
    np.testing.assert_allclose(stats.moment.sum(), (w * z).sum(), rtol=1e-4)
    assert float(stats.counts.sum()) == x.size
    assert float(stats.inliers.sum()) == x.size - 64 * 2 * 3  # ceil(0.5 % of 512) = 3 a side
    value, weight = stats.finalize()
    assert bool(jnp.all(value[1:] >= value[:-1])) and float(weight.max()) == 1.0
    for axis in ((8, 8, 512), (64, 512)):
        again = gathered(x.reshape(axis), g.reshape(axis), 0.5)
        np.testing.assert_array_equal(again.mass, stats.mass)
    alike = gathered(x, None, 0.5)
    np.testing.assert_array_equal(alike.mass, alike.inliers)


def test_merging_is_adding():
    x, g = heavy()
    both = gathered(x[:20], g[:20], 0.5).merge(gathered(x[20:], g[20:], 0.5))
    once = gathered(x, g, 0.5)
    np.testing.assert_array_equal(both.counts, once.counts)
    np.testing.assert_array_equal(both.inliers, once.inliers)
    np.testing.assert_allclose(both.mass, once.mass, rtol=1e-5)  # float32 sums in another order
    with pytest.raises(ValueError, match="do not add"):
        once.merge(HistogramStats.init(1.0))


@pytest.mark.parametrize("bits", [3, 4])
def test_binning_costs_less_than_a_thousandth(bits):
    x, g = heavy(24)
    z, w = weighted_sample(x, g, 0.5)
    table = np.asarray(activation_codebook(gathered(x, g, 0.5), bits), np.float64)
    rows = (jnp.asarray(a.reshape(1, -1), jnp.float32) for a in (z, w))
    exact, _ = fit_codebook_exact(*rows, bits)
    assert table.shape == (2**bits,) and np.all(np.diff(table) > 0)
    assert error(z, w, table) <= 1.001 * error(z, w, np.asarray(exact[0], np.float64))


def test_gaussian_tables_reach_the_lloyd_max_constants():
    """Mean squared error over the variance of optimal Gaussian quantizers (Max 1960): through tokens of 2048 entries,
    whose own mean |x| is the scale, it is met within a percent."""
    quantile = np.asarray([NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)])
    x = jnp.asarray(np.random.default_rng(0).permutation(quantile).reshape(32, 2048), jnp.float32)
    stats = gathered(x)
    for bits, constant in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.00950)):
        table = activation_codebook(stats, bits)
        value = fake_quantize(x, ActivationQuant(table, None, bits))
        assert abs(float(jnp.mean(jnp.square(value - x)) / jnp.mean(jnp.square(x))) / constant - 1) < 0.01, bits


def test_weights_are_those_of_the_error_that_counts():
    """The table is fitted to sum g**2 (x - x_hat)**2: no table of another weighting does better on that."""
    x, g = heavy()
    keep = np.asarray(outlier_mask(jnp.asarray(x), 0.5))

    def cost(table):
        value = np.asarray(fake_quantize(jnp.asarray(x), ActivationQuant(table, None, 3)), np.float64)
        return float(np.sum(~keep * np.square(g.astype(np.float64) * (x - value))))

    found = cost(activation_codebook(gathered(x, g, 0.5), 3))
    for other in (gathered(x, None, 0.5), gathered(x, g * 0 + 1, 0.5), gathered(x, g, 0.0)):
        assert found < cost(activation_codebook(other, 3))


def test_a_first_token_in_the_thousands_changes_nothing():
    """As the inputs of SmolLM2's down_proj: one token in 64 whose few largest entries are 1000 times the others'."""
    x, _ = heavy(64, 600)
    x /= np.abs(x).mean(1, keepdims=True)
    wild = x.copy()
    wild[0, :4] = [3010, -900, 2000, 1500]
    tables = [activation_codebook(gathered(data, None, 0.5), 4) for data in (x, wild)]
    others = jnp.asarray(x[1:])
    costs = [
        float(jnp.mean(jnp.square(fake_quantize(others, ActivationQuant(t, None, 4, outlier_percent=0.5)) - others)))
        for t in tables
    ]
    assert costs[1] < 1.02 * costs[0]


def test_thresholds_are_quantiles_of_everything():
    x, g = heavy()
    z = np.asarray(normalize_tokens(jnp.asarray(x))[0], np.float64).reshape(-1)
    stats = gathered(x, g, 0.5)
    for percent in (0.5, 5.0, 50.0):
        low, high = np.asarray(stats.thresholds(percent), np.float64)
        width = 2 / BINS * (np.abs([low, high]).max() + 4) ** 2 / 4  # of a bin there
        assert abs(low - np.quantile(z, percent / 100)) < width
        assert abs(high - np.quantile(z, 1 - percent / 100)) < width
        assert abs(np.mean(z < low) - percent / 100) < 1e-3 and abs(np.mean(z > high) - percent / 100) < 1e-3
    np.testing.assert_array_equal(stats.thresholds(0), [-np.inf, np.inf])
    np.testing.assert_array_equal(HistogramStats.init().thresholds(1.0), [-np.inf, np.inf])
    with pytest.raises(ValueError, match="0 <= percent <= 50"):
        stats.thresholds(51)


def test_the_rule_of_each_token_wins_when_tails_were_heavier_in_calibration():
    """Thresholds from heavier tails keep almost nothing; the top-k rule always keeps its share.

    With tails as in calibration it is the other way round: thresholds pick the largest |z| of all tokens together.
    """
    rng = np.random.default_rng(1)
    stats = gathered(rng.standard_t(2.5, size=(64, 400)).astype(np.float32), None, 1.0)
    table = activation_codebook(stats, 4)
    dynamic = ActivationQuant(table, None, 4, outlier_percent=1.0)
    static = ActivationQuant(table, stats.thresholds(1.0), 4, outlier_percent=1.0)

    def error(a, x):
        return float(jnp.mean(jnp.square(fake_quantize(x, a) - x)))

    lighter = jnp.asarray(rng.standard_t(8, size=(64, 400)), jnp.float32)
    nothing_kept = error(ActivationQuant(table, None, 4), lighter)
    assert error(dynamic, lighter) < error(static, lighter) < nothing_kept
    alike = jnp.asarray(rng.standard_t(2.5, size=(64, 400)), jnp.float32)
    assert error(static, alike) < error(dynamic, alike) < error(ActivationQuant(table, None, 4), alike)


def test_totals_stay_right_far_beyond_the_whole_numbers_of_float32():
    x = np.random.default_rng(0).normal(size=(16, 512)).astype(np.float32)
    once = gathered(x)
    many = jax.tree.map(lambda a: a * 2.0**22, once)  # 3.4e10 entries, 4e6 or more in a bin
    more = add(many, jnp.asarray(x))
    assert float(many.counts.max()) > 2**24
    # a bin's 4 or so new entries are a few steps of float32 there, rounded to even: a percent of their sum
    np.testing.assert_allclose((more.counts - many.counts).sum(), 8192, rtol=0.05)


def test_tokens_without_a_scale_are_left_out():
    x, g = heavy(8)
    bad = x.copy()
    bad[1], bad[2, 3], bad[3, 4] = 0.0, np.nan, np.inf
    rest = [0, 4, 5, 6, 7]
    for percent in (0.0, 0.5):
        for name in ("mass", "moment", "inliers", "counts"):
            found = getattr(gathered(bad, g, percent), name)
            np.testing.assert_allclose(found, getattr(gathered(x[rest], g[rest], percent), name), rtol=1e-5)


def test_unusable_weights_fall_back_to_counting_with_a_reason():
    x, g = heavy()
    even = activation_codebook(gathered(x, None, 0.5), 4)
    assert unusable_histogram(gathered(x, g, 0.5)) is None
    bad = g.copy()
    bad[3, 5] = np.nan
    for gradient, word in ((bad, "not finite"), (0 * g, "zero"), (g * np.float32(1e30), "not finite")):
        stats = gathered(x, gradient, 0.5)
        table = activation_codebook(stats, 4)
        # by bin centres instead of means
        np.testing.assert_allclose(table, even, rtol=0.02, atol=0.01)
        assert word in (unusable_histogram(stats) or "")


def test_nothing_seen_gives_an_even_table_with_a_reason():
    zeros, ones = np.zeros((3, 8), np.float32), np.ones((3, 8), np.float32)
    for stats in (HistogramStats.init(), gathered(zeros), gathered(ones, None, 50.0)):
        np.testing.assert_allclose(activation_codebook(stats, 2), [-3, -1, 1, 3], rtol=1e-6)
        assert "evenly" in (unusable_histogram(stats) or "")


def test_fewer_values_than_entries_are_all_met():
    x = np.tile(np.asarray([[-1.5, 0.5, 1.0, 1.0]], np.float32), (5, 1))
    for bits in (2, 4, 8):
        table = np.asarray(activation_codebook(gathered(x), bits))
        assert np.all(np.isfinite(table)) and np.all(np.diff(table) >= 0)
        value = fake_quantize(jnp.asarray(x), ActivationQuant(jnp.asarray(table), None, bits))
        np.testing.assert_allclose(value, x, rtol=1e-5)


def test_wrong_arguments_are_value_errors():
    with pytest.raises(ValueError, match="1 to 8 bits"):
        activation_codebook(HistogramStats.init(), 9)
    with pytest.raises(ValueError, match="shape of the inputs"):
        HistogramStats.init().update(jnp.zeros((2, 4)), jnp.zeros((2, 3)))
