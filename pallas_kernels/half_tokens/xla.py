"""bfloat16 tokens as float16 tokens with a scale each that is a power of two.

    x[m, k] ~ scales[m] * half[m, k],    2**14 <= max_k |half[m, k]| < 2**15

float16 has more mantissa than bfloat16 and less range, so nothing is rounded but what is 2**-31 of a token's largest
value or less, and of that nothing changes by more than 2**-39 of the largest: far below the rounding of a float32 sum.
Infinities and NaN stay what they are. Products with 16-bit weights have room in a float32 sum.
"""

import jax
import jax.numpy as jnp

_PEAK = 14  # exponent of the largest value of a token
_BIAS, _MANTISSA = 127, 23  # of float32


def half_tokens(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float16 [M, K], scales float32 [M]) of x [M, K] bfloat16, by XLA: three kernels and two readings on a GPU."""
    wide = x.astype(jnp.float32)
    up, down = powers(jnp.max(magnitudes(wide), axis=1))
    return (wide * up[:, None]).astype(jnp.float16), down


def magnitudes(x: jax.Array) -> jax.Array:
    """float32 without its sign, as int32: ordered as |x|, infinity and NaN above all else."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def powers(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what tokens are multiplied by, its inverse), float32, from the largest of their `magnitudes`."""
    # Both powers have to be normal numbers. What is that small fits anyway; infinity and NaN take any power.
    exponent = jnp.clip(jax.lax.shift_right_logical(largest, jnp.full_like(largest, _MANTISSA)), _PEAK + 2, 2 * _BIAS)
    return power(_PEAK + 2 * _BIAS - exponent), power(exponent - _PEAK)


def power(exponent: jax.Array) -> jax.Array:
    """2**(exponent - 127), float32, for exponents from 1 to 254."""
    return jax.lax.bitcast_convert_type(exponent * 2**_MANTISSA, jnp.float32)
