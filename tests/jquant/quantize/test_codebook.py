"""Weighted one-dimensional k-means: against the exact optimum in float64, against scikit-learn, and on corner rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from jquant.quantize.codebook import assign_codes, codebook_lookup, fit_codebook, fit_codebook_exact


def rows(kind, n, k, seed=0):
    """(W, weights) float32 [n, k]; "fisher" weights span six decades."""
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        W, f = rng.normal(size=(n, k)), np.ones((n, k))
    elif kind == "fisher":
        W, f = 0.02 * rng.normal(size=(n, k)), 1e-8 * 10 ** rng.uniform(-6, 0, size=(n, k))
    elif kind == "heavy":
        W, f = rng.standard_t(3, size=(n, k)), rng.normal(size=(n, k)) ** 4
    else:  # heavy-tailed weights whose columns differ in sensitivity, as behind activation outliers
        W, f = rng.standard_t(2, size=(n, k)), rng.normal(size=(1, k)) ** 4 * rng.normal(size=(n, k)) ** 2
    return W.astype(np.float32), f.astype(np.float32)


KINDS = ["gaussian", "fisher", "heavy", "columns"]


def objective(W, f, codebook, codes):
    Q = np.take_along_axis(np.asarray(codebook, np.float64), np.asarray(codes), axis=1)
    return (np.asarray(f, np.float64) * (np.asarray(W, np.float64) - Q) ** 2).sum(axis=1)


def optimum(w, f, entries):
    """The least objective of one row, by dynamic programming over every element in float64."""
    order = np.argsort(w)
    x, g = w[order].astype(np.float64), f[order].astype(np.float64)
    x = x - np.average(x, weights=g)
    sums = [np.concatenate([[0], np.cumsum(v)]) for v in (g, g * x, g * x * x)]
    mass, moment, square = (s[None] - s[:, None] for s in sums)
    cost = np.maximum(square - moment**2 / np.where(mass > 0, mass, 1), 0)
    cost[np.tril_indices(len(cost), -1)] = np.inf
    best = cost[0]
    for _ in range(entries - 1):
        best = (best[:, None] + cost).min(axis=0)
    return best[-1]


def sklearn_objective(W, f, entries):
    found = []
    for w, g in zip(W, f, strict=True):
        model = KMeans(entries, init="k-means++", n_init="auto", random_state=0, max_iter=50)
        model.fit(w[:, None], sample_weight=g / g.max())
        codes = np.asarray(model.predict(w[:, None]))
        found.append(objective(w[None], g[None], model.cluster_centers_.T, codes[None])[0])
    return np.asarray(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_the_optimum(kind, bits):
    W, f = rows(kind, 24, 300)
    codebook, codes = fit_codebook(W, f, bits)
    best = np.asarray([optimum(w, g, 2**bits) for w, g in zip(W, f, strict=True)])
    ours = objective(W, f, codebook, codes)
    assert ours.sum() <= 1.01 * best.sum()
    assert (ours <= 1.05 * best).all()
    assert (ours >= best * (1 - 1e-5)).all()  # or the oracle is wrong


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_not_worse_than_sklearn(kind, bits):
    W, f = rows(kind, 40 if bits < 8 else 8, 576, seed=1)
    codebook, codes = fit_codebook(W, f, bits)
    ours, theirs = objective(W, f, codebook, codes), sklearn_objective(W, f, 2**bits)
    assert ours.sum() <= theirs.sum()
    # k-means++ is lucky on a row now and then; with 5 bits 192 bins are somewhat coarse, too
    assert (ours > 1.005 * theirs).sum() <= (1 if bits < 5 else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_fit_reaches_the_optimum(kind):
    W, f = rows(kind, 6, 200, seed=2)
    for bits in (1, 3):
        best = np.asarray([optimum(w, g, 2**bits) for w, g in zip(W, f, strict=True)])
        # float32 interval costs
        np.testing.assert_allclose(objective(W, f, *fit_codebook_exact(W, f, bits)), best, rtol=1e-4)


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_codes_are_nearest_and_codebooks_ascend(bits):
    W, f = rows("heavy", 5, 130, seed=3)
    codebook, codes = fit_codebook(W, f, bits)
    assert codebook.shape == (5, 2**bits) and codebook.dtype == jnp.float32
    assert codes.shape == W.shape and codes.dtype == jnp.int32
    assert bool(jnp.all(jnp.diff(codebook, axis=1) >= 0))
    distance = np.abs(W[..., None].astype(np.float64) - np.asarray(codebook, np.float64)[:, None])
    chosen = np.take_along_axis(distance, np.asarray(codes)[..., None], axis=2)[..., 0]
    # midpoints are rounded to float32
    np.testing.assert_allclose(chosen, distance.min(axis=2), rtol=1e-5, atol=1e-6)


def test_error_falls_with_bits():
    W, f = rows("columns", 8, 576, seed=4)
    errors = [objective(W, f, *fit_codebook(W, f, bits)).sum() for bits in (1, 3, 4, 5, 7)]
    assert all(b < a for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("bits", [3, 5])
def test_permuting_columns_permutes_codes(bits):
    W, f = rows("heavy", 4, 200, seed=5)
    order = np.random.default_rng(0).permutation(200)
    codebook, codes = fit_codebook(W, f, bits)
    shuffled, shuffled_codes = fit_codebook(W[:, order], f[:, order], bits)
    # sums of the same terms in another order
    np.testing.assert_allclose(shuffled, codebook, rtol=1e-4, atol=1e-5)
    assert (np.asarray(codes)[:, order] != np.asarray(shuffled_codes)).mean() <= 0.002


@pytest.mark.parametrize("bits", [3, 5])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scaling_weights_and_fisher_changes_nothing_but_the_unit(bits, scale):
    W, f = rows("heavy", 4, 200, seed=6)
    codebook, codes = fit_codebook(W, f, bits)
    scaled, scaled_codes = fit_codebook(W * np.float32(scale), f * np.float32(scale), bits)
    np.testing.assert_allclose(np.asarray(scaled) / scale, codebook, rtol=1e-3, atol=1e-4)
    assert (np.asarray(codes) != np.asarray(scaled_codes)).mean() <= 0.01


@pytest.mark.parametrize("bits", [3, 5])
def test_rows_without_weight_are_unweighted(bits):
    W, _ = rows("gaussian", 3, 100)
    plain = fit_codebook(W, np.ones_like(W), bits)
    for useless in (0.0, np.nan, np.inf, -1.0):
        given = fit_codebook(W, np.full_like(W, useless), bits)
        np.testing.assert_array_equal(given[0], plain[0])
        np.testing.assert_array_equal(given[1], plain[1])


@pytest.mark.parametrize("bits", [2, 5])
def test_entries_of_weight_zero_pull_nothing(bits):
    W, f = rows("heavy", 3, 100, seed=7)
    f[:, ::3] = 0
    elsewhere = W.copy()
    elsewhere[:, ::3] = 0
    one, two = fit_codebook(W, f, bits), fit_codebook(elsewhere, f, bits)
    # what carries no weight still moves the bins in which cuts are looked for, hence another near-optimum
    np.testing.assert_allclose(objective(W, f, *one).sum(), objective(elsewhere, f, *two).sum(), rtol=0.05)
    np.testing.assert_array_equal(one[1], assign_codes(W, one[0]))


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("weighted", [True, False])
def test_few_distinct_values_are_exact(bits, weighted):
    values = np.asarray([[-2.0, 0.5, 3.0], [0.0, 0.0, 0.0], [1.0, 1.0, -1e6]], np.float32)
    for copies in (1, 40):
        W = np.tile(values, (1, copies))
        f = rows("fisher", *W.shape)[1] if weighted else np.ones_like(W)
        codebook, codes = fit_codebook(W, f, bits)
        assert bool(jnp.all(jnp.isfinite(codebook)))
        # one rounding when the row's centre is added back
        np.testing.assert_allclose(codebook_lookup(codebook, codes), W, rtol=1e-6, atol=1e-7)


def test_nothing_is_ever_nan():
    rng = np.random.default_rng(8)
    W = np.zeros((6, 50), np.float32)
    W[1] = 3e38 * rng.choice([-1, 1], 50)
    W[2] = 1e-42
    W[3, 0] = 1.0
    W[4] = 1e6 + np.arange(50)
    W[5] = rng.normal(size=50)
    f = np.abs(rng.normal(size=W.shape)).astype(np.float32)
    f[5] *= np.float32(1e-42)
    for bits in (1, 4, 8):
        codebook, codes = fit_codebook(W, f, bits)
        assert bool(jnp.all(jnp.isfinite(codebook)))
        assert int(codes.min()) >= 0 and int(codes.max()) < 2**bits


def test_ties_go_to_the_lower_entry():
    codebook = jnp.asarray([[-1.0, 0.0, 0.0, 2.0]])
    W = jnp.asarray([[-5.0, -0.5, -0.25, 0.0, 1.0, 1.5, 9.0]])
    np.testing.assert_array_equal(assign_codes(W, codebook), [[0, 0, 1, 1, 2, 3, 3]])


def test_rows_do_not_depend_on_their_company():
    W, f = rows("heavy", 70, 60, seed=9)
    codebook, codes = fit_codebook(W, f, 3)
    alone, alone_codes = fit_codebook(W[66:67], f[66:67], 3)
    # Lloyd's iterations stop when every row of a chunk has settled, and a settled row stays where it is
    np.testing.assert_allclose(codebook[66], alone[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(codes[66], alone_codes[0])


def test_vmap_equals_a_loop():
    W, f = rows("heavy", 6, 60, seed=10)
    W, f = W.reshape(2, 3, 60), f.reshape(2, 3, 60)
    batch = jax.vmap(lambda w, g: fit_codebook(w, g, 3))(W, f)
    for i in range(2):
        one = fit_codebook(W[i], f[i], 3)
        np.testing.assert_allclose(batch[0][i], one[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch[1][i], one[1])


def test_bad_arguments_say_what_was_expected():
    W, f = rows("gaussian", 2, 8)
    with pytest.raises(ValueError, match="bits=9"):
        fit_codebook(W, f, 9)
    with pytest.raises(ValueError, match="one shape"):
        fit_codebook(W, f[:, :4], 3)
