"""The sparse sum against NumPy float64, with empty rows, without entries and without tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse_matmul import gather_sum


@pytest.mark.parametrize(("tokens", "entries"), [(3, 11), (1, 0), (0, 11)])
def test_gather_sum_is_the_sparse_product(tokens: int, entries: int) -> None:
    rng = np.random.default_rng(0)
    rows = np.sort(rng.choice([0, 1, 3, 6], entries)).astype(np.int32)  # rows 2, 4 and 5 have no entry
    columns = rng.integers(0, 9, entries).astype(np.uint16)
    values = rng.normal(size=entries).astype(np.float16)
    x = rng.normal(size=(tokens, 9)).astype(np.float32)
    dense = np.zeros((7, 9))
    np.add.at(dense, (rows, columns), values.astype(np.float64))
    y = gather_sum(jnp.asarray(x), jnp.asarray(values), jnp.asarray(columns), jnp.asarray(rows), 7)
    assert y.dtype == jnp.float32
    # at most eleven float32 terms of order one
    np.testing.assert_allclose(y, x.astype(np.float64) @ dense.T, atol=1e-5)
