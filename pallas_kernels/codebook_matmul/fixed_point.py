"""Tables of floats as 16-bit fixed-point numbers of two signed bytes, for the 8-bit tensor core.

    T[n, j] ~ s[n] * X[n, j],     X = 256 h + l,     h, l int8,     s[n] = max_j |T[n, j]| / 32639

A product with h and one with l, by the same inputs in pieces of 8 bits (`pallas_kernels.codebook_matmul.token_pieces`),
are added as 256 * H + L. X is within half of T / s, which is 1.5e-5 of the largest entry of the row: more exact than
bfloat16 for all but the smallest entries, and no instruction puts the two looked-up bytes of an entry together.
"""

import jax
import jax.numpy as jnp

LARGEST = 127 * 256 + 127  # both digits balanced: 32640 would make the high one 128


@jax.jit
def fixed_point_tables(codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(uint16 [N or 1, C], h in the high byte and l in the low one; s float32 [N or 1]) of a codebook of floats.

    A table of zeros has s = 1; one that is not finite has zeros and s NaN.
    """
    table = codebook.astype(jnp.float32)
    largest = jnp.max(jnp.abs(table), axis=1)
    finite = largest < jnp.inf
    scales = jnp.where(finite & (largest > 0), largest / LARGEST, 1.0)
    whole = jnp.where(finite[:, None], jnp.round(table / scales[:, None]), 0).astype(jnp.int32)
    whole = jnp.clip(whole, -LARGEST, LARGEST)
    high = (whole + 128) >> 8
    low = whole - 256 * high
    words = (((high & 255) << 8) | (low & 255)).astype(jnp.uint16)
    return words, jnp.where(finite, scales, jnp.nan)
