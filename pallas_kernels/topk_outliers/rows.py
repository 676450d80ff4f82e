"""The selection with a token in registers; the Triton backend of Pallas, which has the loop around reductions.

Both ends are counted in one sum, 16 bits each, so a step costs one exchange between warps; a launch costs some 30 of
them for bfloat16, whatever M up to the number of multiprocessors.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.token_in_registers import load_token, warps_of
from pallas_kernels.topk_outliers.xla import SHIFTS, ordered_keys, select

LARGEST_K = 32768  # counts have 16 bits


def supported(tokens: int, columns: int, dtype: jax.typing.DTypeLike) -> str | None:
    """None if the kernel takes x [tokens, columns], else the reason why not."""
    if jnp.dtype(dtype).name not in SHIFTS:
        return f"activations are {jnp.dtype(dtype).name}, not bfloat16, float16 or float32"
    if columns > LARGEST_K:
        return f"K={columns} exceeds {LARGEST_K}, a token in registers"
    if tokens == 0 or tokens * columns >= 2**31:
        return f"{tokens} tokens of {columns} inputs are none, or more than 32-bit addresses reach"
    return None


def mask_rows(x: jax.Array, count: int, *, num_warps: int | None = None, interpret: bool = False) -> jax.Array:
    """`xla.mask_xla` on a GPU, the same mask as int8 [M, K]. ValueError with the reason where `supported` has one.

    num_warps: of a token's program, a power of two; None gives a thread 16 entries.
    """
    tokens, width = x.shape
    if (reason := supported(tokens, width, x.dtype)) is not None:
        raise ValueError(f"the selecting kernel cannot serve this: {reason}")
    if num_warps is None:
        num_warps = warps_of(width)
    return pl.pallas_call(
        functools.partial(_kernel, count),
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.int8),
        grid=(tokens,),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="topk_rows",
    )(x)


def _kernel(count, x_ref, mask_ref):
    width = x_ref.shape[1]
    x, place, inside = load_token(x_ref)
    column = place[1]
    magnitude = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    finite = jnp.max(magnitude) < 0x7F800000
    if count == 0 or 2 * count >= width:
        mask = jnp.broadcast_to(finite & (count > 0), column.shape)
    else:
        keys, bits = ordered_keys(x, x_ref.dtype.name)

        def totals(high, low):
            both = (high & inside).astype(jnp.int32) + (low & inside).astype(jnp.int32) * 65536
            total = jnp.sum(both)
            return total & 0xFFFF, jax.lax.shift_right_logical(total, jnp.int32(16))

        start = pl.program_id(0) * 0
        mask = finite & select(keys, column, count, bits, width.bit_length(), start, totals)
    pltriton.store(mask_ref.at[place], mask.astype(jnp.int8), mask=inside)
