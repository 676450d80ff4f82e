"""Nested codebooks: the law of their codes, the best split against brute force, and what nesting costs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.quantize.codebook import codebook_lookup, fit_codebook
from jquant.quantize.passes.nested import at_bits, nest, nested_size_bits

N, K = 12, 96


def rows(seed=0, n=N, k=K):
    """Heavy-tailed (W, weights) [n, k], the weights over four decades."""
    rng = np.random.default_rng(seed)
    W, f = rng.standard_t(4, size=(n, k)), 10 ** rng.uniform(-4, 0, size=(n, k))
    return jnp.asarray(W, jnp.float32), jnp.asarray(f, jnp.float32)


def objective(W, f, codebook, codes):
    Q = np.take_along_axis(np.asarray(codebook).astype(np.float64), np.asarray(codes), axis=1)
    return (np.asarray(f, np.float64) * (np.asarray(W, np.float64) - Q) ** 2).sum(axis=1)


def best_split(w, f):
    """(objective, lower mean, upper mean) of the best cut of one cluster, in float64; itself twice if it has none."""
    order = np.argsort(w)
    w, f = np.asarray(w, np.float64)[order], np.asarray(f, np.float64)[order]
    found = (np.inf, np.average(w, weights=f), np.average(w, weights=f))
    for cut in range(1, len(w)):
        sides = [(w[:cut], f[:cut]), (w[cut:], f[cut:])]
        means = [np.average(x, weights=g) for x, g in sides]
        error = sum((g * (x - m) ** 2).sum() for (x, g), m in zip(sides, means, strict=True))
        if error < found[0]:
            found = (error, *means)
    return found


def test_codes_nest_and_tables_ascend_around_their_parents():
    W, f = rows()
    codebook, codes = fit_codebook(W, f, 2)
    nested = nest(W, f, codebook, codes, 6)
    assert sorted(nested.codebooks) == [2, 3, 4, 5, 6] and nested.codes.dtype == jnp.int32
    np.testing.assert_array_equal(at_bits(nested, 2)[0], codebook)
    np.testing.assert_array_equal(at_bits(nested, 2)[1], codes)
    for b in range(2, 6):
        (parent, above), (child, below) = at_bits(nested, b), at_bits(nested, b + 1)
        assert child.shape == (N, 2 ** (b + 1))
        np.testing.assert_array_equal(below >> 1, above)
        assert bool(jnp.all(jnp.diff(child, axis=1) >= 0))
        # means rounded to float32, thus a few last places
        slack = 1e-6 * float(jnp.max(jnp.abs(W)))
        assert bool(jnp.all((child[:, ::2] <= parent + slack) & (child[:, 1::2] >= parent - slack)))
        pair = jnp.stack([jnp.abs(W - codebook_lookup(child, 2 * above + side)) for side in (0, 1)])
        chosen = jnp.abs(W - codebook_lookup(child, below))
        np.testing.assert_allclose(chosen, jnp.min(pair, axis=0), atol=1e-6)


def test_every_split_is_the_best_one():
    W, f = rows(seed=1, n=3)
    nested = nest(W, f, *fit_codebook(W, f, 2), 6)
    for b in range(2, 6):
        codes, child = np.asarray(at_bits(nested, b)[1]), np.asarray(at_bits(nested, b + 1)[0])
        got = objective(W, f, *at_bits(nested, b + 1))
        wanted = np.zeros(3)
        for n in range(3):
            for c in np.unique(codes[n]):
                mine = codes[n] == c
                if len(np.unique(W[n][mine])) < 2:
                    np.testing.assert_allclose(child[n, 2 * c : 2 * c + 2], W[n][mine][0], rtol=1e-6)
                    continue
                error, *means = best_split(W[n][mine], f[n][mine])
                wanted[n] += error
                # float32 sums; another cut as good as the best is allowed, and rare
                if abs(child[n, 2 * c] - means[0]) > 1e-4:
                    assert b > 3
        # float32 values and means: their rounding is 1e-7 of the largest value, squared and times the weights
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-11)


def test_nesting_costs_little_where_the_widths_are_close():
    W, f = rows(seed=2, k=768)
    nested = nest(W, f, *fit_codebook(W, f, 3), 8)
    ratios = []
    for b in range(3, 9):
        got = objective(W, f, *at_bits(nested, b)).sum()
        ratios.append(got / objective(W, f, *fit_codebook(W, f, b)).sum())
        if b > 3:
            assert got < 0.3 * objective(W, f, *at_bits(nested, b - 1)).sum()  # one bit is a factor of four or so
    assert ratios[0] == 1
    # Every cluster is cut in two, however few its members: the wider, the further from a table with free cuts.
    assert ratios[1] < 1.3 and ratios[2] < 1.7


def test_stored_tables_decide_the_codes():
    W, f = rows(seed=3)
    codebook, codes = fit_codebook(W, f, 2)
    nested = nest(W, f, codebook.astype(jnp.float16), codes, 6, codebook_dtype=jnp.float16)
    for b in range(3, 7):
        table, below = at_bits(nested, b)
        assert table.dtype == jnp.float16 and bool(jnp.all(jnp.diff(table.astype(jnp.float32), axis=1) >= 0))
        error = jnp.abs(W - codebook_lookup(table, below))
        assert bool(jnp.all(error <= jnp.abs(W - codebook_lookup(table, below ^ 1)) + 1e-6))
        np.testing.assert_array_equal(below >> 1, at_bits(nested, b - 1)[1])


def test_entries_without_weight_pull_nothing():
    W, f = rows(seed=4)
    codebook, codes = fit_codebook(W, f, 2)
    silent = jnp.asarray(np.random.default_rng(0).random((N, K)) < 0.3)
    # moved inside their cluster, so that the clusters stay as they are
    moved = jnp.where(silent, codebook_lookup(codebook, codes), W)
    one, two = (nest(w, jnp.where(silent, 0.0, f), codebook, codes, 6) for w in (W, moved))
    for b in range(2, 7):
        # sums of the same terms with zeros between them
        np.testing.assert_allclose(one.codebooks[b], two.codebooks[b], rtol=1e-5, atol=1e-5)
    table, below = at_bits(one, 6)
    error, other = (jnp.abs(W - codebook_lookup(table, c)) for c in (below, below ^ 1))
    assert bool(jnp.all(error <= other + 1e-6))


@pytest.mark.parametrize("useless", [0.0, np.nan, np.inf, -1.0])
def test_rows_without_weight_are_unweighted(useless):
    W, _ = rows(seed=5)
    codebook, codes = fit_codebook(W, jnp.ones_like(W), 2)
    plain, given = (nest(W, jnp.full_like(W, v), codebook, codes, 6) for v in (1.0, useless))
    np.testing.assert_array_equal(plain.codes, given.codes)
    np.testing.assert_array_equal(plain.codebooks[6], given.codebooks[6])


def test_corner_rows_stay_finite_and_sorted():
    rng = np.random.default_rng(6)
    W = np.zeros((N, K), np.float32)
    W[1] = 3e38 * rng.choice([-1, 1], K)
    W[2] = 1e-42
    W[3, 0] = 1.0
    W[4] = 1e6 + np.arange(K)
    W[5] = np.tile([-1.0, 0.25, 3.0], K // 3)
    f = rng.random(W.shape).astype(np.float32)
    codebook, codes = fit_codebook(W, f, 2)
    nested = nest(jnp.asarray(W), jnp.asarray(f), codebook, codes, 6)
    for b in range(2, 7):
        table, below = at_bits(nested, b)
        assert bool(jnp.all(jnp.isfinite(table))) and bool(jnp.all(table[:, 1:] >= table[:, :-1]))
        assert int(below.min()) >= 0 and int(below.max()) < 2**b
    np.testing.assert_allclose(codebook_lookup(*at_bits(nested, 6))[5], W[5], rtol=1e-6)


def test_clusters_need_not_be_intervals():
    W, f = rows(seed=7)
    codebook, _ = fit_codebook(W, f, 2)
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 4, W.shape), jnp.int32)
    nested = nest(W, f, codebook, codes, 6)
    errors = [objective(W, f, *at_bits(nested, b)).sum() for b in range(2, 7)]
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
    np.testing.assert_array_equal(at_bits(nested, 2)[1], codes)


def test_size_counts_codes_once_and_every_table():
    assert nested_size_bits((2, 64), 3, 3) == 2 * (64 * 3 + 16 * 8)
    assert nested_size_bits((2, 64), 3, 4) == 2 * (64 * 4 + 16 * (8 + 16))
    assert nested_size_bits((1, 33), 2, 3, table_bits=32) == 32 * 4 + 32 * (4 + 8)  # 99 bits of codes take 4 words


def test_bad_arguments_say_what_was_expected():
    W, f = rows(n=2, k=8)
    codebook, codes = jnp.zeros((2, 4)), jnp.zeros((2, 8), jnp.int32)
    with pytest.raises(ValueError, match="expected 2 to 8"):
        nest(W, f, codebook, codes, 9)
    with pytest.raises(ValueError, match="power of two"):
        nest(W, f, codebook[:, :3], codes, 4)
    with pytest.raises(ValueError, match="matrices of one shape"):
        nest(W, f[:, 1:], codebook, codes, 4)
    with pytest.raises(ValueError, match=r"this nest holds \[2, 3\]"):
        at_bits(nest(W, f, codebook, codes, 3), 4)
    with pytest.raises(ValueError, match="cannot be nested"):
        nested_size_bits((2, 8), 4, 3)
