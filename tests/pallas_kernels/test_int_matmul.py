"""Integer products: exact sums up to the length that int32 allows, QUIK's worked example, the dequantized product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int_matmul import LONGEST_SUM, code_sums, integer_dot, quantized_matmul, xla


def _codes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape, dtype=np.int8)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 5, 7), (3, 1, 37), (0, 4, 8), (6, 9, 1), (2, 3, 0)])
def test_integer_dot_is_exact(tokens: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(columns)
    x, w = _codes(rng, tokens, columns), _codes(rng, rows, columns)
    y = integer_dot(jnp.asarray(x), jnp.asarray(w))
    assert y.dtype == jnp.int32 and y.shape == (tokens, rows)
    np.testing.assert_array_equal(y, x.astype(np.int64) @ w.astype(np.int64).T)


def test_the_longest_sum_of_the_largest_products_fits_int32() -> None:
    assert LONGEST_SUM == 131071
    lowest = jnp.full((1, LONGEST_SUM), -128, jnp.int8)
    assert int(integer_dot(lowest, lowest)[0, 0]) == 131071 * 2**14
    rng = np.random.default_rng(0)
    x, w = _codes(rng, 1, LONGEST_SUM), _codes(rng, 1, LONGEST_SUM)
    assert int(integer_dot(jnp.asarray(x), jnp.asarray(w))[0, 0]) == int(x[0].astype(np.int64) @ w[0].astype(np.int64))


def test_worked_example_of_quik() -> None:
    # x = [-1, .5, 2, .25, -.75, 1.5] in 4 bits: step .2, least -1, so offset -1 + 8 * .2
    x_codes = jnp.asarray([[-8, 0, 7, -2, -7, 4]], jnp.int8)
    w_codes = jnp.asarray([[7, -3, 2, 0, -8, 5], [1, 1, -1, 4, 3, -2]], jnp.int8)
    w_scales = jnp.asarray([[0.1], [0.05]], jnp.float32)
    assert integer_dot(x_codes, w_codes).tolist() == [[34, -52]]
    reduced = w_scales[:, 0] * code_sums(w_codes, 6)[:, 0].astype(jnp.float32)
    np.testing.assert_allclose(reduced, [0.3, 0.3], rtol=1e-6)
    y = quantized_matmul(x_codes, jnp.full((1, 1), 0.2), jnp.full((1, 1), 0.6), w_codes, w_scales, None, 6)
    # three float32 operations on numbers of order one
    np.testing.assert_allclose(y, [[0.86, -0.34]], atol=1e-6)


CASES = [
    # tokens, rows, columns, group_size, zeros, offsets
    (3, 5, 24, 24, False, False),
    (1, 5, 24, 24, True, True),
    (4, 1, 24, 8, True, True),
    (2, 3, 29, 8, True, True),  # a last group of five
    (5, 4, 29, 8, False, True),
    (2, 3, 7, 16, True, True),  # one group, longer than the row
    (0, 3, 29, 8, True, True),
]


@pytest.mark.parametrize(("tokens", "rows", "columns", "size", "zeros", "offsets"), CASES)
def test_product_is_that_of_the_dequantized_matrices(
    tokens: int, rows: int, columns: int, size: int, zeros: bool, offsets: bool
) -> None:
    rng = np.random.default_rng(columns + size)
    groups = -(-columns // size)
    x, w = _codes(rng, tokens, columns), _codes(rng, rows, columns)
    x_scales = rng.uniform(0.01, 1, (tokens, 1)).astype(np.float32)
    x_offsets = rng.normal(size=(tokens, 1)).astype(np.float32)
    w_scales = rng.uniform(0.01, 1, (rows, groups)).astype(np.float32)
    w_zeros = rng.integers(-128, 128, (rows, groups)).astype(np.int8)

    x_hat = x_scales.astype(np.float64) * x + (x_offsets if offsets else 0)
    group = np.arange(columns) // size
    w_hat = w_scales.astype(np.float64)[:, group] * (w.astype(np.float64) - (w_zeros[:, group] if zeros else 0))

    arrays = jax.tree.map(jnp.asarray, (x, x_scales, x_offsets if offsets else None, w, w_scales))
    run = jax.jit(functools.partial(quantized_matmul, group_size=size))
    y = run(*arrays, jnp.asarray(w_zeros) if zeros else None)
    assert y.dtype == jnp.float32 and y.shape == (tokens, rows)
    # integers are exact; what is left are a dozen float32 roundings of the terms summed
    terms = np.abs(x_hat) @ np.abs(w_hat).T + np.abs(x_scales * 128) @ np.abs(w_hat).sum(1, keepdims=True).T
    assert np.all(np.abs(y - x_hat @ w_hat.T) <= 1e-6 * terms)
    if offsets:
        known = run(*arrays, jnp.asarray(w_zeros) if zeros else None, w_sums=code_sums(arrays[3], size))
        np.testing.assert_array_equal(known, y)


@pytest.mark.parametrize(("limit", "columns"), [(10**6, 48), (10**6, 53), (45, 48)])
def test_groups_taken_together_give_the_same_sum(monkeypatch: pytest.MonkeyPatch, limit: int, columns: int) -> None:
    rng = np.random.default_rng(limit)
    groups = -(-columns // 8)
    x, w = jnp.asarray(_codes(rng, 3, columns)), jnp.asarray(_codes(rng, 5, columns))
    scales = jnp.asarray(rng.uniform(0.1, 1, (5, groups)), jnp.float32)
    zeros = jnp.asarray(_codes(rng, 5, groups))
    one = jnp.ones((3, 1))
    alone = quantized_matmul(x, one, one, w, scales, zeros, 8)
    monkeypatch.setattr(xla, "platform", lambda: "gpu")
    monkeypatch.setattr(xla, "PARTIAL_SUMS", limit)  # 45: three of the six groups at a time
    # the same float32 terms, summed in another order
    together = quantized_matmul(x, one, one, w, scales, zeros, 8)
    np.testing.assert_allclose(together, alone, atol=1e-6 * float(jnp.abs(scales).sum()) * 128 * 255)


def test_integer_part_is_exact_and_float_zeros_are_integers() -> None:
    rng = np.random.default_rng(3)
    x, w, zeros = _codes(rng, 4, 96), _codes(rng, 6, 96), rng.integers(-8, 8, (6, 3)).astype(np.float32)
    ones = jnp.ones((4, 1)), jnp.ones((6, 3))
    expected = x.astype(np.int64) @ (w - np.repeat(zeros, 32, axis=1).astype(np.int64)).T
    y = quantized_matmul(jnp.asarray(x), ones[0], None, jnp.asarray(w), ones[1], jnp.asarray(zeros), 32)
    # every sum here is an integer below 2**24, which float32 holds
    np.testing.assert_array_equal(y, expected)


def test_wide_8_bit_layers_stay_finite() -> None:
    columns = 28672
    x, w = jnp.full((1, columns), -128, jnp.int8), jnp.full((1, columns), 127, jnp.int8)
    one = jnp.ones((1, 1))
    y = quantized_matmul(x, one, one, w, one, None, columns)
    assert float(y[0, 0]) == -127 * 127 * columns  # (-128 + 1) * 127 a term; below 2**29, and 2**12 divides it


def test_no_columns_give_zeros() -> None:
    empty = jnp.zeros((2, 0), jnp.int8), jnp.ones((2, 1))
    y = quantized_matmul(empty[0], empty[1], empty[1], jnp.zeros((3, 0), jnp.int8), jnp.ones((3, 1)), None, 1)
    np.testing.assert_array_equal(y, np.zeros((2, 3)))


def test_bad_arguments_say_what_was_expected() -> None:
    x, one = jnp.zeros((1, 8), jnp.int8), jnp.ones((1, 1))
    long, longer = jnp.zeros((1, 65794), jnp.int8), jnp.zeros((1, 131072), jnp.int8)
    with pytest.raises(ValueError, match="int8 codes"):
        integer_dot(x.astype(jnp.int32), x)
    with pytest.raises(ValueError, match="8 inputs, w 4"):
        integer_dot(x, x[:, :4])
    with pytest.raises(ValueError, match="split the sum into 131071"):
        integer_dot(longer, longer)
    with pytest.raises(ValueError, match=r"w_scales has shape \(1, 1\); expected \(1, 2\)"):
        quantized_matmul(x, one, None, x, one, None, 4)
    with pytest.raises(ValueError, match="symmetric"):
        quantized_matmul(long, one, None, long, one, one, 65794)
    with pytest.raises(ValueError, match="no size"):
        quantized_matmul(x, one, None, x, one, None, 0)
