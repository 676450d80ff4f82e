"""A whole token in the registers of one program: what kernels of the Triton backend share that need all of it.

x [M, K] with a program for each of M, K filled up with zeros to a power of two.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton


def warps_of(width: int) -> int:
    """Warps of a program for tokens of `width` entries: 16 entries a thread, at most 32 warps."""
    return max(min(pl.next_power_of_2(width) // 512, 32), 1)


def load_token(x_ref: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
    """(x float32 [K filled up], its place (rows, columns) in an array like x_ref, which columns there are)."""
    width = x_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)
    inside = column < width
    place = jnp.broadcast_to(pl.program_id(0), column.shape), column
    return pltriton.load(x_ref.at[place], mask=inside, other=0.0).astype(jnp.float32), place, inside


def rounded_even(x: jax.Array, interpret: bool) -> jax.Array:
    """The nearest integers, of two the even ones; float32."""
    return jnp.round(x) if interpret else assembly("cvt.rni.f32.f32 $0, $1;", x)


def assembly(code: str, *args: jax.Array) -> jax.Array:
    """An instruction for every element of arrays of one type and shape, 32 bits each."""
    register = "f" if args[0].dtype == jnp.float32 else "r"
    (value,) = pltriton.elementwise_inline_asm(
        code,
        args=args,
        constraints=f"={register}" + f",{register}" * len(args),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)],
    )
    return value
