"""Kept columns as the tensor core reads them: an exact inverse, and every weight where the PTX manual expects it."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kept_columns import KeptFragments, kept_shape, kept_weight, prepare_kept

KINDS = [jnp.bfloat16, jnp.float16]


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (65, 100), (200, 256), (130, 63)])
def test_preparing_rounds_and_is_undone(shape: tuple[int, int], dtype: type) -> None:
    exact = jnp.asarray(weights(*shape))
    kept = prepare_kept(exact, dtype)
    assert kept.words.dtype == jnp.uint32 and kept.words.shape == kept_shape(shape)
    np.testing.assert_array_equal(kept_weight(kept, shape), exact.astype(dtype))


@pytest.mark.parametrize("dtype", KINDS)
def test_every_weight_lies_in_the_register_of_its_thread(dtype: type) -> None:
    rows, columns = 100, 130
    rounded = np.asarray(jnp.asarray(weights(rows, columns)).astype(dtype))
    full = np.pad(rounded, [(0, 28), (0, 62)]).view(np.uint16)
    words = np.asarray(prepare_kept(jnp.asarray(rounded), dtype).words)
    for block, tile in np.ndindex(2, 3):
        own = words[block, tile].reshape(4, 128, 4)
        for step, thread, register in np.ndindex(4, 128, 4):
            # wgmma m64k16: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8), two columns each
            row = 64 * block + 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
            column = 64 * tile + 16 * step + 2 * (thread % 4) + 8 * (register // 2)
            low, high = int(full[row, column]), int(full[row, column + 1])
            assert own[step, thread, register] == low | high << 16


def test_other_types_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="float32; expected bfloat16 or float16"):
        prepare_kept(jnp.zeros((4, 4)), jnp.float32)
    with pytest.raises(ValueError, match=r"expected \[1, 2, 16, 128\]"):
        kept_weight(KeptFragments(jnp.zeros((1, 1, 16, 128), jnp.uint32), "float16"), (4, 65))
