"""Tables of floats as bfloat16 ones with a factor a row, chosen so that the entries fit.

    T[n, j] ~ f[n] * rounded[n, j],     rounded = bfloat16(T / f),  1 <= f[n] < 2

A product multiplies every row's sum by a float32 scale at its end, which takes the factor for nothing. f[n] is the one
of 256 candidates that makes sum_j (f[n] * rounded[n, j] - T[n, j])**2 least. The squares are not weighted: tables are
made so that their entries are in use alike, more or less, and counting the codes of a row would read the whole weight.

Rounding alone is a relative error of 1.7e-3, and with that of a bfloat16 output, 1.66e-3, 2.4e-3 together. What is left
of normal entries is 3e-4 of four in a row, 5.5e-4 of eight and 8e-4 of sixteen: 1.7e-3 to 1.85e-3 together.
"""

import jax
import jax.numpy as jnp

CANDIDATES = 256  # four times as many would take another tenth of the error away


@jax.jit
def rounded_tables(codebook: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(bfloat16 tables [N or 1, C], factors float32 [N or 1]) of a codebook [N or 1, C] of floats.

    The factor is 1 where every entry is a bfloat16 number, and where one is infinite or NaN. One candidate after the
    other, so memory stays a few times that of the codebook.
    """
    table = codebook.astype(jnp.float32)
    largest = jnp.max(jnp.abs(table), axis=1, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1.0)  # squares of the errors themselves could underflow

    def attempt(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        factor = 1 + i.astype(jnp.float32) / CANDIDATES
        # not two conversions: XLA takes a pair of them away
        rounded = jax.lax.reduce_precision(table / factor, exponent_bits=8, mantissa_bits=7)
        error = jnp.sum(jnp.square((factor * rounded - table) / unit), axis=1)
        better = error < best[0]
        return jnp.where(better, error, best[0]), jnp.where(better, factor, best[1])

    start = jnp.full(table.shape[:1], jnp.inf), jnp.ones(table.shape[:1])
    _, factors = jax.lax.fori_loop(0, CANDIDATES, attempt, start)
    return (table / factors[:, None]).astype(jnp.bfloat16), factors
