"""Arithmetic on indices equals dequantizing first, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.activations import ActivationQuant, assign_tokens, fake_quantize, keep_mask
from jquant.format.index_ops import (
    Indexed,
    compensation,
    costs,
    decode,
    elementwise,
    gated_product,
    index_matmul,
    rms_norm,
    softmax,
)

M, N, K = 3, 5, 48
# Sums of 48 float32 products in two orders, relative to the largest result.
NEAR = 1e-6


def close(found, want):
    np.testing.assert_allclose(found, want, rtol=0, atol=NEAR * max(1.0, float(np.abs(want).max())))


def tables(bits_a=4, bits_w=3):
    rng = np.random.default_rng(1)
    return (jnp.asarray(np.sort(rng.normal(size=2**b)), jnp.float32) for b in (bits_a, bits_w))


def product(percent=3.0):
    """x, its quantizer, and a weight as codes, scales and table."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_t(3, size=(M, K)), jnp.float32)
    C_A, C_W = tables()
    weight = (
        jnp.asarray(rng.integers(0, C_W.size, size=(N, K)), jnp.uint8),
        jnp.asarray(rng.uniform(0.5, 2, size=N), jnp.float32),
        C_W,
    )
    return x, ActivationQuant(C_A, None, 4, outlier_percent=percent), weight


def dense(codes, scales, table):
    return np.asarray(scales, np.float64)[:, None] * np.asarray(table, np.float64)[np.asarray(codes)]


def indexed(seed=0, percent=3.0, size=1.0):
    x = size * jnp.asarray(np.random.default_rng(seed).standard_t(3, size=(M, K)), jnp.float32)
    a = ActivationQuant(next(tables()), None, 4, outlier_percent=percent)
    codes, scales = assign_tokens(x, a)
    return Indexed(codes, scales, jnp.asarray(a.codebook)[None], keep_mask(x, a), x)


def test_counting_pairs_is_the_dequantized_product():
    x, a, weight = product()
    codes, scales = assign_tokens(x, a)
    want = np.asarray(scales, np.float64) * np.asarray(a.codebook, np.float64)[np.asarray(codes)] @ dense(*weight).T
    close(index_matmul(codes, scales, a.codebook, *weight), want)
    with pytest.raises(ValueError, match="one K"):
        index_matmul(codes[:, 1:], scales, a.codebook, *weight)


def test_worked_example_of_one_bit():
    """Four pairs of codes: counts times the table of products."""
    C_A, C_W = jnp.asarray([-1.0, 2.0]), jnp.asarray([0.5, 3.0])
    x, w = jnp.asarray([[0, 1, 1, 0, 1, 0]]), jnp.asarray([[0, 0, 1, 1, 1, 0]])
    y = index_matmul(x, jnp.full((1, 1), 2.0), C_A, w, jnp.asarray([10.0]), C_W)
    # pairs (0,0) twice, (0,1) once, (1,0) once, (1,1) twice
    assert float(y[0, 0]) == 20 * (2 * -0.5 + 1 * -3.0 + 1 * 1.0 + 2 * 6.0)


def test_look_ahead_and_compensation_are_the_masked_product():
    x, a, weight = product()
    codes, scales = assign_tokens(x, a)
    keep = keep_mask(x, a)
    assert int(keep.sum()) == M * 2 * 2
    ahead = index_matmul(codes, scales, a.codebook, *weight)
    rest = compensation(x, keep, codes, scales, a.codebook, *weight)
    want = np.asarray(fake_quantize(x, a), np.float64) @ dense(*weight).T
    close(ahead + rest, want)
    assert float(jnp.abs(rest).max()) > 0.1  # what was kept did matter
    assert not np.asarray(compensation(x, keep & False, codes, scales, a.codebook, *weight)).any()


@pytest.mark.parametrize("percent", [0.0, 3.0, 50.0])
def test_nonlinear_functions_equal_dequantize_then_apply(percent):
    x, up = indexed(0, percent), indexed(1, percent)
    X, U = (np.asarray(decode(v), np.float64) for v in (x, up))
    np.testing.assert_array_equal(np.asarray(X)[np.asarray(x.keep)], np.asarray(x.exact)[np.asarray(x.keep)])
    silu = X / (1 + np.exp(-X))
    close(decode(elementwise(jax.nn.silu, x)), silu)
    close(decode(gated_product(jax.nn.silu, x, up)), silu * U)
    normed = rms_norm(x, 1e-5)
    close(decode(normed), X / np.sqrt(np.mean(X**2, 1, keepdims=True) + 1e-5))
    np.testing.assert_array_equal(normed.codes, x.codes)
    e = np.exp(X - X.max(1, keepdims=True))
    close(decode(softmax(x)), e / e.sum(1, keepdims=True))


def test_operations_follow_one_another():
    """A gated MLP's input to its last product: norm, two functions of it, their product; indices all the way."""
    x = indexed(2)
    gate = rms_norm(x)
    chained = gated_product(jax.nn.silu, gate, elementwise(jnp.tanh, gate))
    X = np.asarray(decode(x), np.float64)
    X = X / np.sqrt(np.mean(X**2, 1, keepdims=True) + 1e-6)
    close(decode(chained), X / (1 + np.exp(-X)) * np.tanh(X))


def test_softmax_of_large_values_neither_overflows_nor_vanishes():
    x = indexed(3, size=1e4)
    # the table's largest entry occurs nowhere: it must not set the maximum
    x = x._replace(codes=jnp.minimum(x.codes, 9), keep=x.keep & (x.exact < 0))
    p = np.asarray(decode(softmax(x)), np.float64)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)
    X = np.asarray(decode(x), np.float64)
    assert np.array_equal(p.argmax(1), X.argmax(1))


def test_costs_are_those_of_the_paper():
    both = costs(1, 4096, 4096, 4, 4)
    assert both.index.table_entries - both.dequantized.table_entries == 256
    # a weight-only table of groups of 4 inputs has 2**4 * K / 4 entries, and K / 4 * 4 additions an output
    assert 2**4 * 4096 / 4 / 256 == 64
    assert both.dequantized.multiply_adds == 4096 * 4096 == both.index.increments
    assert both.index.multiply_adds == 4096 * 256 + 256
    assert both.index.lookups == 0 and both.dequantized.lookups == 4096 * 4097
