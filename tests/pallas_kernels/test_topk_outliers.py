"""The selection by thresholds equals the selection by sorting, ties and signed zeros included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.format.activations import keep_count, mask_by_sorting, outlier_mask
from pallas_kernels import topk_outliers as tk
from tests.pallas_kernels.triton import count_kernels, lower_for_gpu


def _tokens(columns: int, dtype: str) -> jax.Array:
    """Random, of many equal values, zeros of either sign, all equal, and of the extremes of the type."""
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(6, columns)).astype(np.float32)
    x[1] = np.round(x[1])
    x[2], x[2, 3] = 0, -0.0
    x[3] = 1
    x[4, ::2], x[4, 1::2] = -0.0, 0
    big = float(jnp.finfo(dtype).max)
    x[5, :4] = [big, -big, big, -big]
    return jnp.asarray(x).astype(dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("columns", [50, 257])
def test_the_mask_is_that_of_sorting(columns: int, dtype: str) -> None:
    x = _tokens(columns, dtype)
    for percent in (0.0, 0.5, 30.0, 50.0):
        count = keep_count(percent, columns)
        expected = np.asarray(outlier_mask(x, percent))
        np.testing.assert_array_equal(jax.jit(tk.mask_xla, static_argnums=1)(x, count), expected)
        np.testing.assert_array_equal(tk.mask_rows(x, count, interpret=True), expected.astype(np.int8))


def test_a_token_that_is_not_finite_keeps_nothing() -> None:
    x = _tokens(50, "float32").at[0, 7].set(jnp.nan).at[1, 3].set(-jnp.inf)
    for count in (0, 3, 25):
        for mask in (tk.mask_xla(x, count), tk.mask_rows(x, count, interpret=True)):
            assert int(jnp.sum(mask[:2].astype(jnp.int32))) == 0
            np.testing.assert_array_equal(mask[2:], np.asarray(outlier_mask(x[2:], 2 * count)).astype(mask.dtype))


def test_what_the_kernel_cannot_serve_is_said() -> None:
    assert tk.supported(1, 32768, "bfloat16") is None
    for arguments, word in [
        ((1, 32769, "float32"), "32769"),
        ((1, 8, "int8"), "int8"),
        ((0, 8, "float32"), "0 tokens"),
    ]:
        assert word in (tk.supported(*arguments) or "")
    with pytest.raises(ValueError, match="0 tokens"):
        tk.mask_rows(jnp.zeros((0, 8), jnp.float32), 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_lowers_for_a_gpu_as_one_kernel(dtype: str) -> None:
    for shape, count in (((1, 8192), 41), ((5, 11008), 0), ((64, 200), 100)):
        x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        assert count_kernels(lower_for_gpu(lambda x, count=count: tk.mask_rows(x, count), x)) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_the_kernel_on_the_device_equals_sorting() -> None:
    for columns in (200, 8192, 11008):
        for dtype in ("bfloat16", "float16", "float32"):
            x = _tokens(columns, dtype)
            for percent in (0.5, 5.0):
                mask = tk.mask_rows(x, keep_count(percent, columns))
                np.testing.assert_array_equal(
                    np.asarray(mask).astype(bool), mask_by_sorting(x, keep_count(percent, columns))
                )
