"""Which kernel of a product of sparse entries by row serves a call."""

import jax
import jax.numpy as jnp

from pallas_kernels.device import no_hopper
from pallas_kernels.sparse_matmul.row_programs import Config, add_by_programs, default_config
from pallas_kernels.sparse_matmul.rows import LARGEST_K, SparseRows
from pallas_kernels.sparse_matmul.shared_token import (
    SharedConfig,
    add_from_shared,
    default_shared,
    no_shared_token,
    shape_of,
)


def supported(tokens: int, columns: int, dtype: jax.typing.DTypeLike) -> str | None:
    """None if x [tokens, columns] of this type can be multiplied with float16 entries here, else the reason."""
    if jnp.dtype(dtype).name not in ("bfloat16", "float16", "float32"):
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16, float16 or float32"
    if columns > LARGEST_K:
        return f"K={columns} exceeds {LARGEST_K}, the columns an entry can name"
    if tokens < 1:
        return "there are no tokens"
    return None


def add_rows(
    y: jax.Array,
    x: jax.Array,
    sparse: SparseRows,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    config: Config | SharedConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y [M, N] float32 plus x [M, K] times the entries transposed, rounded once to out_dtype.

    config: of the kernel that is meant. None: that of shared memory where it serves, on a Hopper GPU, else the other.
    ValueError with the reason where `supported` has one, or the kernel that is meant, or if shapes disagree.
    """
    (tokens, width), rows = x.shape, sparse.starts.shape[0] - 1
    if (reason := supported(tokens, width, x.dtype)) is not None:
        raise ValueError(f"the sparse kernel cannot serve this: {reason}")
    if y.shape != (tokens, rows) or y.dtype != jnp.float32:
        raise ValueError(f"y is {y.dtype}{list(y.shape)}; expected float32{[tokens, rows]}")
    if sparse.words.shape[0] == 0:  # then no row is long
        return y.astype(out_dtype)
    shape = shape_of(x, sparse, out_dtype)
    reason = no_shared_token(shape)
    if config is None and not interpret and reason is None and no_hopper() is None:
        config = default_shared(shape)
    if isinstance(config, SharedConfig):
        if reason is not None:
            raise ValueError(f"the kernel in shared memory cannot serve this: {reason}")
        return add_from_shared(y, x, sparse, out_dtype, config)
    return add_by_programs(y, x, sparse, out_dtype, config or default_config(tokens), interpret)
