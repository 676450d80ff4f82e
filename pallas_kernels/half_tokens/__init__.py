"""bfloat16 tokens [M, K] as float16 tokens with a scale each that is a power of two: x[m, k] ~ scales[m] * half[m, k].

Where the weights of a product are exact or nearly so in float16, and not in bfloat16, tokens become float16 first:
beside tables of int8 entries, and beside affine weights that are rounded, by scales of groups that are multiplied in 16
bits (`affine_matmul` with many tokens) or by sparse entries that are added. `convert` takes the kernel of `rows`, one
launch, where there is one for the shape, and else XLA's three.
"""

import jax

from pallas_kernels.half_tokens.rows import half_rows as half_rows, supported_rows as supported_rows
from pallas_kernels.half_tokens.xla import half_tokens as half_tokens


def convert(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float16 [M, K], scales float32 [M]) of x [M, K] bfloat16, on a GPU."""
    tokens, columns = x.shape
    return half_rows(x) if supported_rows(tokens, columns, x.dtype) is None else half_tokens(x)
