"""The streamed product and the decoded matrix against NumPy float64, on widths and sizes that divide nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequant_matmul import Affine, Codebook, decode, matvec
from pallas_kernels.packing import pack_codes

N = 13


def _words(codes: np.ndarray, bits: int) -> jax.Array:
    return pack_codes(jnp.asarray(codes), bits).T


def _affine(bits: int, columns: int, size: int, axis: Any, symmetric: bool) -> tuple[Affine, np.ndarray]:
    """A weight and its dense matrix [N, K]."""
    rng = np.random.default_rng(columns)
    codes = rng.integers(0, 2**bits, (N, columns), dtype=np.uint8)
    groups = (-(-columns // size), N) if axis == "in" else (columns, -(-N // size))
    scales = rng.normal(size=groups).astype(np.float16)
    zeros = rng.integers(0, 2**bits, groups, dtype=np.uint8)
    offset = np.full(groups, 2 ** (bits - 1)) if symmetric else zeros
    spread = (
        (lambda v: np.repeat(v, size, axis=0)[:columns].T)
        if axis == "in"
        else (lambda v: np.repeat(v, size, axis=1)[:, :N].T)
    )
    dense = spread(scales.astype(np.float64)) * (codes.astype(np.float64) - spread(offset.astype(np.float64)))
    packed = None if symmetric else jnp.asarray(zeros)
    return Affine(_words(codes, bits), jnp.asarray(scales), packed, bits, size, axis, (N, columns)), dense


def _codebook(bits: int, columns: int, rows: int, scaled: bool) -> tuple[Codebook, np.ndarray]:
    rng = np.random.default_rng(columns)
    codes = rng.integers(0, 2**bits, (N, columns), dtype=np.uint8)
    table = rng.normal(size=(2**bits, rows)).astype(np.float32)
    scales = rng.normal(size=N).astype(np.float32)
    dense = np.broadcast_to(table, (2**bits, N)).T[np.arange(N)[:, None], codes].astype(np.float64)
    if scaled:
        dense = dense * scales[:, None].astype(np.float64)
    packed = jnp.asarray(scales) if scaled else None
    return Codebook(_words(codes, bits), jnp.asarray(table), packed, bits, (N, columns)), dense


WEIGHTS = {
    "2 bits, groups of 8": _affine(2, 40, 8, "in", False),
    "3 bits, groups astride the steps": _affine(3, 45, 12, "in", False),
    "4 bits, symmetric, a group a row": _affine(4, 33, 33, "in", True),
    "5 bits, groups of outputs, ragged": _affine(5, 21, 5, "out", False),
    "8 bits, symmetric, groups of outputs": _affine(8, 9, 13, "out", True),
    "one column": _affine(4, 1, 1, "in", False),
    "table of 4": _codebook(2, 40, N, False),
    "table of 8, one for all, scaled": _codebook(3, 45, 1, True),
    "table of 32": _codebook(5, 21, N, True),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_decode_and_matvec_mean_the_dense_matrix(name: str) -> None:
    weight, dense = WEIGHTS[name]
    x = np.random.default_rng(0).normal(size=(3, dense.shape[1])).astype(np.float32)
    decoded, y = jax.jit(lambda x, w: (decode(w, jnp.dtype(jnp.float32)), matvec(x, w)))(jnp.asarray(x), weight)
    np.testing.assert_allclose(decoded, dense.T, rtol=1e-6)
    # float32 sums of K products: the error grows with the sum of their sizes
    size = np.abs(x).astype(np.float64) @ np.abs(dense).T
    assert np.all(np.abs(y - x.astype(np.float64) @ dense.T) <= 1e-6 * size + 1e-12)


def test_decode_gives_the_type_asked_for() -> None:
    weight, dense = WEIGHTS["table of 4"]
    decoded = decode(weight, jnp.dtype(jnp.bfloat16))
    assert decoded.dtype == jnp.bfloat16 and decoded.shape == dense.T.shape


def test_no_tokens_give_no_rows() -> None:
    weight, dense = WEIGHTS["one column"]
    assert matvec(jnp.zeros((0, dense.shape[1])), weight).shape == (0, N)


def test_no_inputs_give_zeros() -> None:
    weight, _ = _codebook(3, 0, N, False)
    np.testing.assert_array_equal(matvec(jnp.zeros((2, 0)), weight), np.zeros((2, N)))
    assert decode(weight, jnp.dtype(jnp.float32)).shape == (0, N)
