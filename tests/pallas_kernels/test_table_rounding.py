"""Tables in bfloat16 with a factor a row: the best of the candidates, exact where that can be, and small errors."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.codebook_matmul import rounded_tables
from pallas_kernels.codebook_matmul.rounding import CANDIDATES

OUTPUT = 1.66e-3  # relative error of rounding to bfloat16


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def _meant(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the tables and the factors stand for, and the factors."""
    rounded, factors = rounded_tables(jnp.asarray(table))
    assert rounded.dtype == jnp.bfloat16 and factors.dtype == jnp.float32
    return np.asarray(rounded, np.float64) * np.asarray(factors, np.float64)[:, None], np.asarray(factors)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("entries", [4, 8, 16])
def test_the_factor_is_the_best_of_its_candidates(entries: int, dtype: type) -> None:
    table = np.random.default_rng(entries).normal(size=(60, entries)).astype(dtype)
    exact = table.astype(np.float64)
    meant, factors = _meant(table)
    candidates = 1 + np.arange(CANDIDATES, dtype=np.float32)[:, None, None] / np.float32(CANDIDATES)
    others = candidates * _rounded(table.astype(np.float32) / candidates)
    errors = np.sum((others - exact) ** 2, axis=2)
    own = np.sum((meant - exact) ** 2, axis=1)
    assert np.all((factors >= 1) & (factors < 2))
    np.testing.assert_allclose(own, errors.min(axis=0), rtol=1e-5)
    assert np.all(own <= np.sum((_rounded(table) - exact) ** 2, axis=1))


def test_what_is_bfloat16_already_keeps_the_factor_1() -> None:
    exact = _rounded(np.random.default_rng(0).normal(size=(20, 16)))
    odd = np.asarray([[0.0, 0.0], [np.inf, 1.01], [np.nan, 1.01]])
    for table in (exact, odd):
        meant, factors = _meant(table.astype(np.float32))
        np.testing.assert_array_equal(meant, _rounded(table))
        np.testing.assert_array_equal(factors, 1)
    # the size of the entries makes no difference: squares of such errors have no place in float32
    table = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_array_equal(_meant(table * np.float32(2.0**-90))[1], _meant(table)[1])
    np.testing.assert_array_equal(_meant(table * np.float32(2.0**90))[1], _meant(table)[1])


@pytest.mark.parametrize("entries", [8, 16])
@pytest.mark.parametrize("kind", ["normal", "k-means"])
def test_tables_and_outputs_round_less_than_two_thousandths(entries: int, kind: str) -> None:
    rng = np.random.default_rng(entries)
    if kind == "normal":
        table, use = rng.normal(size=(200, entries)), np.full((200, entries), 1.0)
    else:
        table, use = _k_means(rng.normal(size=(100, 2048)), entries)
    exact = table.astype(np.float16).astype(np.float64)
    size = np.sum(use * exact**2)
    error = np.sqrt(np.sum(use * (_meant(exact.astype(np.float16))[0] - exact) ** 2) / size)
    plain = np.sqrt(np.sum(use * (_rounded(exact) - exact) ** 2) / size)
    assert error <= 1e-3 < 1.5e-3 < plain
    assert np.hypot(error, OUTPUT) < 2e-3 < np.hypot(plain, OUTPUT)


def _k_means(samples: np.ndarray, entries: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables of the rows of samples, and how often every entry is in use."""
    rows = np.arange(samples.shape[0])[:, None]
    table = np.quantile(samples, (np.arange(entries) + 0.5) / entries, axis=1).T
    use = np.zeros_like(table)
    for _ in range(20):
        code = np.argmin(np.abs(samples[:, :, None] - table[:, None, :]), axis=2)
        use, sums = np.zeros_like(table), np.zeros_like(table)
        np.add.at(use, (rows, code), 1)
        np.add.at(sums, (rows, code), samples)
        table = sums / use
    return table, use
