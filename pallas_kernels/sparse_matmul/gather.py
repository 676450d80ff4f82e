"""The sparse product in jax.numpy: the oracle, and the path of every device without a kernel.

Entries are gathered from x, multiplied and summed by row; work and memory are M * nnz, so it is meant for few tokens.
For many, add the entries to a decoded weight instead.
"""

import jax
import jax.numpy as jnp


def gather_sum(x: jax.Array, values: jax.Array, columns: jax.Array, rows: jax.Array, num_rows: int) -> jax.Array:
    """x [M, K] float32 -> [M, N] float32."""
    products = x.T[columns.astype(jnp.int32)] * values.astype(jnp.float32)[:, None]
    return jax.ops.segment_sum(products, rows, num_segments=num_rows, indices_are_sorted=True).T
