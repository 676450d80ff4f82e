"""Rotations: the transform is the matrix its description says, whatever the size, and weights can live behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from jquant.format import tree as trees
from jquant.format.rotation import Rotation, Transformed, matrix, rotate, signs, unrotate
from jquant.format.weights import QuantizedLinear, affine_weight, dequantize
from jquant.linear import linear

# powers of two; 2**k times 3, 7, 9, 43 as models have them; three factors (18944 = 2**9 * 37); odd and prime sizes
SIZES = (1, 2, 3, 64, 576, 1536, 4096, 11008, 14336, 18944, 45, 131, 262)


def splitmix_signs(seed: int, size: int) -> list[int]:
    """The published generator (Steele, Lea, Flood 2014) in whole numbers of any length: top bit set means -1."""
    found, state, mask = [], seed, 2**64 - 1
    for _ in range(size):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(-1 if (z ^ (z >> 31)) >> 63 else 1)
    return found


def rotated(x: np.ndarray, seed: int) -> np.ndarray:
    """x R^T in float64: butterflies over the power of two, SciPy's DCT over the odd rest."""
    size = x.shape[-1]
    power = size & -size
    y = (x * np.asarray(splitmix_signs(seed, size))).reshape(-1, power, size // power)
    y = np.asarray(scipy.fft.dct(y, type=2, norm="ortho", axis=-1))
    half = 1
    while half < power:
        y = y.reshape(y.shape[0], -1, 2, half, size // power)
        y = np.concatenate([y[:, :, :1] + y[:, :, 1:], y[:, :, :1] - y[:, :, 1:]], axis=2)
        y, half = y.reshape(y.shape[0], power, -1), 2 * half
    return y.reshape(x.shape) / np.sqrt(power)


@pytest.mark.parametrize("size", SIZES)
def test_rotate_is_signs_then_hadamard_times_dct_and_unrotate_its_inverse(size: int) -> None:
    x = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
    r = Rotation(size, 11)
    y = rotate(jnp.asarray(x), r)
    # values of order 1, float32 sums of at most 262 of them
    np.testing.assert_allclose(y, rotated(x.astype(np.float64), 11), atol=5e-6)
    np.testing.assert_allclose(unrotate(y, r), x, atol=5e-6)


@pytest.mark.parametrize("size", [1, 3, 64, 96, 576])
def test_matrix_is_orthogonal_and_what_rotate_multiplies_by(size: int) -> None:
    r = Rotation(size, 2)
    R = np.asarray(matrix(r), np.float64)
    np.testing.assert_allclose(R @ R.T, np.eye(size), atol=1e-6)
    x = np.random.default_rng(0).standard_normal((4, size)).astype(np.float32)
    np.testing.assert_allclose(rotate(jnp.asarray(x), r), x @ R.T, atol=5e-6)  # as above


def test_signs_are_the_same_everywhere() -> None:
    golden = [-1, 1, 1, -1, 1, 1, 1, -1, 1, -1, 1, -1, -1, -1, -1, -1]
    assert signs(Rotation(16, 0)).tolist() == golden
    assert signs(Rotation(64, 0))[:16].tolist() == golden  # a sign depends on its place, not on the size
    for seed in (1, 7, 2**64 - 1):
        assert signs(Rotation(300, seed)).tolist() == splitmix_signs(seed, 300)
    assert abs(signs(Rotation(10000, 3)).astype(int).sum()) < 400  # four standard deviations of a fair coin
    assert not np.array_equal(signs(Rotation(64, 1)), signs(Rotation(64, 2)))


def test_one_loud_channel_is_spread_evenly() -> None:
    x = jnp.zeros((64,)).at[5].set(8.0)
    np.testing.assert_allclose(jnp.abs(rotate(x, Rotation(64, 3))), 1.0, rtol=1e-6)


def test_shape_and_type_are_kept_and_float32_is_inside() -> None:
    r = Rotation(96, 0)
    x = np.random.default_rng(0).standard_normal((2, 3, 96)).astype(np.float32)
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = jnp.asarray(x, dtype)
        y = rotate(narrow, r)
        assert (y.shape, y.dtype) == (narrow.shape, narrow.dtype)
        # nothing but the last rounding is narrow
        exact = rotated(np.asarray(narrow, np.float64), 0)
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-5)
    assert rotate(jnp.zeros((0, 96)), r).shape == (0, 96)


def test_rotation_is_structure_of_a_tree() -> None:
    r = Rotation(8, 1)
    assert jax.tree.leaves(r) == [] and hash(r) == hash(Rotation(8, 1)) and r != Rotation(8, 2)
    W = jnp.arange(16.0).reshape(2, 8)
    model = {"mlp": {"down_proj": {"weight": Transformed(W, r)}}}
    assert list(trees.leaves(model)) == ["mlp.down_proj.weight"]
    other = trees.replace(model, {"mlp.down_proj.weight": 2 * W})["mlp"]["down_proj"]["weight"]
    assert isinstance(other, Transformed) and other.transform == r and np.array_equal(other.value, 2 * W)


def test_rotation_refuses_what_is_no_rotation() -> None:
    for size, seed in ((0, 0), (8, -1), (8, 2**64), (True, 0), (8.0, 0)):
        with pytest.raises(ValueError, match="expected a whole number"):
            Rotation(size, seed)  # type: ignore[arg-type]
    for function in (rotate, unrotate):
        with pytest.raises(ValueError, match="size 8"):
            function(jnp.zeros((2, 9)), Rotation(8, 0))


def test_linear_rotates_the_input_of_a_transformed_weight() -> None:
    rng = np.random.default_rng(4)
    W = jnp.asarray(rng.standard_normal((24, 96)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((3, 96)), jnp.float32)
    r = Rotation(96, 5)
    # 96 products of order 1
    np.testing.assert_allclose(linear(x, Transformed(rotate(W, r), r)), linear(x, W), atol=5e-5)
    codes = jnp.asarray(rng.integers(0, 16, (24, 96)), jnp.int32)
    packed = QuantizedLinear(affine_weight(codes, jnp.full((24, 3), 0.1), None, 4, 32, "in"))
    dense = jnp.matmul(rotate(x, r), dequantize(packed).T)
    np.testing.assert_allclose(linear(x, Transformed(packed, r)), dense, atol=5e-5)
