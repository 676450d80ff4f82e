"""Random affine products and what becomes of them in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fragments import pack_fragments, slot_order


def arguments(shape: tuple[Any, ...]) -> tuple[dict[str, jax.Array], dict[str, Any], np.ndarray]:
    """Arrays, static arguments and the float32 reference of a product: M, N, K, bits, group_size, zeros, x, scales.

    Scales of uint8 are whole multiples of steps."""
    m, n, k, bits, group_size, has_zeros, x_dtype, scale_dtype = shape
    random = np.random.default_rng(m)
    codes = random.integers(0, 2**bits, (n, k))
    size = group_size or k
    groups = -(-k // size)
    steps = jnp.asarray(random.uniform(0.001, 0.002, n), jnp.float16)
    if scale_dtype == "uint8":
        scales = jnp.asarray(random.integers(0, 17, (groups, n)), jnp.uint8)
    else:
        scales = jnp.asarray(random.uniform(0.01, 0.02, (groups, n)), scale_dtype)
    zeros = random.integers(0, 2**bits, (groups, n)) if has_zeros else np.full((groups, n), 2 ** (bits - 1))
    group = np.arange(k) // size
    weights = np.asarray(scales, np.float32)[group].T * (codes - zeros[group].T).astype(np.float32)
    arrays = {"words": pack_fragments(jnp.asarray(codes), bits, "pairs"), "scales": scales}
    if scale_dtype == "uint8":
        weights *= np.asarray(steps, np.float32)[:, None]
        arrays["steps"] = steps
    if has_zeros:
        arrays["zeros"] = jnp.asarray(zeros, jnp.uint8)
    if x_dtype == "int8":
        x = random.integers(-128, 128, (m, k)).astype(np.float32)
        x_scales, x_offsets = (random.uniform(0.01, 0.02, m).astype(np.float32) for _ in range(2))
        padded = np.pad(x, ((0, 0), (0, -k % 64)))
        arrays["x"] = jnp.asarray(padded[:, slot_order(padded.shape[1])][:, :k], jnp.int8)
        sums = weights.sum(axis=1)
        arrays |= {
            "x_scales": jnp.asarray(x_scales),
            "x_offsets": jnp.asarray(x_offsets),
            "row_sums": jnp.asarray(sums),
        }
        expected = (x * x_scales[:, None]) @ weights.T + x_offsets[:, None] * sums
    else:
        arrays["x"] = jnp.asarray(random.standard_normal((m, k)), x_dtype)
        expected = np.asarray(arrays["x"], np.float32) @ weights.T
        if x_dtype == "float16":  # as tokens have them that were bfloat16
            powers = 2.0 ** random.integers(-2, 3, m)
            arrays["x_scales"] = jnp.asarray(powers, jnp.float32)
            expected = expected * powers[:, None]
    return arrays, {"bits": bits, "outputs": n, "group_size": group_size, "out_dtype": jnp.float32}, expected
