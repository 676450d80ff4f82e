"""bfloat16 tokens as float16 tokens times a power of two: exact, alike by the kernel and by XLA, of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.half_tokens import convert, half_rows, half_tokens, supported_rows
from tests.pallas_kernels.triton import count_kernels, lower_for_gpu


def test_bfloat16_tokens_become_float16_ones_of_a_power_of_two_exactly() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 33)) * 2.0 ** rng.integers(-8, 8, (40, 33)) * 2.0 ** rng.integers(-80, 80, (40, 1))
    x = np.concatenate([x, np.zeros((1, 33)), np.full((1, 33), 3.38e38), np.full((1, 33), 1.2e-38)])
    x = jnp.asarray(x, jnp.bfloat16)
    half, scales = jax.jit(half_tokens)(x)
    for kernel, specified in zip(half_rows(x, interpret=True), (half, scales), strict=True):
        np.testing.assert_array_equal(kernel, specified)
    exact = np.asarray(x, np.float64)
    assert half.dtype == jnp.float16 and scales.shape == (43,)
    np.testing.assert_array_equal(np.asarray(half, np.float64) * np.asarray(scales, np.float64)[:, None], exact)
    assert np.all(np.exp2(np.round(np.log2(scales))) == scales)
    largest = np.abs(np.asarray(half, np.float64)).max(1)[:40]
    assert np.all((largest >= 2**14) & (largest < 2**15))
    # what is far below a token's largest is rounded, by less than 2**-39 of it
    wide = jnp.asarray([[1.9, 1.9 * 2.0**-31, 1.7 * 2.0**-36, 2.0**-60]], jnp.bfloat16)
    half, scales = half_tokens(wide)
    error = np.abs(np.asarray(half, np.float64) * float(scales[0]) - np.asarray(wide, np.float64))
    assert error[0, 1] == 0 and np.all(error < 1.9 * 2.0**-39)
    odd = jnp.asarray([[np.inf, 1.0, 0.0], [np.nan, 1.0, 0.0], [1.0, 2.0, 4.0]], jnp.bfloat16)
    half, scales = half_tokens(odd)
    assert np.isinf(half[0, 0]) and np.isnan(half[1, 0]) and np.all(np.isfinite(half[2])) and np.all(scales > 0)
    assert np.all(np.isfinite(half[:, 1:])) and np.all(np.isfinite(scales))


def test_the_kernel_says_what_it_cannot_do_and_xla_does_that() -> None:
    assert supported_rows(3, 128, jnp.bfloat16) is None
    assert "K=40000 exceeds" in str(supported_rows(3, 40000, jnp.bfloat16))
    assert "not bfloat16" in str(supported_rows(3, 128, jnp.float16))
    with pytest.raises(ValueError, match="are none"):
        half_rows(jnp.zeros((0, 64), jnp.bfloat16))
    for columns, kernels in ((4096, 1), (40000, 0)):
        x = jax.ShapeDtypeStruct((300, columns), jnp.bfloat16)
        assert count_kernels(lower_for_gpu(convert, x)) == kernels
