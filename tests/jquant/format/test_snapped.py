"""Snapped codebooks: exact where they can be, better than the obvious scale, harmless on what is degenerate."""

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.snapped import snap_codebook, snapping_error
from jquant.format.weights import codebook_weight, dequantize


def _tables(rows: int, entries: int) -> np.ndarray:
    return np.sort(np.random.default_rng(entries).normal(size=(rows, entries)), axis=1).astype(np.float32)


def test_a_table_on_a_grid_is_kept() -> None:
    q = np.random.default_rng(0).integers(-127, 128, (6, 8))
    q[:, 0] = 127  # the grid's end is in use, so 127 is the first candidate
    scale = 2.0 ** np.arange(-3, 3)
    snapped, fitted = snap_codebook(jnp.asarray(q * scale[:, None], jnp.float32))
    np.testing.assert_array_equal(snapped, q)
    np.testing.assert_allclose(fitted, scale, rtol=1e-6)


@pytest.mark.parametrize("entries", [4, 8, 16])
def test_the_search_beats_the_largest_entry_at_127(entries: int) -> None:
    table = _tables(50, entries)
    q, scale = snap_codebook(jnp.asarray(table))
    assert q.dtype == jnp.int8 and scale.dtype == jnp.float32 and int(jnp.min(q)) >= -127
    plain_scale = np.abs(table).max(1, keepdims=True) / 127
    plain = ((table - plain_scale * np.round(table / plain_scale)) ** 2).sum(1)
    found = ((table - np.asarray(scale)[:, None] * np.asarray(q)) ** 2).sum(1)
    assert np.all(found <= plain * (1 + 1e-4))  # float32 sums
    assert found.sum() < 0.75 * plain.sum()
    relative = float(snapping_error(jnp.asarray(table), q, scale))
    assert relative == pytest.approx(np.sqrt(found.sum() / (table**2).sum()), rel=1e-4)
    assert relative < 0.005


def test_importance_moves_the_error_to_entries_that_count_less() -> None:
    table = jnp.asarray(_tables(50, 16))
    importance = jnp.where(jnp.arange(16) == 3, 100.0, 1.0) * jnp.ones((50, 1))
    plain, weighted = snap_codebook(table), snap_codebook(table, importance)
    errors = [float(snapping_error(table, q, s, importance)) for q, s in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]


def test_degenerate_rows_stay_finite() -> None:
    table = jnp.asarray([[0.0] * 4, [0.0, 0.0, 0.0, 1e-30], [-1e37, 0.0, 0.0, 1e37]], jnp.float32)
    q, scale = snap_codebook(table)
    assert float(scale[0]) == 1.0 and q[0].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(scale[:, None] * q.astype(jnp.float32), table, rtol=1e-6)
    q, scale = snap_codebook(table, jnp.zeros_like(table))
    assert bool(jnp.all(jnp.isfinite(scale)))


def test_a_snapped_codebook_is_a_codebook_weight() -> None:
    table = jnp.asarray(_tables(3, 8))
    q, scale = snap_codebook(table)
    codes = jnp.asarray(np.random.default_rng(1).integers(0, 8, (3, 20)), jnp.uint8)
    dense = dequantize(codebook_weight(codes, q, 3, scale))
    exact = jnp.take_along_axis(table, codes.astype(jnp.int32), axis=1)
    np.testing.assert_allclose(dense, exact, atol=float(jnp.max(scale)))


def test_bad_arguments_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        snap_codebook(jnp.ones((1, 4)), candidates=0)
    with pytest.raises(ValueError, match="expected the same shape"):
        snap_codebook(jnp.ones((1, 4)), jnp.ones((1, 8)))
