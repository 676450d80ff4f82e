"""`tokens.half_tokens` in one launch, a token in registers; the Triton backend of Pallas.

Beside a product of one token, which takes some 35 us, every further launch counts: XLA makes three of this.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.codebook_matmul.tokens import magnitudes, powers

LARGEST_K = 32768


def supported_rows(tokens: int, columns: int, dtype: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes x [tokens, columns], else the reason why not."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16"
    if columns > LARGEST_K:
        return f"K={columns} exceeds {LARGEST_K}, a token in registers"
    if tokens == 0 or tokens * columns >= 2**31:
        return f"{tokens} tokens of {columns} inputs are none, or more than 32-bit addresses reach"
    return None


def half_rows(x: jax.Array, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(float16 [M, K], scales float32 [M]) of x [M, K] bfloat16, bit for bit those of `tokens.half_tokens`.

    ValueError with the reason where `supported_rows` has one.
    """
    tokens, width = x.shape
    if (reason := supported_rows(tokens, width, x.dtype)) is not None:
        raise ValueError(f"the converting kernel cannot serve this: {reason}")
    half, scales = pl.pallas_call(
        _kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float16), jax.ShapeDtypeStruct((tokens,), jnp.float32)],
        grid=(tokens,),
        compiler_params=pltriton.CompilerParams(
            num_warps=max(min(pl.next_power_of_2(width) // 512, 32), 1),  # 16 entries a thread
            num_stages=1,
        ),
        interpret=interpret,
        name="half_rows",
    )(x)
    return half, scales


def _kernel(x_ref, half_ref, scales_ref):
    width = x_ref.shape[1]
    row = pl.program_id(0)
    column = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
    inside = column < width
    rows = jnp.broadcast_to(row, column.shape)
    x = pltriton.load(x_ref.at[rows, column], mask=inside, other=0.0).astype(jnp.float32)
    up, down = powers(jnp.max(magnitudes(x)))
    pltriton.store(half_ref.at[rows, column], (x * up).astype(jnp.float16), mask=inside)
    pltriton.store(scales_ref.at[row], down)
