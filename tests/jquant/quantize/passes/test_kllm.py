"""One table a matrix: errors against k-means on all values, refits that never hurt, rows that are special."""

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.quantize.codebook import codebook_lookup, fit_codebook_exact
from jquant.quantize.passes import squeezellm
from jquant.quantize.passes.kllm import dense_table, kllm, report, unusable_fisher


def layer(n=48, k=96, seed=0):
    """(W, fisher): rows of different size, heavy tails, one weight at 28 times the rms of its row."""
    rng = np.random.default_rng(seed)
    W = rng.standard_t(5, size=(n, k)) * 0.02 * 10 ** rng.uniform(-0.5, 0.5, size=(n, 1))
    W[3, 5] = 28 * np.sqrt(np.mean(W[3] ** 2))
    return jnp.asarray(W, jnp.float32), jnp.asarray(10 ** rng.uniform(-12, -8, size=(n, k)), jnp.float32)


def decoded(codebook, codes, scales):
    return np.asarray(codebook_lookup(dense_table(codebook, scales, codes.shape[0]), codes), np.float64)


def cost(W, f, fit):
    f = np.ones(W.shape) if f is None else np.asarray(f, np.float64)
    return float(np.sum(f * np.square(np.asarray(W, np.float64) - decoded(*fit))))


def test_literal_form_is_the_kmeans_of_all_values_in_units_of_the_rms():
    W, f = layer()
    for fisher in (None, f):
        codebook, codes, scales = kllm(W, 3, fisher, row_scale="rms", refit=False)
        assert codebook.shape == (1, 8) and scales is not None and scales.shape == (48,)
        np.testing.assert_allclose(scales, np.sqrt(np.mean(np.asarray(W, np.float64) ** 2, 1)), rtol=1e-6)
        weights = jnp.square(scales)[:, None] * (1.0 if fisher is None else fisher / fisher.max())
        exact, best = fit_codebook_exact((W / scales[:, None]).reshape(1, -1), (weights + 0 * W).reshape(1, -1), 3)
        least = cost(W, fisher, (exact, best.reshape(W.shape), scales))
        # cuts of the table lie on edges of bins, whose loss test_histogram bounds by 1e-3
        assert cost(W, fisher, (codebook, codes, scales)) <= 1.002 * least


def test_codes_are_the_nearest_entries_of_what_is_stored():
    W, f = layer()
    for types in ((jnp.float32, jnp.float32), (jnp.float16, jnp.float16)):
        codebook, codes, scales = kllm(W, 3, f, codebook_dtype=types[0], scale_dtype=types[1])
        assert scales is not None and codebook.dtype == types[0] and scales.dtype == types[1]
        table = np.asarray(dense_table(codebook, scales, W.shape[0]), np.float64)
        assert np.all(np.diff(table, axis=1) > 0)
        distance = np.abs(np.asarray(W, np.float64)[:, :, None] - table[:, None, :])
        chosen = np.take_along_axis(distance, np.asarray(codes)[:, :, None], axis=2)[:, :, 0]
        # half-way cases may fall either way within the rounding of w / s
        assert np.all(chosen <= distance.min(axis=2) + 1e-6 * np.abs(table).max(axis=1, keepdims=True))


def test_refit_and_best_never_hurt_and_scales_matter():
    W, f = layer()
    starts = ("rms", "absmax", "best")
    found = {(s, refit): cost(W, f, kllm(W, 3, f, row_scale=s, refit=refit)) for s in starts for refit in (False, True)}
    for start in starts:
        assert found[start, True] <= found[start, False] * (1 + 1e-6)  # float32 sums
    for refit in (False, True):
        np.testing.assert_allclose(found["best", refit], min(found["rms", refit], found["absmax", refit]), rtol=1e-6)
    assert found["best", True] < 0.8 * found["rms", False]
    literal = kllm(W, 3, row_scale="rms", refit=False)
    assert cost(W, None, kllm(W, 3)) < 0.95 * cost(W, None, literal)


def test_the_weight_at_28_times_the_rms_survives_where_it_is_felt():
    W, f = layer()
    f = f.at[3, 5].set(1e-4)
    literal, robust = (decoded(*kllm(W, 3, f, **how))[3, 5] for how in ({"row_scale": "rms", "refit": False}, {}))
    assert abs(robust / float(W[3, 5]) - 1) < 0.02
    unweighted = decoded(*kllm(W, 3, row_scale="rms", refit=False))[3, 5]
    assert abs(robust - float(W[3, 5])) < abs(unweighted - float(W[3, 5]))
    assert abs(robust - float(W[3, 5])) <= abs(literal - float(W[3, 5])) + 1e-6


def test_rows_of_one_shape_cost_no_more_than_a_table_a_row():
    """Rows that differ by a factor only need one table: with refit it comes near what a table each achieves."""
    rng = np.random.default_rng(0)
    shape = rng.normal(size=96)
    W = jnp.asarray(np.stack([rng.permutation(shape) * a for a in (0.01, 0.03, 0.2, 1.0, 0.07, 0.5)]), jnp.float32)
    shared, own = kllm(W, 3), kllm(W, 3, table="row")
    assert own[2] is None and own[0].shape == (6, 8)
    np.testing.assert_array_equal(own[1], squeezellm.fit(W, jnp.ones_like(W), 3)[1])
    # bins again: 96 values leave them coarse beside the gaps between the values
    assert cost(W, None, shared) <= 1.05 * cost(W, None, own)


def test_scaling_the_matrix_scales_the_result():
    W, f = layer()
    base = kllm(W, 3, f)
    for factor in (1e-30, 1e20):  # powers of ten, hence up to rounding
        fit = kllm(W * jnp.float32(factor), 3, f * 1e10)
        assert np.all(np.isfinite(decoded(*fit)))
        np.testing.assert_allclose(
            cost(W, f, (fit[0], fit[1], fit[2] / jnp.float32(factor))), cost(W, f, base), rtol=0.02
        )


def test_rows_of_zeros_decode_to_zeros():
    W, f = layer()
    W = W.at[7].set(0.0)
    for fisher in (None, f):
        codebook, codes, scales = kllm(W, 3, fisher)
        assert scales is not None and float(scales[7]) == 0.0
        assert not decoded(codebook, codes, scales)[7].any()
        nearest = int(np.abs(np.asarray(codebook[0])).argmin())
        assert set(np.asarray(codes)[7]) == {nearest}
        rest = np.arange(W.shape[0]) != 7
        assert np.all(np.asarray(scales)[rest] > 0)
    codebook, codes, scales = kllm(jnp.zeros((4, 8)), 2)
    assert np.all(np.isfinite(np.asarray(codebook))) and not decoded(codebook, codes, scales).any()


def test_few_values_are_met_exactly():
    W = jnp.asarray([[1.0, -1.0, 0.5, 1.0], [2.0, -2.0, 1.0, 1.0], [0.25, 0.25, -0.25, 0.125]])
    fit = kllm(W, 4)
    np.testing.assert_allclose(decoded(*fit), W, rtol=2e-3)  # the bins' means, of values that differ by rounding
    single = kllm(jnp.full((1, 1), -0.3), 3)
    np.testing.assert_allclose(decoded(*single), [[-0.3]], rtol=1e-6)


def test_masked_entries_do_not_count():
    W, f = layer()
    mask = squeezellm.split(W, f, 0.01, 3.0).mask
    codebook, codes, scales = kllm(W, 3, f, mask=mask)
    wild = kllm(jnp.where(mask, 1e3, W), 3, jnp.where(mask, 1.0, f), mask=mask)
    np.testing.assert_array_equal(codes, wild[1])
    np.testing.assert_array_equal(codebook, wild[0])
    fit, f0 = (codebook, codes, scales), jnp.where(mask, 0.0, f)
    assert cost(W, f0, fit) < cost(W, f0, kllm(W, 3, f))


def test_unusable_fisher_is_ignored_with_a_reason():
    W, f = layer()
    plain = kllm(W, 3)
    for bad, word in (
        (f.at[0, 0].set(jnp.nan), "not finite"),
        (f * 0, "zero"),
        (f.at[2, 2].set(jnp.inf), "not finite"),
    ):
        fit = kllm(W, 3, bad)
        for a, b in zip(fit, plain, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        found = report(W, bad, *fit)
        assert word in (found.reason or "") and found.weighted_error == found.relative_error
    assert unusable_fisher(f) is None and unusable_fisher(None) is None


def test_rows_without_fisher_count_alike_and_pull_nothing():
    W, f = layer()
    none, wild = f.at[5:9].set(0.0), W.at[5:9].multiply(3.0)
    fit, other = kllm(W, 3, none), kllm(wild, 3, none)
    np.testing.assert_allclose(fit[0], other[0], rtol=1e-5)
    error = np.square(np.asarray(W) - decoded(*fit)).sum(1) / np.square(np.asarray(W)).sum(1)
    assert error[5:9].max() < 0.1


def test_report_is_the_relative_error_in_both_measures():
    W, f = layer()
    for fit in (kllm(W, 3, f), kllm(W, 3, f, table="row")):
        found = report(W, f, *fit)
        np.testing.assert_allclose(found.weighted_error, cost(W, f, fit) / np.sum(f * W**2, dtype=float), rtol=1e-4)
        np.testing.assert_allclose(found.relative_error, cost(W, None, fit) / np.sum(W**2, dtype=float), rtol=1e-4)
        assert found.reason is None


def test_wrong_arguments_are_value_errors():
    W = jnp.zeros((4, 8))
    for how, message in (
        ({"bits": 9}, "1 to 8 bits"),
        ({"table": "block"}, "table='block'"),
        ({"row_scale": "l1"}, "row_scale='l1'"),
        ({"fisher": jnp.zeros((4, 7))}, "fisher"),
        ({"mask": jnp.zeros((8, 4), bool)}, "mask"),
    ):
        with pytest.raises(ValueError, match=message):
            kllm(W, **({"bits": 4} | how))
