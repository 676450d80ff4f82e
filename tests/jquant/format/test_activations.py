"""Per-token quantizers: integers bit for bit against NumPy, tables, kept entries, and the edges of each."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.activations import (
    ActivationQuant,
    Mode,
    assign_tokens,
    dequantize_tokens,
    fake_quantize,
    keep_count,
    keep_mask,
    normalize_tokens,
    quantize_tokens,
    validate_activation,
)

f32 = np.float32
GRIDS: list[tuple[bool, Mode]] = [(False, "kernel"), (False, "simulation"), (True, "kernel")]


def integers(bits=4, symmetric=False, mode: Mode = "kernel", percent=0.0):
    return ActivationQuant(None, None, bits, symmetric, mode, percent)


def by_table(codebook, percent=0.0, thresholds=None):
    codebook = jnp.asarray(codebook, jnp.float32)
    thresholds = None if thresholds is None else jnp.asarray(thresholds, jnp.float32)
    return ActivationQuant(codebook, thresholds, max(codebook.size - 1, 1).bit_length(), outlier_percent=percent)


def tokens(rows=6, columns=40, seed=0):
    """Heavy-tailed rows; one constant, one of zeros, one all positive."""
    x = np.random.default_rng(seed).standard_t(3, size=(rows, columns)).astype(f32)
    x[1], x[2], x[3] = 0.75, 0.0, np.abs(x[3]) + f32(2)
    return x


def oracle(x, bits, symmetric, mode):
    """(codes, scales, offsets) by the formulas of the docstring, in float32."""
    half, steps = 2 ** (bits - 1), f32(2**bits - 1)
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    if symmetric:
        s = np.abs(x).max(1, keepdims=True) / f32(half - 1)
        s[s == 0] = 1
        return np.clip(np.round(x / s), -half, half - 1), s, None
    if mode == "kernel":
        s = np.maximum((high - low) / steps, f32(1e-6))
        return np.clip(np.round((x - low) / s), 0, steps) - half, s, low + half * s
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    s = (high - low) / steps
    s[s == 0] = 1
    zero = np.round(-low / s)
    return np.clip(np.round(x / s) + zero, 0, steps) - half, s, s * (half - zero)


@pytest.mark.parametrize(("symmetric", "mode"), GRIDS)
def test_integers_equal_their_oracle_bit_for_bit(symmetric, mode):
    x = tokens()
    for bits in (2, 4, 8):
        codes, scales, offsets = quantize_tokens(jnp.asarray(x), integers(bits, symmetric, mode))
        want_codes, want_scales, want_offsets = oracle(x, bits, symmetric, mode)
        assert codes.dtype == jnp.int8
        np.testing.assert_array_equal(codes, want_codes)
        np.testing.assert_array_equal(scales, want_scales)
        if symmetric:
            assert offsets is None
        else:
            np.testing.assert_array_equal(offsets, want_offsets)
        value = np.asarray(fake_quantize(jnp.asarray(x), integers(bits, symmetric, mode)))
        want = want_scales.astype(float) * want_codes
        if want_offsets is not None:
            want = want + want_offsets.astype(float)
        # a product and a sum in float32, of terms up to twice the row's largest value
        np.testing.assert_allclose(value, want, rtol=0, atol=4e-7 * np.abs(x).max())
        assert not value[2].any()


def test_golden_token_of_quik():
    x = jnp.asarray([[-1, 0.5, 2, 0.25, -0.75, 1.5]], jnp.float32)
    codes, scales, offsets = quantize_tokens(x, integers(4))
    np.testing.assert_array_equal(codes[0], [-8, 0, 7, -2, -7, 4])
    assert offsets is not None
    np.testing.assert_allclose([scales[0, 0], offsets[0, 0]], [0.2, -1 + 8 * 0.2], rtol=1e-6)  # float32 of 0.2


def test_the_two_modes_differ_where_the_row_has_no_zero():
    x = jnp.asarray(tokens()[3:4])
    kernel, simulation = (
        float(jnp.abs(fake_quantize(x, integers(4, mode=m)) - x).max()) for m in ("kernel", "simulation")
    )
    low, high = float(x.min()), float(x.max())
    assert kernel <= (high - low) / 30 * 1.0001  # half a step of the row's own range
    assert simulation > kernel


def test_half_way_goes_to_the_even_code():
    x = jnp.asarray([[0.0, 0.5, 1.5, 2.5, 15.0]], jnp.float32)  # steps of exactly 1
    for mode in ("kernel", "simulation"):
        np.testing.assert_array_equal(quantize_tokens(x, integers(4, mode=mode)).codes[0] + 8, [0, 0, 2, 2, 15])
    x = jnp.asarray([[0.5, 1.5, -0.5, -2.5, 7.0]], jnp.float32)
    np.testing.assert_array_equal(quantize_tokens(x, integers(4, symmetric=True)).codes[0], [0, 2, 0, -2, 7])


def test_zero_survives_the_simulation_and_symmetric_grids():
    x = jnp.asarray(tokens(4, 40, 3)).at[:, 5].set(0.0)
    symmetric = fake_quantize(x, integers(4, symmetric=True))
    assert not np.asarray(symmetric)[:, 5].any()
    simulation = np.asarray(fake_quantize(x, integers(4, mode="simulation")))[:, 5]
    # s q + s (h - zp) with q = zp - h: the two products may be rounded apart by a fused multiply-add
    np.testing.assert_allclose(simulation, 0, atol=1e-6 * float(jnp.abs(x).max()))


TABLE = np.asarray([-3.1, -1.2, -0.4, 0.05, 0.3, 0.9, 1.7, 3.3], f32)


def test_table_picks_the_nearest_entry_and_the_lower_on_ties():
    x = tokens()
    codes, scales = assign_tokens(jnp.asarray(x), by_table(TABLE))
    z, s = normalize_tokens(jnp.asarray(x))
    np.testing.assert_allclose(s[:, 0], np.abs(x.astype(float)).mean(1), rtol=1e-6)  # a float32 mean of 40
    assert codes.dtype == jnp.uint8
    np.testing.assert_array_equal(codes, np.abs(np.asarray(z)[..., None] - TABLE).argmin(-1))
    value = np.asarray(fake_quantize(jnp.asarray(x), by_table(TABLE)))
    np.testing.assert_array_equal(value, np.asarray(scales) * TABLE[np.asarray(codes)])
    assert not value[2].any()
    # mean |x| is 1, so z = x: 0.5 lies half-way between 0 and 1, and -0.5 between -1 and 0
    half_way = jnp.asarray([[0.5, -0.5, 1.5, 1.5]], jnp.float32)
    np.testing.assert_array_equal(assign_tokens(half_way, by_table([-1, 0, 1, 2]))[0][0], [1, 0, 2, 2])


def test_a_table_of_256_entries_reaches_all_its_codes():
    table = np.linspace(-4, 4, 256).astype(f32)
    x = np.random.default_rng(1).normal(size=(4, 500)).astype(f32)
    codes, _ = assign_tokens(jnp.asarray(x), by_table(table))
    z = np.asarray(normalize_tokens(jnp.asarray(x))[0])
    distance = np.abs(z - table[np.asarray(codes)])
    assert distance[np.abs(z) < 4].max() <= 4 / 255 * 1.001  # half a step, and z's rounding
    assert np.asarray(codes).max() > 200


def kept_by_sorting(x, k):
    """The k largest and k smallest of each row, lower index first among equals."""
    mask = np.zeros(x.shape, bool)
    for row, values in enumerate(x):
        for sign in (1, -1):
            mask[row, np.argsort(-sign * values, kind="stable")[:k]] = True
    return mask


def test_kept_entries_are_the_extremes_and_the_lower_index_wins_ties():
    x = np.round(tokens(8, 40, 5) * 2) / 2  # many ties
    x[0, ::2] = -0.0  # as large as 0.0
    for percent, k in ((2.5, 1), (6.0, 3), (10.0, 4)):
        for a in (by_table(TABLE, percent), integers(4, percent=percent)):
            keep = np.asarray(keep_mask(jnp.asarray(x), a))
            np.testing.assert_array_equal(keep, kept_by_sorting(x, k))
            value = np.asarray(fake_quantize(jnp.asarray(x), a))
            np.testing.assert_array_equal(value[keep], x[keep])
    # the scale does not know what is kept: all others are as without
    a = by_table(TABLE, 6.0)
    keep, value = keep_mask(jnp.asarray(x), a), fake_quantize(jnp.asarray(x), a)
    plain = fake_quantize(jnp.asarray(x), dataclasses.replace(a, outlier_percent=0.0))
    np.testing.assert_array_equal(np.where(keep, 0, value), np.where(keep, 0, plain))


def test_kept_count_is_an_exact_ceiling():
    assert [keep_count(0.5, 4096), keep_count(0.5, 600), keep_count(1.1, 1000), keep_count(0, 7)] == [21, 3, 11, 0]
    assert keep_count(1e-3, 8) == 1
    with pytest.raises(ValueError, match="0 <= percent <= 50"):
        keep_count(51, 8)


def test_integer_range_is_that_of_what_is_not_kept():
    x = np.random.default_rng(2).uniform(-1, 1, size=(3, 40)).astype(f32)
    x[:, 7], x[:, 9] = 1000, -2000
    for symmetric, mode in GRIDS:
        a = integers(8, symmetric, mode, 2.5)
        codes, scales, _ = quantize_tokens(jnp.asarray(x), a)
        assert float(scales.max()) < 2.01 / 255 + 2.01 / 255 * symmetric
        assert codes[0, 7] == 127 and codes[0, 9] == -128  # saturated, not wrapped
        error = np.abs(np.asarray(fake_quantize(jnp.asarray(x), a)) - x)
        assert error[:, [7, 9]].max() == 0
        assert error.max() <= float(scales.max()) * 0.51


def test_everything_is_kept_from_half_on():
    x = jnp.asarray(tokens())
    for columns, percent in ((40, 50.0), (3, 40.0), (1, 1.0)):
        for a in (integers(4, percent=percent), integers(4, True, percent=percent), by_table(TABLE, percent)):
            np.testing.assert_array_equal(fake_quantize(x[:, :columns], a), x[:, :columns])


def test_static_thresholds_keep_what_lies_outside():
    x = jnp.asarray(tokens())
    a = by_table(TABLE, thresholds=[-1.5, 2.0])
    z, _ = normalize_tokens(x)
    np.testing.assert_array_equal(keep_mask(x, a), (z < -1.5) | (z > 2.0))
    assert bool(keep_mask(x, a).any())
    np.testing.assert_array_equal(fake_quantize(x, a), jnp.where(keep_mask(x, a), x, fake_quantize(x, by_table(TABLE))))
    nothing = by_table(TABLE, thresholds=[-jnp.inf, jnp.inf])
    assert not bool(keep_mask(x, nothing).any())


def test_a_token_that_is_not_finite_stays_alone():
    x = tokens()
    bad = x.copy()
    bad[0, 3], bad[4, 1], bad[5, :] = np.inf, np.nan, -np.inf
    for a in (
        integers(4),
        integers(4, mode="simulation"),
        integers(4, True),
        integers(4, percent=5.0),
        integers(4, percent=50.0),
        by_table(TABLE),
        by_table(TABLE, 5.0),
        by_table(TABLE, thresholds=[-2, 2]),
    ):
        value, good = np.asarray(fake_quantize(jnp.asarray(bad), a)), np.asarray(fake_quantize(jnp.asarray(x), a))
        assert np.isnan(value[[0, 4, 5]]).all() or a.outlier_percent == 50
        np.testing.assert_array_equal(value[1:4], good[1:4])
        assert not bool(keep_mask(jnp.asarray(bad), a)[jnp.asarray([0, 4, 5])].any())
    assert not bool(quantize_tokens(jnp.asarray(bad), integers(4)).codes[0].any())


def test_huge_and_tiny_tokens_stay_finite():
    largest, smallest = np.finfo(f32).max, np.finfo(f32).tiny
    x = np.tile(np.asarray([1, -1, 0.5, 0.25, 0, -0.5, 0.1, 1], f32), (3, 1))
    x[0] *= largest / 4  # a step or a table entry above the largest value must still be a number
    x[1] *= smallest
    x[2] = [smallest, 0, 0, 0, 0, 0, 0, 0]
    for a in (
        integers(4),
        integers(4, mode="simulation"),
        integers(4, True),
        integers(8, percent=12.5),
        by_table(TABLE),
    ):
        value = np.asarray(fake_quantize(jnp.asarray(x), a))
        assert np.isfinite(value).all()


def test_codes_reach_both_ends_and_dequantize_as_said():
    x = jnp.asarray(tokens())
    for bits in range(2, 9):
        t = quantize_tokens(x, integers(bits))
        assert int(t.codes.min()) == -(2 ** (bits - 1)) and int(t.codes.max()) == 2 ** (bits - 1) - 1
    assert t.offsets is not None
    np.testing.assert_array_equal(dequantize_tokens(t), t.scales * t.codes.astype(jnp.float32) + t.offsets)
    half = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        fake_quantize(half, integers(4)), fake_quantize(half.astype(jnp.float32), integers(4))
    )


def test_wrong_use_is_a_value_error():
    x = jnp.zeros((2, 4))
    with pytest.raises(ValueError, match="assign_tokens"):
        quantize_tokens(x, by_table(TABLE))
    with pytest.raises(ValueError, match="quantize_tokens"):
        assign_tokens(x, integers(4))
    with pytest.raises(ValueError, match="2 to 8"):
        quantize_tokens(x, integers(9))
    with pytest.raises(ValueError, match="'kernel' or 'simulation'"):
        quantize_tokens(x, dataclasses.replace(integers(4), mode="other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, r"p: activation\.bits is 1"),
        ({"mode": "fast"}, r"p: activation\.mode is 'fast'"),
        ({"outlier_percent": 60.0}, r"p: activation\.outlier_percent is 60"),
        ({"outlier_percent": math.nan}, r"outlier_percent is nan"),
        ({"codebook": jnp.zeros((4,))}, r"codebook has shape \(4,\); expected \(8,\)"),
        ({"codebook": jnp.zeros((8,), jnp.int32)}, r"codebook is int32"),
        ({"thresholds": jnp.zeros((3,))}, r"thresholds has shape \(3,\); expected \(2,\)"),
    ],
)
def test_invalid_fields_are_named(change, message):
    good = by_table(TABLE, 0.5, [-1, 1])
    validate_activation(good, "p")
    validate_activation(jax.eval_shape(lambda: good), "p")
    with pytest.raises(ValueError, match=message):
        validate_activation(dataclasses.replace(good, **change), "p")


def test_arrays_are_data_and_the_rest_is_structure():
    leaves, structure = jax.tree.flatten(by_table(TABLE, 0.5, [-1, 1]))
    assert len(leaves) == 2
    assert structure != jax.tree.structure(by_table(TABLE, 1.0, [-1, 1]))
    assert jax.tree.structure(integers(4)) != jax.tree.structure(integers(4, mode="simulation"))
