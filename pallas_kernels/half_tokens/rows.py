"""`xla.half_tokens` in one launch, a token in registers; the Triton backend of Pallas.

Beside a product of one token, which takes some 35 us, every further launch counts: XLA makes three of this.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.half_tokens.xla import magnitudes, powers
from pallas_kernels.token_in_registers import load_token, warps_of

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
    """(float16 [M, K], scales float32 [M]) of x [M, K] bfloat16, bit for bit those of `xla.half_tokens`.

    ValueError with the reason where `supported_rows` has one.
    """
    tokens, width = x.shape
    if (reason := supported_rows(tokens, width, x.dtype)) is not None:
        raise ValueError(f"the converting kernel cannot serve this: {reason}")
    half, scales = pl.pallas_call(
        _kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, jnp.float16), jax.ShapeDtypeStruct((tokens,), jnp.float32)],
        grid=(tokens,),
        compiler_params=pltriton.CompilerParams(num_warps=warps_of(width), num_stages=1),
        interpret=interpret,
        name="half_rows",
    )(x)
    return half, scales


def _kernel(x_ref, half_ref, scales_ref):
    x, place, inside = load_token(x_ref)
    up, down = powers(jnp.max(magnitudes(x)))
    pltriton.store(half_ref.at[place], (x * up).astype(jnp.float16), mask=inside)
    pltriton.store(scales_ref.at[pl.program_id(0)], down)
