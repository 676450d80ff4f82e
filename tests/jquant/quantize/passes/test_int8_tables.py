"""Tables on an int8 grid: exact where they can be, hardly worse where they cannot, harmless on what is degenerate."""

import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.format.weights import dequantize, entries, unpack
from jquant.quantize.passes import lnq, squeezellm
from jquant.quantize.passes.int8_tables import dense_tables, snap_rows, snap_tables


def _tables(rows: int, entries: int) -> np.ndarray:
    return np.sort(np.random.default_rng(entries).normal(size=(rows, entries)), axis=1).astype(np.float32)


def _gaussian(rows: int = 24, columns: int = 256, seed: int = 0) -> np.ndarray:
    return (0.02 * np.random.default_rng(seed).normal(size=(rows, columns))).astype(np.float32)


def _base(layer: jq.QuantizedLinear) -> jq.CodebookWeight:
    assert isinstance(layer.weight, jq.CodebookWeight)
    return layer.weight


def _fisher(W: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(10 ** np.random.default_rng(1).uniform(-3, 0, W.shape), jnp.float32)


def test_a_table_on_a_grid_is_kept() -> None:
    table = np.random.default_rng(0).integers(-127, 128, (6, 8))
    table[:, 0] = 127  # the grid's end is in use, so 127 is the first candidate
    scale = 2.0 ** np.arange(-3, 3)
    snapped, fitted = snap_tables(jnp.asarray(table * scale[:, None], jnp.float32), jnp.ones((6, 8)))
    np.testing.assert_array_equal(snapped, table)
    np.testing.assert_allclose(fitted, scale, rtol=1e-6)


@pytest.mark.parametrize("entries", [4, 16])
def test_the_search_beats_the_largest_entry_at_127(entries: int) -> None:
    floats = _tables(50, entries)
    plain_scale = np.abs(floats).max(1, keepdims=True) / 127
    plain = ((floats - plain_scale * np.round(floats / plain_scale)) ** 2).sum(1)
    for dtype in (jnp.float32, jnp.float16):
        table, scale = snap_tables(jnp.asarray(floats), jnp.ones_like(floats), dtype)
        assert table.dtype == jnp.int8 and int(jnp.min(table)) >= -127
        np.testing.assert_array_equal(scale, scale.astype(dtype).astype(jnp.float32))  # as it will be stored
        assert np.all(np.diff(np.asarray(table, np.int32), axis=1) >= 0)  # codes keep their meaning
        found = ((floats - np.asarray(dense_tables(table, scale))) ** 2).sum(1)
        assert found.sum() < 0.75 * plain.sum()
        if dtype == jnp.float32:
            assert np.all(found <= plain * (1 + 1e-4))  # sums of float32


def test_importance_moves_the_error_to_entries_that_count_less() -> None:
    floats = jnp.asarray(_tables(50, 16))
    importance = jnp.where(jnp.arange(16) == 3, 100.0, 1.0) * jnp.ones((50, 1))
    errors = [
        float(jnp.sum(importance * (floats - dense_tables(*snap_tables(floats, weight))) ** 2))
        for weight in (jnp.ones_like(floats), importance)
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("bits", [3, 4])
def test_normal_rows_hardly_notice(bits: int) -> None:
    W = _gaussian()
    for fisher in (None, _fisher(W)):
        layer, report = jq.quantize_array(W, f"w{bits}-codebook-int8", fisher=fisher)
        before = report.float_table_error
        assert before is not None
        # tables of floats are local optima, and rounded to float16: the other way round only within that rounding
        assert before * (1 - 1e-3) <= report.objective_error <= before * 1.01
        _, floats = jq.quantize_array(W, f"w{bits}-codebook", fisher=fisher)
        assert floats.float_table_error is None and floats.objective_error == before
        # 8 bits an entry instead of 16, and a scale of 16
        assert floats.size_bytes - report.size_bytes == len(W) * (2**bits - 2)
        base = _base(layer)
        assert base.scales is not None and (base.codebook.dtype, base.scales.dtype) == (jnp.int8, jnp.float16)


def test_codes_are_the_nearest_in_what_is_stored() -> None:
    W = _gaussian()
    base = _base(jq.quantize_array(W, "w3-codebook-int8", fisher=_fisher(W))[0])
    assert base.scales is not None
    stored = np.asarray(base.codebook, np.float64) * np.asarray(base.scales, np.float64)[:, None]
    distance = np.abs(W[:, :, None] - stored[:, None, :])
    chosen = np.take_along_axis(distance, np.asarray(unpack(base))[:, :, None], axis=2)[:, :, 0]
    assert np.all(chosen <= distance.min(axis=2) + 1e-9)  # float32 midpoints of numbers about 0.02


@pytest.mark.parametrize("method", ["squeezellm", "lnq"])
def test_sparse_entries_stay_exact(method: str) -> None:
    W = _gaussian()
    W[:, :3] *= 40
    hessian = jnp.eye(W.shape[1])
    layer, report = jq.quantize_array(W, "w3-codebook-int8+s2%", hessian, _fisher(W), recipe=method)
    assert layer.residual is not None
    kept = np.asarray(entries(layer.residual))
    assert kept.sum() == report.kept > 0
    # values are float16: half a unit in the last place of the largest, between 2 and 4
    np.testing.assert_allclose(np.asarray(dequantize(layer))[kept], W[kept], atol=2**-10)


def test_one_table_for_the_matrix_joins_its_scale_to_the_rows() -> None:
    W = _gaussian() * np.linspace(0.1, 3, 24, dtype=np.float32)[:, None]
    W[5] = 0
    layer, report = jq.quantize_array(W, "w4-codebook-shared-int8", fisher=_fisher(W))
    assert _base(layer).codebook.shape == (1, 16) and _base(layer).codebook.dtype == jnp.int8
    assert report.float_table_error is not None
    assert report.objective_error <= 1.02 * report.float_table_error  # one grid for all rows, whose peaks differ
    np.testing.assert_array_equal(np.asarray(dequantize(layer))[5], 0)


def test_lnq_chooses_its_codes_against_the_snapped_table() -> None:
    rng = np.random.default_rng(3)
    W = _gaussian()
    mixed = rng.normal(size=(400, 256)) @ (np.eye(256) + 0.06 * rng.normal(size=(256, 256)))
    H = jnp.asarray(mixed.T @ mixed / 400, jnp.float32)
    _, report = jq.quantize_array(W, "w3-codebook-int8", H, _fisher(W), recipe="lnq")
    assert report.method == "lnq" and report.float_table_error is not None
    assert report.objective_error <= 1.005 * report.float_table_error
    codebook, codes = squeezellm.fit(jnp.asarray(W), _fisher(W), 3, codebook_dtype=np.dtype(np.float16))
    table, scales, nearest = snap_rows(jnp.asarray(W), jnp.ones_like(W), codebook, codes, None, np.dtype(np.float16))
    held = lnq.choose_codes(jnp.asarray(W), H, dense_tables(table, scales), nearest)
    assert bool(held.ok)
    np.testing.assert_array_equal(held.codebook, dense_tables(table, scales))
    assert np.all(held.objective_after <= held.objective_before)
    assert held.objective_after.sum() < 0.8 * held.objective_before.sum()


def test_degenerate_rows_stay_finite() -> None:
    floats = jnp.asarray([[0.0] * 4, [0.0, 0.0, 0.0, 1e-30], [-1e37, 0.0, 0.0, 1e37]], jnp.float32)
    table, scale = snap_tables(floats, jnp.ones_like(floats))
    assert float(scale[0]) == 1.0 and table[0].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(dense_tables(table, scale), floats, rtol=1e-6)
    for importance in (0.0, np.nan, np.inf):
        _, scale = snap_tables(floats, jnp.full_like(floats, importance))
        assert bool(jnp.all(jnp.isfinite(scale)))
    some = [np.zeros(256), np.full(256, 0.375), np.full(256, -1e-3), np.eye(256)[3], 1e-30 * np.arange(256)]
    rows = np.stack([*some, 1e30 * some[4], *np.zeros((18, 256))]).astype(np.float32)
    for fisher in (None, jnp.zeros_like(rows), jnp.full_like(rows, np.nan)):
        layer, report = jq.quantize_array(rows, "w4-codebook-int8", fisher=fisher)
        dense = np.asarray(dequantize(layer))
        assert np.isfinite(report.objective_error) and np.all(np.isfinite(dense))
        np.testing.assert_array_equal(dense[0], 0)
        np.testing.assert_allclose(dense[1:4], rows[1:4], rtol=1e-3)  # float16 scales, where they are


def test_bad_arguments_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="must be alike"):
        snap_tables(jnp.ones((1, 4)), jnp.ones((1, 8)))
    with pytest.raises(ValueError, match="rounds to affine grids"):
        jq.quantize_array(_gaussian(), "w4-codebook-int8", recipe="rtn")
